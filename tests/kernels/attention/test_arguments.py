"""What attention makes of its arguments: their dtypes under autocast, scores of -inf, and bad ones."""

import pytest
import torch

from ditfast.kernels import BackendError, attention, attention_qkvpacked, qk_norm_rope

BACKENDS = ("triton", "sdpa", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", ((torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32)))
def test_autocast_gives_its_dtype_and_gradients_of_the_inputs(backend, given, device, generator):
    draws = [torch.randn(2, 9, 2, 32, device=device, generator=generator) for _ in range(3)]
    q, k, v = (draw.to(dtype).requires_grad_() for draw, dtype in zip(draws, given, strict=True))
    with torch.autocast(device, torch.bfloat16):
        o = attention(q, k, v, backend=backend)
        packed = attention_qkvpacked(torch.stack(draws, 2), backend=backend)
        exact = attention(*(draw.double() for draw in draws), backend="sdpa")
    assert o.dtype == packed.dtype == torch.bfloat16 and exact.dtype == torch.float64
    assert [grad.dtype for grad in torch.autograd.grad(o.float().sum(), (q, k, v))] == list(given)
    torch.testing.assert_close(o.double(), exact, atol=0.02, rtol=0.02)
    torch.testing.assert_close(packed.double(), exact, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("infinite", (slice(0, 64), slice(64, 128), slice(128, 130)))
def test_keys_with_a_score_of_minus_infinity_weigh_nothing(backend, infinite, device, generator):
    q = torch.ones(2, 3, 2, 72, device=device)
    k, v = (torch.randn(2, 130, 2, 72, device=device, generator=generator) for _ in range(2))
    k[:, infinite] = -torch.inf
    rest = torch.tensor([i for i in range(130) if not infinite.start <= i < infinite.stop], device=device)
    expected = attention(q, k[:, rest], v[:, rest], backend="reference")
    torch.testing.assert_close(attention(q, k, v, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kv_heads", (1, 2))
def test_grouped_heads_read_the_same_as_repeated_ones(backend, kv_heads, device, generator):
    q, k, v = (torch.randn(2, 9, H, 32, device=device, generator=generator) for H in (6, kv_heads, kv_heads))
    many = [q] + [torch.stack([x[:, :, h // (6 // kv_heads)] for h in range(6)], 2) for x in (k, v)]
    expected = attention(*many, backend=backend)
    torch.testing.assert_close(attention(q, k, v, backend=backend), expected)
    packed = attention_qkvpacked(torch.cat((q, k, v), 2), num_heads=6, backend=backend)
    torch.testing.assert_close(packed, expected)
    as_many = attention_qkvpacked(torch.cat(many, 2), num_heads=6, backend=backend)
    assert torch.equal(as_many, attention_qkvpacked(torch.stack(many, 2), backend=backend))


@pytest.mark.parametrize("kv_heads", (0, 4, 5, 12))
def test_heads_of_k_that_do_not_divide_those_of_q_are_an_error(kv_heads):
    q, k = torch.ones(1, 4, 6, 32), torch.ones(1, 4, kv_heads, 32)
    with pytest.raises(ValueError, match=f"attention: q has 6 heads and k {kv_heads}, expected .* a multiple"):
        attention(q, k, k)


HEADS = ((6, 14), (6, 13), (6, 6), (6, 30), (0, 4), (6.0, 10), ("6", 10), (True, 3), (None, 3))


@pytest.mark.parametrize(("num_heads", "N"), HEADS)
def test_packed_heads_that_do_not_add_up_are_an_error(num_heads, N):
    with pytest.raises(ValueError, match=f"num_heads is {num_heads!r} and qkv has {N} heads, expected num_heads"):
        attention_qkvpacked(torch.ones(1, 4, N, 32), num_heads=num_heads)


@pytest.mark.parametrize("op", (attention_qkvpacked, qk_norm_rope))
def test_heads_given_beside_as_many_of_each_are_those_or_an_error(op, generator):
    qkv = torch.randn(1, 4, 3, 2, 32, generator=generator)
    assert torch.equal(op(qkv, num_heads=2), op(qkv))
    for num_heads in (3, 2.0, "2"):
        with pytest.raises(ValueError, match=rf"num_heads is {num_heads!r} and qkv \(B, T, 3, H, head_dim\) has H=2"):
            op(qkv, num_heads=num_heads)
    with pytest.raises(ValueError, match=r"num_heads is True and qkv \(B, T, 3, H, head_dim\) has H=1"):
        op(qkv[:, :, :, :1], num_heads=True)


@pytest.mark.parametrize("scale", ("x", 0.0, -1.0, float("inf"), float("nan")))
def test_a_scale_that_is_no_positive_number_is_an_error(scale):
    q = torch.ones(1, 4, 2, 32)
    with pytest.raises(ValueError, match=r"attention: scale is .*, expected a (positive|finite) number"):
        attention(q, q, q, scale=scale)


def test_a_head_dim_of_0_is_an_error():
    q = torch.ones(1, 4, 3, 2, 0)
    with pytest.raises(ValueError, match="attention: head_dim is 0, expected at least 1"):
        attention(q[:, :, 0], q[:, :, 1], q[:, :, 2])
    with pytest.raises(ValueError, match="attention_qkvpacked: head_dim is 0, expected at least 1"):
        attention_qkvpacked(q)


def test_a_library_on_a_cpu_asks_for_a_gpu_before_an_install():
    q = torch.ones(1, 4, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="'flash-attn-2' cannot run: it needs tensors on a GPU, these are on cpu"):
        attention(q, q, q, backend="flash-attn-2")
