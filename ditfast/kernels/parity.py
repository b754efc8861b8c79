"""Is a backend as right as PyTorch? Its outputs and gradients against a float64 oracle, under two budgets.

max: error <= 2 x (error of the eager reference in the same dtype + one rounding of the result)
RMS: error <= 1.1 x RMS error of the eager reference, or of one rounding where that is larger
The maximum alone is blind in bfloat16: a forgotten mean or a scale off by 1 % hides below it, but not below the RMS.
In float32 the order of a sum decides the RMS error, and one order is as right as another, so there the factor is 2; so
it is for libraries, whose roundings are not ours. What matters in float32 shows a thousand times over.
In TF32 what the products read is cut to ten bits of mantissa, in the eager reference too, and the factor is 1.1 again.
Of mixed inputs the eager reference gets all in the widest dtype: rounding 1 + scale to bfloat16 under a float32 stream,
as official autocast does, would excuse too much.
"""

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .spec import OpSpec
from .tf32 import tf32_products

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Verdict:
    """The errors of one output or gradient beside what the budgets allow."""

    name: str
    max_error: float
    max_allowed: float
    rms_error: float
    rms_allowed: float

    @property
    def ok(self) -> bool:
        """Within both budgets; NaN is not."""
        return self.max_error <= self.max_allowed and self.rms_error <= self.rms_allowed


def run(spec: OpSpec, inputs: Mapping[str, Any], backend: str, douts: list[torch.Tensor] | None = None) -> Tensors:
    """Outputs ("out0", ...) and, given their gradients, those of the floating-point inputs ("d<name>")."""
    leaves = {k: v.detach() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    wanted = {k: v.requires_grad_() for k, v in (spec.graded(leaves) if douts is not None else {}).items()}
    outputs = spec.call({**inputs, **leaves}, backend)
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    if wanted:
        grads = torch.autograd.grad(outputs, list(wanted.values()), douts)
        results |= {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def random_douts(outputs: Tensors, generator: torch.Generator) -> list[torch.Tensor]:
    """Gradients for outputs, with a mean that is not zero."""
    return [
        (0.25 + torch.randn(out.shape, device=out.device, generator=generator)).to(out.dtype)
        for out in outputs.values()
    ]


def oracle(spec: OpSpec, inputs: Mapping[str, Any], douts: list[torch.Tensor]) -> Tensors:
    """What `run` would give in float64 throughout, from the same rounded inputs."""
    exact = tree_map_only(torch.Tensor, torch.Tensor.double, dict(inputs))
    parameters = inspect.signature(spec.fn).parameters
    exact |= {name: torch.float64 for name in ("out_dtype", "compute_dtype") if name in parameters}
    integers = [k for k in spec.integers if not inputs[k].is_floating_point()]
    results = run(spec, exact, "reference", [dout.double() for dout in douts])
    return {k: v for k, v in results.items() if k.removeprefix("d") not in integers}


class CutProducts(TorchDispatchMode):
    """float32 matrix products inside read their operands without the 13 bits of mantissa that TF32 lacks."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the op, its last two tensors cut if it is a product."""
        aten = torch.ops.aten
        if func in (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default):
            *added, a, b = args
            args = (*added, _cut(a), _cut(b))
        return func(*args, **(kwargs or {}))


def _cut(operand: torch.Tensor) -> torch.Tensor:
    return (operand.view(torch.int32) & ~0x1FFF).view(torch.float32) if operand.dtype == torch.float32 else operand


def judge(
    results: Tensors,
    eager: Tensors,
    exact: Tensors,
    library: bool = False,
    slack: Mapping[str, float] | None = None,
    tf32: bool = False,
) -> list[Verdict]:
    """One verdict per tensor of `exact`; the other two hold the same names. slack: what OpSpec's gives."""
    verdicts = []
    for name, truth in exact.items():
        result, reference = results[name], eager[name]
        assert result.dtype == reference.dtype and result.shape == reference.shape == truth.shape, name
        error, eager_error = result.double() - truth, reference.double() - truth
        rounding = truth.to(result.dtype).double() - truth
        # A bias's gradient is a sum without products, and no TF32 in it.
        exact_products = result.dtype == torch.float32 and not (tf32 and _rms(eager_error) > 100 * _rms(rounding))
        factor = (2 if library or exact_products else 1.1) * (slack or {}).get(name, 1)
        verdicts.append(
            Verdict(
                name,
                _max(error),
                2 * (_max(eager_error) + _max(rounding)),
                _rms(error),
                factor * max(_rms(eager_error), _rms(rounding)),
            )
        )
    return verdicts


@dataclass(frozen=True)
class Truth:
    """What the backends of an op are judged by for given inputs; `douts` are the gradients of the outputs.

    tf32: float32 products are in TF32.
    """

    spec: OpSpec
    inputs: Mapping[str, Any]
    douts: list[torch.Tensor]
    eager: Tensors
    exact: Tensors
    tf32: bool = False

    def judge(self, backend: str) -> list[Verdict]:
        """The verdicts on one backend."""
        with tf32_products() if self.tf32 else nullcontext():
            results = run(self.spec, self.inputs, backend, self.douts)
        eager = {name: value.to(results[name].dtype) for name, value in self.eager.items()}
        slack = self.spec.slack(self.inputs) if self.spec.slack else {}
        return judge(results, eager, self.exact, backend != "triton", slack, self.tf32)


def truth(spec: OpSpec, inputs: Mapping[str, Any], generator: torch.Generator, tf32: bool = False) -> Truth:
    """The oracle and the eager reference for the given inputs, the outputs' gradients drawn from `generator`."""
    douts = random_douts(run(spec, inputs, "reference"), generator)
    with CutProducts() if tf32 else nullcontext():
        eager = run(spec, _widened(inputs), "reference", douts)
    return Truth(spec, inputs, douts, eager, oracle(spec, inputs, douts), tf32)


def check(
    spec: OpSpec, inputs: Mapping[str, Any], backend: str, generator: torch.Generator, tf32: bool = False
) -> list[Verdict]:
    """The verdicts on one backend for the given inputs, the gradients of the outputs drawn from `generator`."""
    return truth(spec, inputs, generator, tf32).judge(backend)


def _widened(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The floating-point tensors all in the widest dtype among them."""
    floats = [v for v in tree_leaves(dict(inputs)) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    widest = max((v.dtype for v in floats), key=lambda dtype: dtype.itemsize, default=torch.float32)
    return tree_map_only(torch.Tensor, lambda v: v.to(widest) if v.is_floating_point() else v, dict(inputs))


def _max(error: torch.Tensor) -> float:
    return error.abs().max().item() if error.numel() else 0.0


def _rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item() if error.numel() else 0.0
