"""The gate of whole steps: what passes and what is refused, and what it says."""

import pytest
import torch

from bench.exactness import Truth

GENERATOR = torch.Generator().manual_seed(0)
EXACT = {name: torch.randn(64, dtype=torch.float64, generator=GENERATOR) for name in ("a", "b", "c", "d")}


def off(error: float, **others: float) -> dict[str, torch.Tensor]:
    """EXACT in float32 with so large an RMS error in every tensor, or another in those named."""
    signs = (-1.0) ** torch.arange(64)
    return {name: (exact + others.get(name, error) * signs).float() for name, exact in EXACT.items()}


@pytest.fixture
def truth() -> Truth:
    return Truth(EXACT, off(1e-3))


def test_the_eager_reference_and_what_errs_a_little_more_pass(truth):
    assert truth.judge(off(1e-3)) is None
    assert truth.judge(off(1.9e-3)) is None
    assert truth.judge(off(1e-3, b=2.9e-3)) is None


def test_one_wrong_tensor_is_named(truth):
    assert truth.judge(off(1e-3, b=3.1e-3)) == "the error of b is 3.1 x the eager reference's, allowed 3"


def test_all_a_little_wrong_is_refused(truth):
    assert truth.judge(off(2.1e-3)) == "the error is 2.1 x the eager reference's, allowed 2"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(truth, value):
    results = off(1e-3)
    results["c"][5] = value
    assert "the error of c is inf" in truth.judge(results)


def test_one_rounding_is_allowed_where_the_reference_is_exact():
    exact = {"a": EXACT["a"].bfloat16().double() + 1e-9}
    truth = Truth(exact, exact)
    assert truth.judge({"a": exact["a"].bfloat16()}) is None
    assert truth.judge({"a": exact["a"].float() + 1e-6}) is not None


def test_a_missing_gradient_is_named(truth):
    results = off(0.0)
    del results["d"]
    assert truth.judge(results) == "d (1 in all) are not in both its results and the reference's"


def test_a_tensor_that_the_reference_happens_to_have_exact_may_err_as_others_do():
    truth = Truth(EXACT, off(1e-3, b=1e-7))
    assert truth.judge(off(1e-3)) is None
    assert "the error of b" in truth.judge(off(1e-3, b=3.6e-3))


@pytest.mark.parametrize("luck", [1e-7, 0.0])
def test_what_is_granted_to_others_is_the_usual_error_where_the_reference_is_luckily_exact(luck):
    granted = Truth(EXACT, off(1e-3, b=luck, c=5e-3)).granted()
    errors = {name: (granted[name] - exact).norm() / exact.norm() for name, exact in EXACT.items()}
    usual = sorted(8e-3 / exact.norm() for name, exact in EXACT.items() if name in "ad")[0]
    assert usual * 0.99 < errors["b"] < 5 * usual
    assert granted["c"].sub(off(5e-3)["c"].double()).abs().max() < 1e-12
