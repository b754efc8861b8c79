"""Whole blocks over Triton kernels (interpreted without a GPU): equal to blocks over PyTorch, and what they write."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ditfast.kernels._op import Op
from ditfast.kernels._triton import recording
from ditfast.kernels.parity import judge
from ditfast.layers import Architecture, DiT
from ditfast.layers.architecture import NormForm
from ditfast.layers.attention import Attention
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


class Writes(TorchDispatchMode):
    """What is written inside, as (writer, numbers per token, dtype), down into the raw ops and their launchers.

    Below `least` bytes a token are the statistics of norms and attention, partial sums and, where tokens are many, the
    gradients of weights. A writer is a raw op or, outside of them, an operator of PyTorch's. What a kernel fills shows
    by its allocation.
    """

    def __init__(self, tokens, least):
        super().__init__()
        self.tokens, self.least, self.seen, self.within = tokens, least, [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if func.namespace == "ditfast":
            self.within = func._schema.name.removeprefix("ditfast::")
            key = torch._C.DispatchKey.CUDA if given[0].is_cuda else torch._C.DispatchKey.CPU
            with self:  # to the launcher itself, whose allocations and copies then pass here
                out = func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs or {})
            self.within = None
            return out
        out = func(*args, **kwargs or {})
        before = {t.untyped_storage()._cdata for t in given}
        written = any(argument.alias_info and argument.alias_info.is_write for argument in func._schema.arguments)
        for t in tree_leaves(out):
            new = isinstance(t, torch.Tensor) and (written or t.untyped_storage()._cdata not in before)
            if new and t.nbytes >= self.least * self.tokens:
                self.seen.append((self.within or func._schema.name, t.numel() / self.tokens, t.dtype))
        return out


# What shared/performance.md's tables list, in the order of writing: name, writer, width over D, whether in the stream's
# dtype. Of "bytes": y of a norm, x of one behind a gate; o of attention; GELU's input and output. Of "activation
# memory": qkv and the outputs of attention and MLP. Gradients are of these; GELU's output is computed again for dw2.
NORM = [("x", "gate_residual_adaln_modulate_fwd", 1, True), ("y", "gate_residual_adaln_modulate_fwd", 1, False)]
PRE = ("fc1 pre", "gelu_mlp_fwd", 4, False)
FORWARD = [
    *NORM,
    ("qkv", "aten::addmm", 3, False),
    ("o", "attention_qkvpacked_fwd", 1, False),
    ("attn out", "aten::addmm", 1, False),
    *NORM,
    ("fc2 out", "gelu_mlp_fwd", 1, False),
    PRE,
    ("GELU", "gelu_mlp_fwd", 4, False),
]
NORM_BACKWARD = [
    ("dx", "gate_residual_adaln_modulate_bwd", 1, True),
    ("dbranch", "gate_residual_adaln_modulate_bwd", 1, False),
]
PRE_AGAIN = ("fc1 pre", "gelu_mlp_bwd", 4, False)
BACKWARD = [
    ("dy", "gelu_mlp_bwd", 1, False),
    ("dpre", "gelu_mlp_bwd", 4, False),
    ("GELU", "gelu_mlp_bwd", 4, False),
    *NORM_BACKWARD,
    ("do", "aten::mm", 1, False),
    ("dqkv", "attention_qkvpacked_bwd", 3, False),
    ("dy", "aten::mm", 1, False),
    *NORM_BACKWARD,
]
# The first norm's x is computed again as well, since one kernel makes both; the second's is kept, and y made from it.
Y_AGAIN = ("y", "norm_again_fwd", 1, False)
WRITTEN = {
    "none": (FORWARD, BACKWARD),
    "ops": (FORWARD, [Y_AGAIN, *BACKWARD[:7], *NORM, *BACKWARD[7:]]),
    "mlp": (
        [row for row in FORWARD if row is not PRE],
        [Y_AGAIN, BACKWARD[0], PRE_AGAIN, *BACKWARD[1:7], *NORM, *BACKWARD[7:]],
    ),
    "block": (
        [*FORWARD, ("x", "gate_residual_fwd", 1, True)],
        [*FORWARD, ("x", "gate_residual_fwd", 1, True), ("dbranch", "gate_residual_bwd", 1, False), *BACKWARD],
    ),
}

# The launches of the same, in which a write into memory that is there already would show: a kernel each, and the sum of
# partial rows behind it where it leaves some.
SUM = "sum_partials"
LAUNCHED = ["norm_fwd", "attention_fwd", "norm_fwd", "gelu_mlp_fwd", "gemm"]
MLP_BACKWARD = ["column_sums", SUM, "gelu_mlp_bwd", SUM, "gemm", "gemm", "gemm"]
LAUNCHED_BACKWARD = [*MLP_BACKWARD, "norm_bwd", SUM, "attention", "norm_bwd", SUM]
LAUNCHES = {
    "none": (LAUNCHED, LAUNCHED_BACKWARD),
    "ops": (LAUNCHED, ["norm_fwd", *LAUNCHED_BACKWARD[:10], "norm_fwd", *LAUNCHED_BACKWARD[10:]]),
    "mlp": (
        LAUNCHED,
        ["norm_fwd", *MLP_BACKWARD[:2], "gemm", *LAUNCHED_BACKWARD[2:10], "norm_fwd", *LAUNCHED_BACKWARD[10:]],
    ),
    "block": (
        [*LAUNCHED, "gate_residual_fwd"],
        [*LAUNCHED, "gate_residual_fwd", "gate_residual_bwd", "gate", *LAUNCHED_BACKWARD],
    ),
}


def launches(policy, gated, short):
    """LAUNCHES, with what depends on the block and on attention's form."""
    attention = ["attention_short_bwd"] if short else ["attention_dq", "attention_dkdv"]
    parts = {"attention": attention, "gate": [SUM] if gated else []}
    return [[kernel for name in names for kernel in parts.get(name, [name])] for names in LAUNCHES[policy]]


@pytest.mark.parametrize("policy", WRITTEN)
@pytest.mark.parametrize("dtype, autocast", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gated", (True, False), ids=("adaln_zero", "adaln"))
@pytest.mark.parametrize("T", (251, 263), ids=("short", "long"))
def test_a_block_writes_what_the_tables_list(T, gated, dtype, autocast, policy, device, auto_is):
    """In the middle of a model: behind another block, and in front of one."""
    B, D, compute = 8, 32, autocast or dtype
    form = Architecture(hidden_size=D, num_heads=1, block="adaln_zero" if gated else "adaln")
    block = DiTBlock(form).to(device, dtype)
    block.recompute = policy

    def leaf(kind, *shape):
        return torch.zeros(shape, device=device, dtype=kind, requires_grad=True)

    x, branch, gate = leaf(dtype, B, T, D), leaf(compute, B, T, D), leaf(compute, B, D) if gated else None
    modulation = leaf(compute, B, (6 if gated else 4) * D)
    auto_is("triton")
    with recording() as launched:  # launches are noted, and not made
        with torch.autocast(device, autocast, enabled=autocast is not None), Writes(B * T, D - 4) as forward:
            out = block.forward_pending((x, branch, gate), modulation)
        out = [t for t in out[:2] if t is not None]
        gradients, made = [torch.ones_like(t) for t in out], len(launched)
        wanted = [x, branch, modulation, *(p for n, p in block.named_parameters() if "adaLN" not in n)]
        with Writes(B * T, D - 4) as backward:
            torch.autograd.grad(out, wanted, gradients)
    for writes, rows in zip((forward, backward), WRITTEN[policy], strict=True):
        assert writes.seen == [(writer, width * D, dtype if stream else compute) for _, writer, width, stream in rows]
    names = [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in launched]
    assert [names[:made], names[made:]] == launches(policy, gated, short=T <= 256 and compute.itemsize == 2)


# Numbers a token over N heads, those of qkv, or over the H of q; nothing is split, repeated or joined.
GROUPED = (
    [("aten::addmm", "N"), ("qk_norm_rope_fwd", "N"), ("attention_qkvpacked_fwd", "H"), ("aten::addmm", "H")],
    [("aten::mm", "H"), ("attention_qkvpacked_bwd", "N"), ("qk_norm_rope_bwd", "N"), ("aten::mm", "H")],
)


@pytest.mark.parametrize("T", (251, 263))
def test_attention_of_grouped_heads_repeats_no_keys(T, device, auto_is):
    B, H, H_kv, head_dim = 8, 4, 2, 32
    attention = Attention(H * head_dim, H, H_kv, qk_norm=NormForm("rms")).to(device, torch.bfloat16)
    x = torch.zeros(B, T, H * head_dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    rope = tuple(torch.ones(2, T, head_dim // 2, device=device))
    auto_is("triton")
    with recording() as launched:
        with Writes(B * T, H_kv * head_dim - 4) as forward:
            out = attention(x, rope)
        gradient = torch.ones_like(out)
        with Writes(B * T, H_kv * head_dim - 4) as backward:
            torch.autograd.grad(out, [x, *attention.parameters()], gradient)
    heads = {"N": H + 2 * H_kv, "H": H}
    for writes, rows in zip((forward, backward), GROUPED, strict=True):
        assert [(writer, width) for writer, width, _ in writes.seen] == [(w, heads[n] * head_dim) for w, n in rows]
    names = [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in launched]
    assert [name for name in names if "attention" in name] == ["attention_fwd", "attention_dq", "attention_dkdv"]
