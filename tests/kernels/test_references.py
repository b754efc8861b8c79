"""The references against the modules and formulas that they stand for."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ditfast.kernels import (
    adaln_modulate,
    attention,
    attention_qkvpacked,
    gate_residual,
    gate_residual_adaln_modulate,
    gelu_mlp,
    patchify,
    rms_norm,
    timestep_embedding,
    unpatchify,
)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_adaln_modulate_is_the_official_layernorm_and_modulate(draw):
    x, shift, scale = draw(3, 5, 8), draw(3, 8), draw(3, 8)
    mean = x.sum(-1, keepdim=True) / 8
    var = (x - mean).square().sum(-1, keepdim=True) / 8
    expected = (x - mean) / (var + 1e-3).sqrt() * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(adaln_modulate(x, shift, scale, 1e-3), expected)


def test_default_eps_is_the_official_one(draw):
    x, m = draw(2, 3, 8) * 1e-3, torch.zeros(2, 8, dtype=torch.float64)
    norm = nn.LayerNorm(8, elementwise_affine=False, eps=1e-6)
    torch.testing.assert_close(adaln_modulate(x, m, m), norm(x))


def test_rms_norm_has_eps_inside_the_root_and_no_mean(draw):
    x, weight = draw(3, 5, 8) + 1, draw(8)
    n = x / ((x * x).sum(-1, keepdim=True) / 8 + 0.1).sqrt()
    torch.testing.assert_close(rms_norm(x, eps=0.1), n)
    torch.testing.assert_close(rms_norm(x, weight, 0.1), n * weight)


@pytest.mark.parametrize("norm", ("layer", "rms"))
def test_weight_comes_before_the_modulation_and_what_is_absent_does_nothing(draw, norm):
    x, shift, scale, weight = draw(3, 5, 8), draw(3, 8), draw(3, 8), draw(8)
    n = adaln_modulate(x, None, None, norm=norm)
    expected = (n * weight) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(adaln_modulate(x, shift, scale, norm=norm, weight=weight), expected)
    assert torch.equal(adaln_modulate(x, None, scale, norm=norm), n * (1 + scale[:, None]))


def test_gate_residual_rounds_the_product_in_the_branch_dtype(draw):
    x, branch, gate = draw(2, 3, 8).float(), draw(2, 3, 8).bfloat16(), draw(2, 8).bfloat16()
    x_new = gate_residual(x, branch, gate)
    assert x_new.dtype == torch.float32
    assert torch.equal(x_new, x + (gate[:, None] * branch).float())


def test_fused_op_is_its_two_parts(draw):
    x, branch, gate, shift, scale = draw(2, 3, 8), draw(2, 3, 8), *draw(3, 2, 8)
    x_new, y = gate_residual_adaln_modulate(x, branch, gate, shift, scale, 1e-3, out_dtype=torch.float32)
    assert torch.equal(x_new, gate_residual(x, branch, gate))
    assert torch.equal(y, adaln_modulate(x_new, shift, scale, 1e-3, out_dtype=torch.float32))


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
@pytest.mark.parametrize("scale", (None, 0.3))
def test_attention_is_softmax_of_scaled_products_and_not_causal(draw, backend, scale):
    q, k, v = draw(2, 5, 3, 8), draw(2, 7, 3, 8), draw(2, 7, 3, 8)
    expected = torch.empty_like(q)
    for b in range(2):
        for h in range(3):
            weights = (q[b, :, h] @ k[b, :, h].T * (scale or 8**-0.5)).softmax(-1)
            expected[b, :, h] = weights @ v[b, :, h]
    torch.testing.assert_close(attention(q, k, v, scale=scale, backend=backend), expected)


@pytest.mark.parametrize("backend", ("sdpa", "reference"))
def test_packed_attention_is_attention_of_the_slices(draw, backend):
    qkv = draw(2, 5, 3, 2, 8)
    expected = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], backend=backend)
    assert torch.equal(attention_qkvpacked(qkv, backend=backend), expected)


@pytest.mark.parametrize("lead", ((), (4,), (2, 3)))
def test_gelu_mlp_is_two_linears_and_the_tanh_gelu(draw, lead):
    h, w1, b1, w2, b2 = draw(*lead, 6), draw(10, 6), draw(10), draw(6, 10), draw(6)
    hidden = h @ w1.T + b1
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(gelu_mlp(h, w1, b1, w2, b2), gelu @ w2.T + b2)


def test_timestep_embedding_has_the_golden_values():
    embedding = timestep_embedding(torch.tensor([0, 500]))
    assert embedding.shape == (2, 256) and embedding.dtype == torch.float32
    golden = torch.tensor([-0.883849, 0.945946, 0.998557, -0.467772, 0.324325, 0.053705])
    torch.testing.assert_close(embedding[1, [0, 1, 127, 128, 129, 255]], golden, rtol=0, atol=2e-6)
    assert torch.equal(embedding[0], torch.cat([torch.ones(128), torch.zeros(128)]))


def test_timestep_embedding_of_odd_dim_and_other_dtype():
    even, odd = (timestep_embedding(torch.tensor([3.5]), dim, 100, out_dtype=torch.float64) for dim in (8, 9))
    assert odd.dtype == torch.float64 and torch.equal(odd, F.pad(even, (0, 1)))


@pytest.mark.parametrize(("p", "size"), ((2, (6, 10)), (4, (8, 4)), (1, (3, 2))))
def test_patchify_is_the_strided_convolution(draw, p, size):
    conv = nn.Conv2d(3, 8, p, stride=p).double()
    x, pos_embed = draw(2, 3, *size), draw(1, size[0] * size[1] // p**2, 8)
    expected = conv(x).flatten(2).transpose(1, 2) + pos_embed
    torch.testing.assert_close(patchify(x, conv.weight, conv.bias, pos_embed), expected)


def test_unpatchify_puts_the_official_order_in_place(draw):
    y = draw(2, 3 * 5, 2 * 2 * 4)
    image = unpatchify(y, 2, (3, 5))
    assert image.shape == (2, 4, 6, 10)
    for h, w, p, q, c in ((0, 0, 0, 0, 0), (2, 4, 1, 0, 3), (1, 3, 0, 1, 2)):
        assert torch.equal(image[:, c, 2 * h + p, 2 * w + q], y[:, 5 * h + w, (p * 2 + q) * 4 + c])


def test_autocast_runs_the_linears_in_its_dtype_and_keeps_the_stream(device, generator):
    x = torch.randn(2, 4, 6, 6, device=device, generator=generator)
    weight, bias = torch.randn(8, 4, 2, 2, device=device, generator=generator), torch.zeros(8, device=device)
    pos_embed, modulation = torch.zeros(1, 9, 8, device=device), torch.zeros(2, 8, device=device).bfloat16()
    w1, w2, b1 = (torch.zeros(*shape, device=device) for shape in ((16, 8), (8, 16), (16,)))
    with torch.autocast(device, dtype=torch.bfloat16):
        tokens = patchify(x, weight, bias, pos_embed)
        assert tokens.dtype == torch.float32
        assert torch.equal(tokens, tokens.bfloat16())  # a zero pos_embed keeps the linear's bfloat16 values
        y = adaln_modulate(tokens, modulation, modulation)
        assert y.dtype == torch.float32
        branch = gelu_mlp(y, w1, b1, w2, bias)
        assert branch.dtype == torch.bfloat16
        assert gate_residual(tokens, branch, modulation).dtype == torch.float32


def test_autocast_leaves_the_kernels_alone(device, generator):
    x = torch.randn(2, 3, 48, device=device, generator=generator)
    shift, scale = torch.randn(2, 2, 48, device=device, generator=generator).bfloat16()
    outside = adaln_modulate(x, shift, scale, backend="triton")
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = adaln_modulate(x, shift, scale, backend="triton")
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)


@pytest.mark.parametrize("backend", ("triton", "reference"))
@pytest.mark.parametrize("out_dtype", (None, torch.bfloat16, torch.float32))
def test_out_dtype_is_that_of_the_result(backend, out_dtype, device):
    x, m = torch.zeros(2, 3, 32, device=device, dtype=torch.float16), torch.zeros(2, 32, device=device)
    assert adaln_modulate(x, m, m, out_dtype=out_dtype, backend=backend).dtype == (out_dtype or torch.float16)
