"""What is particular to qk_norm_rope: the packed and the grouped form, v, what it keeps, what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from ditfast.kernels import OPS, qk_norm_rope

SPEC = next(spec for spec in OPS if spec.name == "qk_norm_rope")


@pytest.fixture
def draw(device, generator):
    return lambda *shape: torch.randn(*shape, device=device, generator=generator)


@pytest.mark.parametrize("backend", SPEC.op.backends)
def test_packed_qkv_is_norms_and_rotations_of_its_parts(backend, draw):
    qkv, weights, cos, sin = draw(2, 7, 3, 2, 16), draw(2, 16), draw(7, 8), draw(7, 8)
    out = qk_norm_rope(qkv, *weights, cos=cos, sin=sin, norm="rms", eps=1e-3, backend=backend)
    assert out.shape == qkv.shape and torch.equal(out[:, :, 2], qkv[:, :, 2])
    turn = torch.complex(cos, sin)[:, None]
    for i in range(2):
        normed = F.rms_norm(qkv[:, :, i], (16,), weights[i], 1e-3)
        turned = torch.view_as_real(torch.view_as_complex(normed.unflatten(-1, (8, 2))) * turn).flatten(-2)
        torch.testing.assert_close(out[:, :, i], turned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", SPEC.op.backends)
def test_grouped_heads_are_those_of_the_packed_form(backend, draw):
    """6 heads of q on 2 of k and v: each kind as if there were as many of all."""
    q, k, v = draw(2, 5, 6, 8), draw(2, 5, 2, 8), draw(2, 5, 2, 8)
    weights, table = draw(2, 8), {"cos": draw(5, 4), "sin": draw(5, 4)}
    out = qk_norm_rope(torch.cat((q, k, v), 2), *weights, **table, num_heads=6, norm="layer", backend=backend)
    many = torch.stack((q, k.repeat(1, 1, 3, 1), v.repeat(1, 1, 3, 1)), 2)
    packed = qk_norm_rope(many, *weights, **table, norm="layer", backend=backend)
    expected = torch.cat((packed[:, :, 0], packed[:, :, 1, :2], packed[:, :, 2, :2]), 2)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", SPEC.op.backends)
def test_a_norm_over_the_width_is_one_of_all_heads_together(backend, draw):
    """6 heads of q and 2 of k, each kind normed as a vector of its own width, then rotated head by head."""
    parts, eps = [draw(2, 5, 6 * 8), draw(2, 5, 2 * 8), draw(2, 5, 2 * 8)], 1e-3
    weights, biases = [draw(48), draw(16)], [draw(48), draw(16)]
    table = {"cos": draw(5, 4), "sin": draw(5, 4)}
    normed = [F.layer_norm(p, p.shape[-1:], w, b, eps) for p, w, b in zip(parts, weights, biases, strict=False)]
    before, after = (torch.cat(each, -1).unflatten(-1, (-1, 8)) for each in (parts, [*normed, parts[2]]))
    out = qk_norm_rope(
        *(before, *weights, *biases), **table, num_heads=6, norm="layer", eps=eps, over="width", backend=backend
    )
    expected = qk_norm_rope(after, **table, num_heads=6, backend="reference")
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("over", ("head", "width"))
def test_v_passes_bit_by_bit_both_ways(over, draw):
    qkv = draw(2, 19, 3, 2, 24).bfloat16().requires_grad_()
    out = qk_norm_rope(qkv, norm="layer", over=over, cos=draw(19, 12), sin=draw(19, 12), backend="triton")
    dout = draw(*out.shape).bfloat16()
    (grad,) = torch.autograd.grad(out, qkv, dout)
    assert torch.equal(out[:, :, 2], qkv[:, :, 2]) and torch.equal(grad[:, :, 2], dout[:, :, 2])


def test_nothing_but_the_inputs_is_kept(draw):
    qkv, weights = draw(2, 5, 3, 2, 16).requires_grad_(), draw(2, 16).requires_grad_()
    out = qk_norm_rope(qkv, *weights, norm="rms", backend="triton")
    kept = {t.untyped_storage().data_ptr() for t in out.grad_fn.next_functions[0][0].saved_tensors if t is not None}
    assert kept == {qkv.untyped_storage().data_ptr(), weights.untyped_storage().data_ptr()}


@pytest.mark.parametrize(("change", "says"), (
    ({"num_heads": None}, "num_heads is None and qkv has 4 heads"),
    ({"num_heads": 3}, r"num_heads is 3 and qkv has 4 heads, expected num_heads \+ 2 kv_heads"),
    ({"num_heads": 4}, "num_heads is 4"),
    ({"num_heads": 2.0}, "num_heads is 2.0 and qkv has 4 heads"),
    ({"num_heads": "2"}, "num_heads is '2' and qkv has 4 heads"),
    ({"qkv": torch.zeros(2, 19, 3, 24), "num_heads": True}, "num_heads is True and qkv has 3 heads"),
    ({"norm": "batch"}, "norm is 'batch', expected one of 'none', 'rms', 'layer'"),
    ({"norm": "rms"}, "q_bias is given, but norm 'rms' has none"),
    ({"norm": "none"}, "q_weight is given, but norm 'none' has none"),
    ({"over": "heads"}, "over is 'heads' of norm 'layer', expected 'head', or 'width' of another norm"),
    ({"over": "width", "norm": "none"}, "over is 'width' of norm 'none'"),
    ({"over": "width"}, r"q_weight has shape \(24,\), expected \(48,\) with over='width', 2 of 4 heads being q's; "
     "over='head' takes parameters of one head, 'width' those of all"),
    ({"k_weight": torch.zeros(48), "k_bias": None}, r"k_weight has shape \(48,\), expected \(24,\) with over='head'"),
    ({"sin": None}, "one of cos and sin is None"),
    ({"cos": torch.zeros(19, 24), "sin": torch.zeros(19, 24)}, r"cos has shape \(19, 24\), expected \(T, 12\)"),
    ({"cos": torch.zeros(19, 12, requires_grad=True), "sin": torch.zeros(19, 12)}, "requires a gradient"),
    ({"qkv": torch.zeros(2, 19, 4, 9), "q_weight": None, "k_weight": None, "q_bias": None, "k_bias": None},
     "head_dim 9, expected an even one"),
    ({"qkv": torch.zeros(2, 19, 4, 0), "q_weight": None, "k_weight": None, "q_bias": None, "k_bias": None},
     "head_dim 0, expected an even one"),
))  # fmt: skip
def test_what_does_not_fit_is_refused(change, says):
    inputs = SPEC.make_inputs(SPEC.cases[0], torch.float32, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"qk_norm_rope: .*{says}"):
        qk_norm_rope(**{**inputs, **change})


def test_a_head_beyond_the_kernels_is_an_error(device):
    with pytest.raises(ValueError, match="head_dim is 258, the kernels take up to 256; use backend='reference'"):
        qk_norm_rope(torch.zeros(1, 1, 3, 1, 258, device=device), backend="triton")


def test_a_row_beyond_the_kernels_is_an_error(device):
    qkv = torch.zeros(1, 1, 35, 130, device=device)
    with pytest.raises(ValueError, match="33 of 35 heads for q, of head_dim 130; with over='width'"):
        qk_norm_rope(qkv, num_heads=33, norm="rms", over="width", backend="triton")


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("over", ("head", "width"))
def test_squares_beyond_the_range_are_not_hidden(over, device):
    out = qk_norm_rope(torch.full((1, 1, 3, 2, 8), 1e20, device=device), norm="rms", over=over, backend="triton")
    assert out[:, :, :2].isnan().all() and not out[:, :, 2].isnan().any()


def test_sizes_that_follow_from_others_do():
    """What tune and the benches make of a case: the parameters of a norm over the width keep to its heads."""
    case = next(case for case in SPEC.bench if case.kwargs.get("over") == "width")
    sizes = SPEC.resize(case, {"N": 48, "head_dim": 64}).sizes
    assert (sizes["half"], sizes["q_channels"], sizes["k_channels"]) == (32, 32 * 64, 8 * 64)
    for wrong, says in (({"N": 32}, "32 heads are not 32 of q"), ({"half": 5}, "half follows from the heads")):
        with pytest.raises(ValueError, match=says):
            SPEC.resize(case, wrong)
