"""Results that autograd does not keep: computed again in backward, if they can be once, for whoever asks first."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Redo = Callable[..., tuple[Any, ...]]
"""redo(*results) -> (function, *tensors), see `Replays.call`."""


def call(fn: Callable[..., Any], *inputs: Tensor | None, drop: Sequence[int] = (), redo: Redo | None = None) -> Any:
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

    def call(
        self, fn: Callable[..., Any], *inputs: Tensor | None, drop: Sequence[int] = (), redo: Redo | None = None
    ) -> Any:
        """fn(*inputs), of which only the inputs are kept for its backward, and not the results numbered in `drop`.

        fn must be deterministic, differentiable by autograd, draw no random numbers, and read no other tensors that
        need a gradient. The gradient is not differentiable again.

        For an fn whose own backward keeps little and reads nothing that is dropped, `redo` gives, from the results,
        what makes the dropped ones again at less cost, and its inputs. It then runs once for each that asks.
        """
        if redo is not None:
            outputs = fn(*inputs)
            results = _tuple(outputs)
            again, *given = redo(*results)
            replay = _Replay(again, [None if t is None else t.detach() for t in given], once=False)
            self._drop(replay, dict(enumerate(results[i] for i in drop)), given)
            return outputs
        replay = _Replay(fn, inputs)
        outputs = _Replayed.apply(replay, *inputs)
        results = _tuple(outputs)
        self._drop(replay, {i: results[i] for i in drop}, inputs)
        return outputs

    def _drop(self, replay: "_Replay", results: Mapping[int, Tensor], inputs: Sequence[Tensor | None]) -> None:
        """Has whoever saves one of these results of a replay, by number, save the way to it instead."""
        packed = tuple(None if t is None else self._pack(t) for t in inputs)
        for i, result in results.items():
            if result.is_contiguous() and result.untyped_storage().nbytes() == result.nbytes:
                dropped = _Dropped(replay, packed, i, (result.shape, result.stride(), 0))
                self._dropped[_storage(result)] = weakref.ref(result), result._version, dropped

    def _pack(self, tensor: Tensor) -> "_Kept | _Dropped":
        if (found := self._dropped.get(_storage(tensor))) is not None:
            reference, version, dropped = found
            result = reference()  # the storage of a dead one may by now be another tensor's
            if result is not None and result._version == version and tensor.dtype == result.dtype:
                return dropped._replace(view=(tensor.shape, tensor.stride(), tensor.storage_offset()))
        # Detached, since autograd gives some ops' own results to be saved, and they would hold what saves them.
        return _Kept(tensor.detach(), tensor._version)


class _Replay:
    """One call of `fn`; between the first request in a backward and its own gradient it holds the results' graph.

    One that has no gradient of its own is not to be run `once`: nothing would tell when to let go of its results.
    """

    def __init__(self, fn: Callable[..., Any], inputs: Sequence[Tensor | None], once: bool = True):
        self.once = once
        self.fn, self.needs = fn, [t is not None and t.requires_grad for t in inputs]
        kind = next(t.device.type for t in inputs if t is not None)
        self.autocast = {"device_type": kind, "dtype": torch.get_autocast_dtype(kind)}
        self.autocast["enabled"] = torch.is_autocast_enabled(kind)
        self.inputs: list[Tensor | None] = []
        self.outputs: tuple[Tensor, ...] = ()

    def run(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The results, as differentiable functions of `self.inputs`."""
        if self.outputs:
            return self.outputs
        pairs = zip(inputs, self.needs, strict=True)
        leaves = [t if t is None else t.detach().requires_grad_(needed) for t, needed in pairs]
        with torch.enable_grad(), torch.autocast(**self.autocast):
            outputs = _tuple(self.fn(*leaves))
        if self.once:
            self.inputs, self.outputs = leaves, outputs
        return outputs


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
