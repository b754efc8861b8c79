"""What attention makes of its arguments: their dtypes under autocast, scores of -inf, and bad ones."""

import pytest
import torch

from ditfast.kernels import BackendError, attention, attention_qkvpacked

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
