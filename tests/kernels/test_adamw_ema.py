"""What adamw_ema says of lists that do not match, what it leaves alone, and that one table serves many steps."""

import pytest
import torch

from ditfast.kernels import OPS, _triton, adamw_ema
from ditfast.kernels.adamw_ema import _tables

SPEC = next(spec for spec in OPS if spec.name == "adamw_ema")


@pytest.fixture
def inputs(device, generator):
    return SPEC.make_inputs(SPEC.cases[0], torch.float32, device, generator)


@pytest.mark.parametrize("name, change, says", [
    ("weights", lambda tensors: [], "weights is empty, expected at least one tensor"),
    ("grads", lambda tensors: tensors[1:], "grads has 3 tensors, expected 4"),
    ("exp_avgs", lambda tensors: [t.flatten() for t in tensors], r"exp_avgs\[0\] has shape \(1323,\), expected \(63, "),
    ("exp_avg_sqs", lambda tensors: [t.half() for t in tensors], r"exp_avg_sqs\[0\] has dtype torch.float16, expected"),
    ("grads", lambda tensors: [*tensors[:1], *(t.half() for t in tensors[1:])], r"grads\[1\] has dtype torch.float16"),
    ("copies", lambda tensors: [t.long() for t in tensors], r"copies\[0\] has dtype torch.int64"),
    ("emas", lambda emas: [[t.to("meta") for t in emas[0]]], r"emas\[0\]\[0\] is on meta, steps on"),
    ("emas", lambda emas: emas * 2, "alphas has 1 elements, expected 2"),
    ("weights", lambda tensors: [t.repeat_interleave(2, 0)[::2] for t in tensors], r"weights\[0\] is not contiguous"),
    ("decays", lambda decays: decays[1:], "decays has 3 elements, expected 4"),
    ("steps", lambda steps: steps[1:], "steps has 3 elements, expected 4"),
])  # fmt: skip
def test_lists_that_do_not_match(name, change, says, inputs):
    with pytest.raises(ValueError, match=f"adamw_ema: {says}"):
        adamw_ema(**{**inputs, name: change(inputs[name])})


@pytest.mark.parametrize("backend", ("triton", "torch", "reference"))
def test_gradients_stay_as_they_are(backend, inputs):
    before = [g.clone() for g in inputs["grads"]]
    adamw_ema(**inputs, backend=backend)
    assert all(torch.equal(g, b) for g, b in zip(inputs["grads"], before, strict=True))


@pytest.mark.parametrize("backend", ("triton", "reference"))
def test_autograd_notices_the_change(backend, inputs):
    weight = inputs["weights"][0].requires_grad_()
    loss = weight.square().sum()
    adamw_ema(**inputs, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_tables_are_made_once_and_anew_for_tensors_that_moved(inputs):
    def made():
        before = _tables.cache_info().misses
        adamw_ema(**inputs, backend="triton")
        return _tables.cache_info().misses - before

    assert [made(), made()] == [1, 0]
    inputs["grads"][0] = inputs["grads"][0].clone()
    assert made() == 1


def test_tensors_that_are_not_aligned_have_a_launch_of_their_own(device):
    flat = torch.zeros(1 + 64, device=device)
    inputs = SPEC.make_inputs(next(c for c in SPEC.cases if c.name == "mixed"), torch.bfloat16, device)
    with _triton.recording() as recorded:
        adamw_ema(**inputs, backend="triton")
        inputs["grads"][1] = flat[1 : 1 + 48]
        adamw_ema(**inputs, backend="triton")
    assert [launch.meta.get("WIDE") for launch in recorded] == [None, True, None, True, False]
