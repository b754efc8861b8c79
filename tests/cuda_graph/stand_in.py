"""A stand-in for CUDA graphs where there is no GPU: it records and replays the operators themselves.

It has those properties of the real thing that programs stumble over: a recording computes nothing, and replays use its
memory and the numbers of then.
"""

import contextlib
import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WAITS = ("_local_scalar_dense", "nonzero", "equal", "unique", "rand", "bernoulli", "normal")


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class Recording(TorchDispatchMode):
    """The stand-in's capture: notes every operator, and takes back what it did."""

    def __init__(self):
        super().__init__()
        self.calls, self.before, self.own = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, schema = func._schema.name.split("::")[1], func._schema
        if any(word in name for word in WAITS):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        for i, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tensors(args[i] if i < len(args) else kwargs.get(argument.name)):
                    storage = t.untyped_storage()
                    if storage._cdata not in self.own:
                        self.before.setdefault(storage._cdata, (storage, storage.clone()))
        out = func(*args, **kwargs)
        made = [t.detach() for t in tensors(out)]
        if any(r.alias_info is not None for r in schema.returns):
            made = None if not any(r.alias_info.is_write for r in schema.returns if r.alias_info) else []
        else:
            self.own |= {t.untyped_storage()._cdata for t in made}
        if made is not None:  # views are there already
            self.calls.append((func, args, kwargs, made))
        return out

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for storage, values in self.before.values():
            storage.copy_(values)
        for t in (t for call in self.calls for t in call[3]):
            if t.untyped_storage()._cdata in self.own:
                t.fill_(math.nan if t.is_floating_point() else 0)


class StandIn:
    """torch.cuda.CUDAGraph."""

    made: list = []

    def __init__(self):
        self.calls, self.replays = [], 0
        StandIn.made.append(self)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, out in self.calls:
            new = func(*args, **kwargs)
            for t, value in zip(out, tensors(new) if out else (), strict=True):
                t.copy_(value)


class Stream:
    """torch.cuda.Stream, which notes who waits for whom."""

    events: list = []

    def __init__(self, device=None):
        self.name = "side"

    def wait_stream(self, other):
        Stream.events.append(f"{self.name} waits for {other.name}")


@contextlib.contextmanager
def capture(graph, pool, stream, capture_error_mode):
    assert stream.name == "side" and capture_error_mode == "thread_local"
    with Recording() as recording:
        yield
    graph.calls = recording.calls
