"""Results that autograd does not keep: computed again in backward, once, for whoever asks first."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def call(fn: Callable[..., Any], *inputs: Tensor | None, drop: Sequence[int] = ()) -> Any:
    """fn(*inputs): what stands for `Replays.call` where nothing is dropped."""
    return fn(*inputs)


class Replays(torch.autograd.graph.saved_tensors_hooks):
    """A context, in which ops are run by `call`, and results that they may drop are not kept by any op.

    Any op inside that saves a dropped result, or a view of it, saves, unknowingly, the way to compute it again. The
    result must be contiguous, all of its storage, and not written to since, the view of its dtype; what else is saved
    is kept. Outer saved-tensor hooks do not see this scope.
    """

    def __init__(self) -> None:
        super().__init__(self._pack, _unpack)
        self._dropped = dict[int, tuple[weakref.ref[Tensor], int, _Dropped]]()

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._dropped.clear()

    def call(self, fn: Callable[..., Any], *inputs: Tensor | None, drop: Sequence[int] = ()) -> Any:
        """fn(*inputs), of which only the inputs are kept for its backward, and not the results numbered in `drop`.

        fn must be deterministic, differentiable by autograd, draw no random numbers, and read no other tensors that
        need a gradient. The gradient is not differentiable again.
        """
        replay = _Replay(fn, inputs)
        outputs = _Replayed.apply(replay, *inputs)
        results = _tuple(outputs)
        packed = tuple(None if t is None else self._pack(t) for t in inputs)
        for i in drop:
            result = results[i]
            if result.is_contiguous() and result.untyped_storage().nbytes() == result.nbytes:
                view = (result.shape, result.stride(), 0)
                self._dropped[_storage(result)] = (
                    weakref.ref(result),
                    result._version,
                    _Dropped(replay, packed, i, view),
                )
        return outputs

    def _pack(self, tensor: Tensor) -> "_Kept | _Dropped":
        if (found := self._dropped.get(_storage(tensor))) is not None:
            reference, version, dropped = found
            result = reference()  # the storage of a dead one may by now be another tensor's
            if result is not None and result._version == version and tensor.dtype == result.dtype:
                return dropped._replace(view=(tensor.shape, tensor.stride(), tensor.storage_offset()))
        # Detached, since autograd gives some ops' own results to be saved, and they would hold what saves them.
        return _Kept(tensor.detach(), tensor._version)


class _Replay:
    """One call of `fn`; between the first request in a backward and its own gradient it holds the results' graph."""

    def __init__(self, fn: Callable[..., Any], inputs: Sequence[Tensor | None]):
        self.fn, self.needs = fn, [t is not None and t.requires_grad for t in inputs]
        kind = next(t.device.type for t in inputs if t is not None)
        self.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        self.autocast["enabled"] = torch.is_autocast_enabled(kind)
        self.inputs: list[Tensor | None] = []
        self.outputs: tuple[Tensor, ...] = ()

    def run(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The results, as differentiable functions of `self.inputs`."""
        if not self.outputs:
            pairs = zip(inputs, self.needs, strict=True)
            self.inputs = [t if t is None else t.detach().requires_grad_(needed) for t, needed in pairs]
            with torch.enable_grad(), torch.autocast(**self.autocast):
                self.outputs = _tuple(self.fn(*self.inputs))
        return self.outputs


class _Kept(NamedTuple):
    """A tensor that autograd holds, and its version: under hooks autograd itself looks at none."""

    tensor: Tensor
    version: int


class _Dropped(NamedTuple):
    """What autograd holds in place of a view (sizes, strides, offset) of result `number` of a replay."""

    replay: _Replay
    inputs: tuple["_Kept | _Dropped | None", ...]
    number: int
    view: tuple[Sequence[int], Sequence[int], int]


def _unpack(packed: _Kept | _Dropped | None) -> Tensor | None:
    if isinstance(packed, _Kept):
        if packed.tensor._version != packed.version:
            shape = tuple(packed.tensor.shape)
            raise RuntimeError(f"a tensor {shape} that the backward needs was written to in place after the forward")
        return packed.tensor
    if packed is None:
        return None
    outputs = packed.replay.outputs or packed.replay.run([_unpack(t) for t in packed.inputs])
    # Contiguous like the first time, whose memory the view was of.
    return outputs[packed.number].detach().contiguous().as_strided(*packed.view)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, replay: _Replay, *inputs: Tensor | None) -> Any:
        ctx.replay = replay
        ctx.save_for_backward(*inputs)
        return replay.fn(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts: Tensor) -> Any:
        replay = ctx.replay
        outputs = replay.outputs or replay.run(ctx.saved_tensors)
        graded = [(out, dout) for out, dout in zip(outputs, douts, strict=True) if out.requires_grad]
        leaves = [t for t in replay.inputs if t is not None and t.requires_grad]
        outs, grads = zip(*graded, strict=True)
        found = iter(torch.autograd.grad(outs, leaves, grads, allow_unused=True))
        replay.inputs, replay.outputs = [], ()
        return None, *(next(found) if needed else None for needed in replay.needs)


def _storage(tensor: Tensor) -> int:
    """What tells storages that live at the same time apart."""
    return tensor.untyped_storage()._cdata


def _tuple(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
