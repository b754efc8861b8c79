"""Matrix products in Triton, for ops that put more into a GEMM than a library does: tiles, the K loop, a plain GEMM.

C = A B, A (M, K) and B (K, N) with any strides, so that every transpose of a linear's forward and backward is a view.
One program per multiprocessor goes through its tiles of C in an order that keeps both operands in the L2. A tile is one
program's, which sums over K in order: equal bits in every run, on any grid. From sm_90 on operands come by TMA where it
can address them, and the loads of a tile start under the epilogue of the one before.
Products of bfloat16 and float16 run on the tensor cores, those of fp32 are IEEE unless PyTorch's setting asks for TF32
(`dot_precision`); all are summed in fp32.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ._triton import capability, descriptor, jit, launch, tl
from .autotune import pick
from .tf32 import dot_precision, tf32_fact


class Tiles(NamedTuple):
    """Sizes of a tile, rows of tiles that share columns of B, stages of the pipeline, warps."""

    m: int
    n: int
    k: int
    group: int
    stages: int
    warps: int

    def over(self, M: int, N: int) -> int:
        """How many there are of an (M, N) matrix."""
        return -(-M // self.m) * -(-N // self.n)


# Not measured on a chip yet; chosen so that nothing spills on sm_80, sm_90 and sm_100, and
# - WIDE reads 3 operand elements for 256 products, where SQUARE reads 4; its sums take 128 registers a thread, which
#   leaves no room for another tile in the epilogue, and with the epilogue's buffer its 3 stages fill 180 of 227 KB;
# - SQUARE idles less where tiles are few or N is no multiple of 256;
# - PLAIN is for loads without TMA, whose pointers take registers: half as many of them at once, in 4 stages;
# - TF32 is PLAIN for operands of four bytes; with the fourth stage gelu_mlp's forward would spill on sm_100;
# - NARROW and PLAIN_NARROW are for epilogues that hold more tiles than there is room for;
# - EXACT is float32 without tensor cores, sums of 16 registers a thread;
# - SMALL is for fewer rows or columns than half a tile, and for the interpreter, which is slow.
WIDE = Tiles(128, 256, 64, 8, 3, 8)
SQUARE = Tiles(128, 128, 64, 8, 3, 8)
PLAIN = Tiles(128, 128, 32, 8, 4, 8)
TF32 = Tiles(128, 128, 32, 8, 3, 8)
NARROW = Tiles(128, 64, 64, 8, 2, 8)
PLAIN_NARROW = Tiles(128, 64, 32, 8, 4, 8)
EXACT = Tiles(64, 64, 16, 8, 2, 8)
SMALL = Tiles(64, 32, 32, 8, 2, 4)
WIDE_GAIN = 1.1


def tiles_for(M: int, N: int, *operands: torch.Tensor, further: int = 0, kernel: str = "gemm") -> Tiles:
    """The tiles of an (M, N) product, pinned or measured; the kernel's epilogue holds `further` beside the sums."""
    pinned = _pinned(M, N, operands, further)
    facts = (*operands, further, *map(_is_turned, operands), *tf32_fact(operands[0].dtype))
    return Tiles(*pick(kernel, pinned, *facts))


def _pinned(M: int, N: int, operands: Sequence[torch.Tensor], further: int) -> Tiles:
    if min(M, N) <= 64:
        return SMALL
    if operands[0].dtype == torch.float32:
        if dot_precision(torch.float32) == "ieee":
            return EXACT
        return PLAIN_NARROW if further or len(operands) > 2 else TF32
    if not _by_tma(operands):
        return PLAIN_NARROW if further else PLAIN
    if further > 1:
        return NARROW
    # Columns of a tile that the busiest multiprocessor goes through, a measure of time.
    wide, square = (-(-t.over(M, N) // multiprocessors(operands[0].device)) * t.n for t in (WIDE, SQUARE))
    return SQUARE if further or wide > WIDE_GAIN * square else WIDE


def multiprocessors(device: torch.device) -> int:
    """Those of the GPU, or of an H100 where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@jit
def tile_at(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile: GROUP rows of tiles go column by column."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return (first + within % size) * BLOCK_M, within // size * BLOCK_N


@jit
def multiply(
    acc,
    a,
    b,
    m0,
    n0,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """acc + A B for the rows of A from m0 and the columns of B from n0; a and b are descriptors or pointers."""
    if TMA:
        for k0 in range(0, K, BLOCK_K):
            a_tile = a.load([k0, m0]).T if A_TURNED else a.load([m0, k0])
            b_tile = b.load([n0, k0]).T if B_TURNED else b.load([k0, n0])
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    else:
        m, n, k = m0 + tl.arange(0, acc.shape[0]), n0 + tl.arange(0, acc.shape[1]), tl.arange(0, BLOCK_K)
        a += m.to(tl.int64)[:, None] * stride_am + k.to(tl.int64)[None, :] * stride_ak
        b += k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
        for k0 in range(0, K, BLOCK_K):
            inside = k < K - k0
            a_tile = tl.load(a, mask=(m < M)[:, None] & inside[None, :], other=0.0)
            b_tile = tl.load(b, mask=inside[:, None] & (n < N)[None, :], other=0.0)
            acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
            a += tl.cast(stride_ak, tl.int64) * BLOCK_K
            b += tl.cast(stride_bk, tl.int64) * BLOCK_K
    return acc


@jit
def halves(acc):
    """The left and the right columns: an epilogue that takes them in turn holds half as much at a time."""
    both = tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2))
    return tl.split(tl.permute(both, (0, 2, 1)))


@jit
def _gemm_kernel(
    c_ptr,
    bias_ptr,
    M,
    N,
    K,
    stride_bias,
    a,
    stride_am,
    stride_ak,
    b,
    stride_bk,
    stride_bn,
    a2,
    stride_a2m,
    stride_a2k,
    b2,
    stride_b2k,
    stride_b2n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    TMA: tl.constexpr,
    A_TURNED: tl.constexpr,
    B_TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=TMA):
        m0, n0 = tile_at(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        acc = multiply(
            *(acc, a, b, m0, n0, M, N, K, stride_am, stride_ak, stride_bk, stride_bn),
            *(BLOCK_K, TMA, A_TURNED, B_TURNED, PRECISION),
        )
        if a2 is not None:
            acc = multiply(
                *(acc, a2, b2, m0, n0, M, N, K, stride_a2m, stride_a2k, stride_b2k, stride_b2n),
                *(BLOCK_K, TMA, A_TURNED, B_TURNED, PRECISION),
            )
        m, n = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, BLOCK_N)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + n.to(tl.int64) * stride_bias, mask=n < N, other=0.0).to(tl.float32)[None, :]
        at = (m - m0)[:, None] * N + n[None, :]
        tl.store(c_ptr + tl.cast(m0, tl.int64) * N + at, acc, mask=(m < M)[:, None] & (n < N)[None, :])


def gemm(c: torch.Tensor, *pairs: tuple[torch.Tensor, torch.Tensor], bias: torch.Tensor | None = None) -> None:
    """Write to c (M, N), contiguous, in its dtype, A B + bias, or A B + A2 B2 + bias for two pairs; bias (N) or None.

    A (M, K) and B (K, N) are of one dtype.
    """
    M, N = c.shape
    K = pairs[0][0].shape[1]
    if not K:
        c.zero_()
        return
    tiles = tiles_for(M, N, *(operand for pair in pairs for operand in pair))
    args, meta = operands(tiles, *pairs)
    stride_bias = 0 if bias is None else bias.stride(0)
    pad = (None, 0, 0, None, 0, 0) if len(pairs) == 1 else ()
    launch(_gemm_kernel, programs(tiles, M, N, c.device), c, bias, M, N, K, stride_bias, *args, *pad, **meta)


def programs(tiles: Tiles, M: int, N: int, device: torch.device) -> int:
    """One per multiprocessor, no more than tiles."""
    return min(tiles.over(M, N), multiprocessors(device))


def operands(tiles: Tiles, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """(operand, its two strides) of each A and B in turn as `multiply` takes them, and the constants of the launch."""
    matrices = [operand for pair in pairs for operand in pair]
    turned = [_is_turned(matrix) for matrix in matrices]
    tma = _by_tma(matrices)
    args: list[Any] = []
    for i, matrix in enumerate(matrices):
        box = (tiles.k, tiles.n) if i % 2 else (tiles.m, tiles.k)
        if tma:
            args += (descriptor(matrix.T, box[::-1]) if turned[i] else descriptor(matrix, box), 0, 0)
        else:
            args += (matrix, *matrix.stride())
    return args, {
        **{"BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k, "GROUP": tiles.group},
        # Strides say it all where there is no TMA: one binary fewer.
        **{"TMA": tma, "A_TURNED": tma and turned[0], "B_TURNED": tma and turned[1]},
        "PRECISION": dot_precision(matrices[0].dtype),
        **{"num_stages": tiles.stages, "num_warps": tiles.warps},
    }


def _is_turned(matrix: torch.Tensor) -> bool:
    return matrix.stride(1) != 1


def _by_tma(matrices: Any) -> bool:
    """Whether TMA can address them all, those of a side in one layout: dense rows or columns, 16-byte aligned."""
    if capability(matrices[0].device) < 90 or matrices[0].dtype.itemsize != 2:
        return False
    for i, matrix in enumerate(matrices):
        dense = matrix.T if _is_turned(matrix) else matrix
        aligned = dense.stride(1) == 1 and dense.stride(0) % 8 == 0 and dense.data_ptr() % 16 == 0
        if not aligned or dense.stride(0) < dense.shape[1] or _is_turned(matrix) != _is_turned(matrices[i % 2]):
            return False
    return all(matrix.numel() for matrix in matrices)


def matrix(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """(..., N) as (rows, N), in dtype; a view where its strides allow."""
    return tensor.to(dtype or tensor.dtype).reshape(-1, tensor.shape[-1])


def linear_dtype(x: torch.Tensor, *weights: torch.Tensor) -> torch.dtype:
    """The dtype that a linear computes in: what autocast says, else the widest."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype = x.dtype
    for weight in weights:
        dtype = torch.promote_types(dtype, weight.dtype)
    return dtype


def library_on_gpu(device: torch.device, dtype: torch.dtype, inputs: Any) -> str:
    """What "auto" takes for an MLP: the library's GEMMs on a GPU until Triton's are measured, else PyTorch's form."""
    return "gemm" if device.type == "cuda" else "reference"
