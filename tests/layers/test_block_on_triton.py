"""Whole blocks over the Triton kernels (interpreted where there is no GPU) against the same blocks over PyTorch."""

import pytest
import torch

from ditfast.kernels._op import Op
from ditfast.layers.block import DiTBlock, settle


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def auto_is(monkeypatch):
    """auto_is(backend): what "auto" takes from now on, where an op has it; returns the list of ops that took it."""
    choose = Op.choose

    def force(backend: str) -> list[str]:
        took = []

        def chosen(op, asked, *given):
            asked = backend if asked == "auto" and backend in op.backends else asked
            if choose(op, asked, *given) == backend:
                took.append(op.name)
            return choose(op, asked, *given)

        monkeypatch.setattr(Op, "choose", chosen)
        return took

    return force


def outputs_and_gradients(blocks, x, c):
    """The stream behind blocks that hand their pending residual on, and the gradients of all weights, x and c."""
    leaves = [x.detach().requires_grad_(), c.detach().requires_grad_(), *blocks.parameters()]
    pending = (leaves[0], None, None)
    for block in blocks:
        pending = block.forward_pending(pending, block.adaLN_modulation(leaves[1]))
    out = settle(*pending)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("gated", (True, False), ids=("adaLN-Zero", "adaLN"))
@pytest.mark.parametrize("autocast", (False, True), ids=("float32", "autocast"))
def test_blocks_on_triton_equal_blocks_on_pytorch(gated, autocast, device, auto_is):
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(DiTBlock(96, 2, gated=gated) for _ in range(2)).to(device)
    x, c = torch.randn(3, 9, 96, device=device), torch.randn(3, 96, device=device)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        auto_is("reference")
        expected = outputs_and_gradients(blocks, x, c)
        took = auto_is("triton")
        results = outputs_and_gradients(blocks, x, c)
    assert {"adaln_modulate", "attention_qkvpacked", "gate_residual_adaln_modulate", "gate_residual"} <= set(took)
    for result, truth in zip(results, expected, strict=True):
        assert result.dtype == truth.dtype
        error = (result - truth).norm() / truth.norm()
        assert error < (2e-2 if autocast else 1e-5)
