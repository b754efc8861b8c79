"""Whole blocks over the Triton kernels (interpreted where there is no GPU) against the same blocks over PyTorch."""

import copy

import pytest
import torch

from ditfast.kernels._op import Op
from ditfast.kernels.parity import judge
from ditfast.layers import Architecture, DiT
from ditfast.layers.block import DiTBlock, settle

OPS = {"adaln_modulate", "attention_qkvpacked", "gate_residual_adaln_modulate", "gelu_mlp", "gate_residual"}
# Outputs are up to 2.2 in size, where float32 rounds by 1.2e-7, dozens of times in a row; 1e-5 would do for that and
# another 1e-5 is due to the goldens' own float32 timestep frequencies (tests/test_reference.py).
GOLDEN_ROUNDING = 2e-5


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


def results(blocks, x, c, autocast=None):
    """The stream behind blocks that hand their pending residual on, and the gradients of all weights, x and c."""
    leaves = {"x": x.detach().requires_grad_(), "c": c.detach().requires_grad_(), **dict(blocks.named_parameters())}
    pending = (leaves["x"], None, None)
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        for block in blocks:
            pending = block.forward_pending(pending, block.adaLN_modulation(leaves["c"]))
        out = settle(*pending)
    grads = torch.autograd.grad(out.double().square().mean(), list(leaves.values()))
    return {"out": out.detach()} | dict(zip(leaves, grads, strict=True))


DTYPES = {
    "float32": (torch.float32, None),
    "autocast": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}


@pytest.mark.parametrize("block", ("adaln_zero", "adaln"))
@pytest.mark.parametrize("dtype, autocast", DTYPES.values(), ids=DTYPES)
def test_blocks_on_triton_are_within_both_budgets(block, dtype, autocast, device, auto_is):
    torch.manual_seed(0)
    form = Architecture(hidden_size=96, num_heads=2, block=block)
    blocks = torch.nn.ModuleList(DiTBlock(form) for _ in range(2)).to(device, dtype)
    x, c = (torch.randn(shape, device=device).to(dtype) for shape in ((3, 9, 96), (3, 96)))
    auto_is("reference")
    eager = results(blocks, x, c, autocast)
    exact = results(copy.deepcopy(blocks).double(), x.double(), c.double())
    took = auto_is("triton")
    ours = results(blocks, x, c, autocast)
    assert set(took) >= OPS
    # The RMS over the hundreds of values of a bias is itself a draw, uncertain by some 7 %.
    slack = {name: 1.2 for name in exact if name.endswith("bias")}
    assert [verdict for verdict in judge(ours, eager, exact, slack=slack) if not verdict.ok] == []


def test_the_tiny_model_on_triton_equals_the_golden_outputs(tiny, golden, golden_state, device, auto_is):
    model = DiT(**tiny).eval().to(device)
    model.load_state_dict(golden_state)
    took = auto_is("triton")
    with torch.no_grad():
        out = model(*(golden[f"in/{name}"].to(device) for name in "xty"))
    assert set(took) == OPS - {"gate_residual"} | {"patchify", "timestep_embedding", "unpatchify"}
    assert (out.cpu() - golden["out/forward"]).abs().max() <= GOLDEN_ROUNDING
