"""CUDA graphs: a function's GPU work recorded once and replayed without Python, where the host is the slower one.

A replay does what was recorded: to the same addresses, by the numbers that Python held then. What changes between calls
must therefore be a tensor that the function is given, or one that lives elsewhere and is written in place.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ditfast import kernels
from ditfast.config import ConfigError
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
            f"{option} runs on one process, and this run has {world_size}: the reduction of gradients between them is "
            "not part of the graph; leave it off, or start one process"
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
    """`fn(*tensors) -> tensors in dicts, lists or tuples` as CUDA graphs: one for each set of shapes and dtypes.

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

    def __call__(self, *inputs: Tensor) -> Any:
        key = tuple((t.shape, t.dtype) for t in inputs)
        if key not in self._recorded:
            self._calls[key] += 1
            if len(self._calls) > self.max_shapes:
                shapes = ", ".join(str(tuple(t.shape)) for t in inputs)
                raise ConfigError(
                    f"{self.option}: inputs of shapes {shapes} need graph {len(self._calls)}, and {self.max_shapes} "
                    "can be kept; keep to one batch size, or leave the option off"
                )
            if self._calls[key] <= WARMUP:
                return self._run_aside(inputs)
            self._recorded[key] = self._record(inputs)
        recorded = self._recorded[key]
        for buffer, value in zip(recorded.inputs, inputs, strict=True):
            buffer.copy_(value)
        recorded.graph.replay()
        return tree_map(torch.clone, recorded.outputs)

    def _run_aside(self, inputs: Iterable[Tensor]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            outputs = self.fn(*inputs)
        current.wait_stream(self.stream)
        return outputs

    def _record(self, inputs: Iterable[Tensor]) -> _Recorded:
        graph, buffers = torch.cuda.CUDAGraph(), [t.clone() for t in inputs]
        # The loader's thread that pins memory goes on meanwhile: what it asks of CUDA must not spoil the recording.
        options: dict[str, Any] = {"pool": self.pool, "stream": self.stream, "capture_error_mode": "thread_local"}
        try:
            with kernels.captured_tables() as tables, torch.cuda.graph(graph, **options):
                outputs = self.fn(*buffers)
        except RuntimeError as error:
            raise ConfigError(f"{self.option}: the recording failed: {error}; leave the option off") from error
        return _Recorded(graph, buffers, outputs, tables)
