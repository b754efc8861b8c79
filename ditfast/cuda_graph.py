"""CUDA graphs: a function's GPU work recorded once and replayed without Python, where the host is the slower one.

A replay does what was recorded: to the same addresses, by the numbers that Python held then. What changes between calls
must therefore be a tensor that the function is given, or one that lives elsewhere and is written in place.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ditfast import kernels
from ditfast.config import ConfigError
from ditfast.diffusion.guidance import key_of
from ditfast.diffusion.samplers import Step
from ditfast.diffusion.types import Model, TensorFn
from ditfast.layers.plain import has_hooks

WARMUP = 3  # calls before the recording, in which libraries allocate, kernels compile and the allocator settles


def check_cuda_graph(
    option: str, device: torch.device, model: nn.Module, world_size: int = 1, compiled: bool = False
) -> None:
    """ConfigError, which names `option`, where a CUDA graph cannot hold what a model's calls do."""
    if device.type != "cuda":
        raise ConfigError(f"{option} needs a CUDA device, and this run is on {device}; leave it off")
    if world_size > 1:
        raise ConfigError(
            f"{option} runs on one process, and this run has {world_size}: that a graph holds the reduction of "
            "gradients between them has not been shown on GPUs yet; leave it off, or start one process"
        )
    if compiled:
        from torch._inductor import config as inductor

        if inductor.triton.cudagraphs:
            raise ConfigError(
                f"{option}: torch.compile is set to record CUDA graphs of its own (torch._inductor.config.triton."
                "cudagraphs, TORCHINDUCTOR_CUDAGRAPHS=1), and one cannot be recorded in the other; turn one of them off"
            )
    hooked = [name or "the model" for name, module in model.named_modules() if has_hooks(module)]
    hooked += [name for name, p in model.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks]
    if hooked:
        raise ConfigError(
            f"{option}: {hooked[0]} has hooks, whose Python would run once, at the recording, and never again; remove "
            "them, or leave the option off"
        )


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: Any
    tables: list[Any]  # that its kernels read


class CudaGraph:
    """`fn(*tensors, **form) -> tensors in dicts, lists or tuples` as CUDA graphs.

    One for each set of shapes and dtypes, and for each `form`: what `fn` is told by hashable values.

    Each graph has buffers of its own for the inputs, what is returned is a copy, and all share one pool of memory. The
    first WARMUP calls of a shape run as they are, on another stream, as a capture requires; the next is recorded, and
    then replayed. So every call does its work once, and `fn` may be an optimizer's step.

    Raises ConfigError, which names `option`, for more than `max_shapes`, and where `fn` cannot be recorded (it waits
    for the device, or copies from memory that is not pinned).
    """

    def __init__(self, fn: Callable[..., Any], option: str, device: torch.device, max_shapes: int = 8):
        self.fn, self.option, self.max_shapes = fn, option, max_shapes
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._calls = Counter[Any]()
        self._recorded: dict[Any, _Recorded] = {}

    def __call__(self, *inputs: Tensor, **form: Hashable) -> Any:
        key = (*((t.shape, t.dtype) for t in inputs), *form.items())
        if key not in self._recorded:
            self._calls[key] += 1
            if len(self._calls) > self.max_shapes:
                shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
                same = any(other[: len(inputs)] == key[: len(inputs)] for other in self._calls if other != key)
                remedy = "give the same model and options to every step" if same and form else "keep to one batch size"
                raise ConfigError(
                    f"{self.option}: inputs of shapes {shapes} need graph {len(self._calls)}, and {self.max_shapes} "
                    f"can be kept; {remedy}, or leave the option off"
                )
            if self._calls[key] <= WARMUP:
                return self._run_aside(inputs, form)
            self._recorded[key] = self._record(inputs, form)
        recorded = self._recorded[key]
        for buffer, value in zip(recorded.inputs, inputs, strict=True):
            buffer.copy_(value)
        recorded.graph.replay()
        return tree_map(torch.clone, recorded.outputs)

    def _run_aside(self, inputs: Iterable[Tensor], form: Mapping[str, Hashable]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.fn(*inputs, **form)
        current.wait_stream(self.stream)
        return outputs

    def _record(self, inputs: Iterable[Tensor], form: Mapping[str, Hashable]) -> _Recorded:
        graph, buffers = torch.cuda.CUDAGraph(), [t.clone() for t in inputs]
        # The loader's thread that pins memory goes on meanwhile: what it asks of CUDA must not spoil the recording.
        options: dict[str, Any] = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        try:
            with kernels.captured_tables() as tables, torch.cuda.graph(graph, **options):
                outputs = self.fn(*buffers, **form)
        except RuntimeError as error:
            raise ConfigError(f"{self.option}: the recording failed: {error}; leave the option off") from error
        return _Recorded(graph, buffers, outputs, tables)


class StepGraph:
    """Steps of sampling loops as CUDA graphs, each the networks, their guidance, the update and the write of x.

    A `run_step` of the loops in `ditfast.diffusion`, given y (B,) and noise_fn beside, which a step without noise may
    have as None. Each model that they give it has its graph, as has each set of the sampler's options: a model that
    makes another callable for every step needs more than there can be. Of what a model reads beside its arguments only
    tensors, written in place, may change. Noise is drawn before the replay. The x that a step returns is the memory
    that the next one reads and writes: copy what shall last.

    Raises ConfigError as CudaGraph does, and for model_kwargs beside y, which a replay would not read.
    """

    def __init__(self, option: str, device: torch.device):
        self._graph = CudaGraph(self._advance, option, device)
        self._x: dict[torch.Size, Tensor] = {}
        self._steps: dict[Hashable, Callable[..., Step]] = {}

    def __call__(
        self,
        step: Callable[..., Step],
        model: Model,
        x: Tensor,
        t: Tensor,
        *more: Tensor,
        y: Tensor,
        noise_fn: TensorFn | None,
    ) -> Step:
        if x.shape not in self._x:
            self._x[x.shape] = torch.empty_like(x)
        own = self._x[x.shape]
        if x is not own:  # a loop begins
            own.copy_(x)
        form = len(more), key_of(model), *self._options(step)
        self._steps[form] = partial(step, model)
        noise = () if noise_fn is None else (noise_fn(own),)
        return {"sample": own, "pred_xstart": self._graph(t, y, *more, *noise, form=form, shape=x.shape)}

    def _options(self, step: Callable[..., Step]) -> tuple[Hashable, ...]:
        """What tells one sampler's step with its options from another, but for the noise and y."""
        if not isinstance(step, partial):
            return (step,)
        options = dict(step.keywords)
        if others := sorted(set(options.pop("model_kwargs", None) or {}) - {"y"}):
            raise ConfigError(
                f"{self._graph.option}: model_kwargs has {', '.join(others)}, which a recorded step would read but "
                "once; bind what is constant to the model, or leave the option off"
            )
        options.pop("noise_fn", None)
        plain = (bool, int, float, type(None))
        kept = ((name, v if isinstance(v, plain) else id(v)) for name, v in sorted(options.items()))
        return step.func, *map(id, step.args), *kept

    def _advance(self, t: Tensor, y: Tensor, *tensors: Tensor, form: tuple[Any, ...], shape: torch.Size) -> Tensor:
        x = self._x[shape]
        more, noise = tensors[: form[0]], tensors[form[0] :]
        options = {"noise_fn": (lambda _: noise[0]) if noise else None, "model_kwargs": {"y": y}}
        out = self._steps[form](x, t, *more, **options)
        x.copy_(out["sample"])
        return out["pred_xstart"]
