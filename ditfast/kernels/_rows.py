"""What the ops over token rows share: the chunks of a launch, and the sum of the chunks' partial rows.

A gradient of shape (B, D) is a sum over T. A program adds up its chunk of one sample's rows in registers and writes one
partial row; `sum_partials` adds the rows in a fixed order. No atomics: equal bits in every run.
"""

from typing import Any

import torch

from ._triton import jit, launch, rows, tl, two_widths
from .autotune import pick

# Fewer programs than this leave multiprocessors idle, so a program then takes fewer rows. A constant, not the count of
# the chip at hand: the chunks decide the order of the sums, and so the bits.
MIN_PROGRAMS = 264
# (chunks, columns): the widths of DiT are multiples of 128, and tiles of 256 spill on sm_90 (triton 3.9).
SUM_BLOCK = (8, 128)
# As gate_residual's; each partial row is shared by 256 rows, since nothing else is read.
COLUMN_SUMS = (16, 128, 256, 4)


def rows_per_program(tile: int, most: int, programs: int, T: int) -> int:
    """Rows of one sample that a program takes: at most `most`, fewer for more programs, at least a tile.

    `programs` is the number of programs if each took all T rows.
    """
    while most > tile and programs * -(-T // most) < MIN_PROGRAMS:
        most //= 2
    return max(tile, most)


def tiling(
    op: str, stage: str, configs: tuple[tuple[int, ...], ...], shape: torch.Size, *facts: Any
) -> tuple[int, dict[str, int]]:
    """(chunks per sample, constants of the launch) for programs that hold whole rows of a tensor (B, T, D).

    configs: (largest D, rows of a tile, rows of a program, warps), by D; ValueError for a D of 0 or beyond the last.
    facts: what a measured config depends on beside the shape.
    """
    B, T, D = shape
    if not 1 <= D <= configs[-1][0]:
        raise ValueError(f"{op}: D is {D}, the Triton kernels take 1 to {configs[-1][0]}; use backend='reference'")
    pinned = next(config[1:] for config in configs if config[0] >= D)
    tile, most, warps = pick(f"{op}_{stage}", pinned, shape, *facts)
    per_program = rows_per_program(tile, most, B, T)
    main, tail = two_widths(D)
    meta = {"D": D, "MAIN": main, "TAIL": tail, "BLOCK_T": tile, "ROWS": per_program, "num_warps": warps}
    return -(-T // per_program), meta


def block_tiling(config: tuple[int, ...], B: int, T: int, D: int) -> tuple[int, int, dict[str, int]]:
    """(chunks per sample, programs, constants of the launch) for programs that hold some columns of a chunk of rows.

    config: rows of a tile, columns of a tile, rows of a program, warps.
    """
    tile, block_d, most, warps = config
    blocks = -(-D // block_d)
    per_program = rows_per_program(tile, most, B * blocks, T)
    chunks = -(-T // per_program)
    meta = {"D": D, "BLOCK_T": tile, "BLOCK_D": block_d, "ROWS": per_program, "num_warps": warps}
    return chunks, B * chunks * blocks, meta


def laid_out(*tensors: tuple[torch.Tensor | None, int]) -> tuple[list[torch.Tensor | None], list[int]]:
    """(what `rows` makes of each tensor, all strides but the last ones), of tensors given with their rank.

    An absent tensor is None and has strides of 0.
    """
    dense = [None if tensor is None else rows(tensor) for tensor, _ in tensors]
    strides = [(0,) * (rank - 1) if t is None else t.stride()[:-1] for t, (_, rank) in zip(dense, tensors, strict=True)]
    return dense, [stride for each in strides for stride in each]


@jit
def _sum_partials_kernel(
    partial_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    chunks,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    sample = (pid // blocks).to(tl.int64)
    cols = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    sum0 = tl.zeros([BLOCK_D], tl.float32)
    sum1 = tl.zeros([BLOCK_D], tl.float32)
    sum2 = tl.zeros([BLOCK_D], tl.float32)
    for c in range(0, chunks, BLOCK_C):
        chunk = c + tl.arange(0, BLOCK_C)
        live = (chunk < chunks)[:, None] & inside[None, :]
        partial = partial_ptr + (sample * chunks + chunk)[:, None] * (PARTS * D) + cols[None, :]
        sum0 += tl.sum(tl.load(partial, mask=live, other=0.0), 0)
        if PARTS > 1:
            sum1 += tl.sum(tl.load(partial + D, mask=live, other=0.0), 0)
        if PARTS > 2:
            sum2 += tl.sum(tl.load(partial + 2 * D, mask=live, other=0.0), 0)
    tl.store(out0_ptr + sample * D + cols, sum0, mask=inside)
    if PARTS > 1:
        tl.store(out1_ptr + sample * D + cols, sum1, mask=inside)
    if PARTS > 2:
        tl.store(out2_ptr + sample * D + cols, sum2, mask=inside)


@jit
def _column_sums_kernel(
    x_ptr,
    partial_ptr,
    T,
    stride_xt,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    chunk = (pid // blocks).to(tl.int64)
    cols = (pid % blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    total = tl.zeros([BLOCK_D], tl.float32)
    for t in range(0, ROWS, BLOCK_T):
        row = chunk * ROWS + t + tl.arange(0, BLOCK_T)
        live = (row < T)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * stride_xt + cols[None, :], mask=live, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
    tl.store(partial_ptr + chunk * D + cols, total, mask=inside)


def column_sums(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write to out (D), in its dtype, the sums over the rows of x (T, D)."""
    T, D = x.shape
    x = rows(x)
    chunks, programs, meta = block_tiling(COLUMN_SUMS, 1, T, D)
    partial = empty_partials(1, chunks, 1, D, x.device)
    launch(_column_sums_kernel, programs, x, partial, T, x.stride(0), **meta)
    sum_partials(partial, out.view(1, D))


def empty_partials(B: int, chunks: int, parts: int, D: int, device: torch.device) -> torch.Tensor:
    """(B * chunks, parts, D) in float32, not yet written."""
    return torch.empty((B * chunks, parts, D), dtype=torch.float32, device=device)


def sum_partials(partial: torch.Tensor, *outs: torch.Tensor) -> None:
    """Write to outs[i] (B, D), one to three, the sums over the chunks of partial[:, i], in outs[i]'s dtype."""
    B, D = outs[0].shape
    if not B:
        return
    block_c, block_d = SUM_BLOCK
    pointers = (*outs, None, None)[:3]
    meta = {"D": D, "PARTS": len(outs), "BLOCK_C": block_c, "BLOCK_D": block_d}
    launch(_sum_partials_kernel, B * -(-D // block_d), partial, *pointers, partial.shape[0] // B, **meta)
