"""The angles of rotary position embeddings (arXiv:2104.09864) as tables, for `kernels.qk_norm_rope`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def rope_1d(tokens: int, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, head_dim / 2) in float32 of t * theta^(-2 i / head_dim), as in llama and LargeDiT.

    ValueError for an odd head_dim, or tokens that are no count.
    """
    if not isinstance(tokens, int) or tokens < 0:
        raise ValueError(f"tokens is {tokens!r}, expected how many there are")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, expected an even number: channels are rotated in pairs")
    return _table(_angles(tokens, head_dim // 2, theta))


def rope_2d(grid: tuple[int, int], head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (rows * columns, head_dim / 2) in float32, tokens row-major, as in LightningDiT.

    The first half of the pairs turns by the token's row, the second by its column, each as `rope_1d` of half the width.
    ValueError for a head_dim that is no multiple of 4, or a grid that is not two counts.
    """
    if head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}, expected a multiple of 4: half of its pairs is for each direction")
    if not isinstance(grid, Sequence) or len(grid) != 2 or not all(isinstance(n, int) and n >= 0 for n in grid):
        raise ValueError(f"grid is {grid!r}, expected the numbers of rows and columns of tokens")
    height, width = grid
    row, column = (_angles(size, head_dim // 4, theta) for size in grid)
    both = row[:, None].expand(-1, width, -1), column[None].expand(height, -1, -1)
    return _table(torch.cat(both, -1).flatten(0, 1))


def _angles(positions: int, pairs: int, theta: float) -> Tensor:
    """(positions, pairs) in float64."""
    frequency = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.arange(positions, dtype=torch.float64)[:, None] * frequency


def _table(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos().float(), angles.sin().float()


class RotaryEmbedding(nn.Module):
    """The table of a grid of tokens for all blocks, (T, head_dim) with every angle twice, as LightningDiT's files hold.

    kind: "rope_1d" over the flattened tokens, of which no file has a table, or "rope_2d", in the state dict: a file's
    table, of float32 angles, takes the place of ours. It stays in float32 where the model is cast to 16 bits, since
    bfloat16 has cosines to 0.4 % alone.
    """

    def __init__(self, kind: str, grid: tuple[int, int], head_dim: int):
        super().__init__()
        table = rope_2d(grid, head_dim) if kind == "rope_2d" else rope_1d(grid[0] * grid[1], head_dim)
        for name, values in zip(("freqs_cos", "freqs_sin"), table, strict=True):
            self.register_buffer(name, values.repeat_interleave(2, 1), persistent=kind == "rope_2d")

    def forward(self) -> tuple[Tensor, Tensor]:
        """cos and sin (T, head_dim / 2)."""
        return self.freqs_cos[:, ::2].contiguous(), self.freqs_sin[:, ::2].contiguous()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        def moved(table: Tensor) -> Tensor:
            result = fn(table)
            return result if result.itemsize >= 4 else table.to(result.device)

        return super()._apply(moved, recurse)
