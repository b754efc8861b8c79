"""The rotary tables against the two forms in use: complex pairs along the tokens, and rows and columns of a grid."""

import pytest
import torch

from ditfast.kernels import qk_norm_rope
from ditfast.layers.rope import rope_1d, rope_2d


def rotated(x, table, **kwargs):
    """x (B, T, H, head_dim) as q by the op; k and v are one head of zeros."""
    zeros = torch.zeros_like(x[:, :, :1])
    return qk_norm_rope(torch.cat((x, zeros, zeros), 2), cos=table[0], sin=table[1], num_heads=x.shape[2], **kwargs)[
        :, :, : x.shape[2]
    ]


def test_one_dimension_is_the_complex_form_of_llama():
    x = torch.randn(2, 7, 3, 16, generator=torch.Generator().manual_seed(0))
    frequency = 1.0 / (10000.0 ** (torch.arange(0, 16, 2).float() / 16))
    turn = torch.polar(torch.ones(7, 8), torch.outer(torch.arange(7).float(), frequency))
    pairs = torch.view_as_complex(x.unflatten(-1, (8, 2)))
    expected = torch.view_as_real(pairs * turn[None, :, None]).flatten(-2)
    torch.testing.assert_close(rotated(x, rope_1d(7, 16)), expected)


def test_two_dimensions_turn_half_by_row_and_half_by_column():
    x = torch.randn(2, 12, 3, 24, generator=torch.Generator().manual_seed(0))
    by_token = rotated(x, rope_2d((3, 4), 24))
    halves = x.unflatten(1, (3, 4))
    for (row, column), token in zip(((r, c) for r in range(3) for c in range(4)), range(12), strict=True):
        here = halves[:, row, column][:, None].expand(-1, 4, -1, -1)
        by_row = rotated(here[..., :12].contiguous(), rope_1d(4, 12))[:, row]
        by_column = rotated(here[..., 12:].contiguous(), rope_1d(4, 12))[:, column]
        torch.testing.assert_close(by_token[:, token], torch.cat((by_row, by_column), -1))


@pytest.mark.parametrize("interleaved", (True, False))
def test_products_of_q_and_k_depend_on_the_distance_alone(interleaved):
    q, k = torch.randn(2, 1, 1, 1, 32, generator=torch.Generator().manual_seed(0)).expand(-1, -1, 9, -1, -1)
    table = rope_1d(9, 32)
    q, k = (rotated(x, table, interleaved=interleaved)[0, :, 0] for x in (q, k))
    products = q @ k.T
    for shift in range(1, 9):
        torch.testing.assert_close(products[shift:, shift:], products[:-shift, :-shift], rtol=1e-4, atol=1e-4)
    assert (products[0, 1:] - products[0, 0]).abs().min() > 1e-3


def test_angles_of_far_tokens_are_exact():
    cos, _ = rope_1d(2**20, 4)
    exact = torch.tensor(2**20 - 1, dtype=torch.float64) * torch.tensor([1.0, 0.01], dtype=torch.float64)
    torch.testing.assert_close(cos[-1], exact.cos().float(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("make", "says"), (
    (lambda: rope_1d(4, 9), "expected an even number"), (lambda: rope_2d((2, 2), 6), "expected a multiple of 4"),
    (lambda: rope_1d(-1, 8), "tokens is -1"), (lambda: rope_1d(2.5, 8), "tokens is 2.5"),
    (lambda: rope_2d(4, 8), "grid is 4, expected the numbers of rows and columns"),
    (lambda: rope_2d((4, -1), 8), r"grid is \(4, -1\)"),
))  # fmt: skip
def test_widths_and_lengths_that_cannot_be_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()
