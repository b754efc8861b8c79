"""What is particular to the gated residual, alone and with the norm: what is kept, what is normed, absent gradients."""

from functools import partial

import pytest
import torch

from ditfast.kernels import adaln_modulate, gate_residual, gate_residual_adaln_modulate


@pytest.fixture
def draw(device, generator):
    return lambda *shape: torch.randn(*shape, device=device, generator=generator).requires_grad_()


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None and t.numel()}


def test_fused_op_keeps_x_new_and_the_modulation_in_place_of_x(draw):
    x, branch, modulation = draw(2, 7, 48), draw(2, 7, 48), draw(2, 6 * 48)
    shift, scale, gate = modulation.chunk(6, dim=1)[2:5]
    x_new, y = gate_residual_adaln_modulate(x, branch, gate, shift, scale, backend="triton")
    kept = storages(y.grad_fn.saved_tensors)
    assert storages([x_new, branch, modulation]) <= kept
    assert not storages([x, y]) & kept
    # mean and rstd are the other two.
    assert len(kept) == 5


def test_chunks_of_one_modulation_are_graded_together(draw):
    x, branch, modulation = draw(2, 7, 48), draw(2, 7, 48), draw(2, 6 * 48)
    shift, scale, gate = modulation.chunk(6, dim=1)[2:5]
    sum(
        out.square().sum() for out in gate_residual_adaln_modulate(x, branch, gate, shift, scale, backend="triton")
    ).backward()
    apart = [t.detach().clone().requires_grad_() for t in (shift, scale, gate)]
    outs = gate_residual_adaln_modulate(x, branch, apart[2], *apart[:2], backend="triton")
    sum(out.square().sum() for out in outs).backward()
    assert torch.equal(modulation.grad[:, 2 * 48 : 5 * 48], torch.cat([t.grad for t in apart], dim=1))


def test_without_a_gate_the_branch_is_not_kept(draw):
    x, branch, shift, scale = draw(2, 7, 48), draw(2, 7, 48), draw(2, 48), draw(2, 48)
    _, y = gate_residual_adaln_modulate(x, branch, None, shift, scale, backend="triton")
    plain = gate_residual(x, branch, None, backend="triton")
    for out in (y, plain):
        assert not storages([x, branch]) & storages(out.grad_fn.saved_tensors)
    (grad,) = torch.autograd.grad(plain.square().sum(), branch)
    assert torch.equal(grad, 2 * plain)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_the_norm_is_of_x_new_as_rounded(dtype, draw):
    """x_new has a small spread about a large mean, so that rounding changes the norm by much more than an ulp."""
    x, branch = (100 + draw(2, 7, 48)).to(dtype), draw(2, 7, 48).to(dtype)
    zeros = torch.zeros(2, 48, device=x.device)
    x_new, y = gate_residual_adaln_modulate(x, branch, None, zeros, zeros, out_dtype=torch.float32, backend="triton")
    expected = torch.nn.functional.layer_norm(x_new.double(), (48,), eps=1e-6)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("used", (0, 1), ids=("x_new", "y"))
def test_an_output_that_is_not_used_has_no_gradient(used, draw):
    inputs = draw(2, 7, 48), draw(2, 7, 48), *(draw(2, 48) for _ in range(3))
    results = {}
    for backend in ("triton", "reference"):
        out = gate_residual_adaln_modulate(*inputs, backend=backend)[used]
        results[backend] = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True)
    for result, expected in zip(*results.values(), strict=True):
        torch.testing.assert_close(result, torch.zeros_like(result) if expected is None else expected)


@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_a_norm_whose_squares_overflow_shows_it(norm, device):
    x = torch.ones(1, 2, 48, device=device)
    x[0, 0, 0] = 2e19
    (x_new, y), plain = (
        op(norm=norm, backend="triton")
        for op in (
            partial(gate_residual_adaln_modulate, x, torch.zeros_like(x), None, None, None),
            partial(adaln_modulate, x, None, None),
        )
    )
    assert torch.equal(x_new, x) and y[0, 0].isnan().all() and plain[0, 0].isnan().all()
    assert y[0, 1].isfinite().all() and plain[0, 1].isfinite().all()
