"""Whether a whole training step or sampling is as right as the reference's: its results against float64.

each tensor    RMS error <= 3 x that of the eager reference under the same precision policy, or of one rounding, or of
               the reference's median tensor: eager sums of a bias gradient lose less than others' sums have to.
               6 x where all is fp32: there the order of a sum alone makes 3 x, and a wrong one, in TF32 say, 1000 x
all together   norm of the error <= 2 x the eager reference's
A small tensor's error is its luck with a few roundings, so the budget is wide for one and narrower for all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ditfast.precision import Precision

EACH, TOGETHER = 3.0, 2.0
EACH_FP32 = 6.0
Tensors = Mapping[str, Tensor]


def each_of(precision: Precision) -> float:
    """The budget of a tensor under a precision policy."""
    return EACH_FP32 if precision == Precision() else EACH


@dataclass(frozen=True)
class Truth:
    """Results by name: in float64, and the eager reference's in the precision that others are judged in.

    each: the budget of a tensor.
    """

    exact: Tensors
    eager: Tensors
    each: float = EACH

    def judge(self, results: Tensors) -> str | None:
        """None for results within the budgets, else what is not."""
        if odd := sorted(self.exact.keys() ^ results.keys()):
            return f"{', '.join(odd[:3])} ({len(odd)} in all) are not in both its results and the reference's"
        errors = {name: _norm(results[name].double() - exact) for name, exact in self.exact.items()}
        allowed = {}
        for name, exact in self.exact.items():
            rounding = _norm(exact.to(results[name].dtype).double() - exact)
            allowed[name] = max(_norm(self.eager[name].double() - exact), rounding)
        usual = self._usual()
        ratios = {n: _ratio(errors[n], max(allowed[n], usual * _norm(x))) for n, x in self.exact.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        if not (ratio := ratios[worst]) <= self.each:
            return f"the error of {worst} is {ratio:.3g} x the eager reference's, allowed {self.each:g}"
        ratio = _ratio(_total(errors), _total(allowed))
        return None if ratio <= TOGETHER else f"the error is {ratio:.3g} x the eager reference's, allowed {TOGETHER:g}"

    def granted(self) -> dict[str, Tensor]:
        """The eager reference's results, each at least as far off as its median tensor is.

        In float64. What is computed of such results, an update say, inherits no tensor's luck as its budget.
        """
        usual, found = self._usual(), {}
        for name, exact in self.exact.items():
            error = self.eager[name].double() - exact
            size = _norm(error)
            if size < usual * _norm(exact):
                error = error * (usual * _norm(exact) / size) if size else usual * exact
            found[name] = exact + error
        return found

    def _usual(self) -> float:
        """The eager reference's relative error in its median tensor."""
        return median(_norm(self.eager[n].double() - x) / (_norm(x) or 1) for n, x in self.exact.items())


def _norm(error: Tensor) -> float:
    return torch.linalg.vector_norm(error).item()


def _total(errors: Mapping[str, float]) -> float:
    return sum(error**2 for error in errors.values()) ** 0.5


def _ratio(error: float, allowed: float) -> float:
    """Infinite for NaN, which compares with nothing; 0 for no error."""
    if error == 0:
        return 0.0
    return error / allowed if allowed and error < float("inf") else float("inf")
