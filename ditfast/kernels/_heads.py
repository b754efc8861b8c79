"""A head's channels in Triton: loaded and stored as rotary pairs, normed, and whose they are in packed qkv."""

from ._triton import jit, tl


@jit
def section_of(pid, HEADS: tl.constexpr, KV_HEADS: tl.constexpr):
    """(0 for q, 1 for k, 2 for v; its first head; its heads) of a program, by threes."""
    section = pid % 3
    first = tl.where(section == 0, 0, HEADS + (section - 1) * KV_HEADS)
    return section, first, tl.where(section == 0, HEADS, KV_HEADS)


@jit
def load_angles(ptr, token, stride, section, T, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """The cosines or sines of each token's pairs; v is not rotated, and its are not read."""
    pair = tl.arange(0, PAIRS)
    turned = (token < tl.where(section < 2, T, 0))[:, None] & (pair < HALF)[None, :]
    return tl.load(ptr + token.to(tl.int64)[:, None] * stride + pair[None, :], mask=turned, other=0.0).to(tl.float32)


@jit
def load_pairs(row_ptr, live, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of each row, as two tiles in fp32."""
    if INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)
        x = tl.load(row_ptr[:, None] + col[None, :], mask=live[:, None] & (col < 2 * HALF)[None, :], other=0.0)
        return tl.split(tl.reshape(x.to(tl.float32), (x.shape[0], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)
        there = live[:, None] & (pair < HALF)[None, :]
        a = tl.load(row_ptr[:, None] + pair[None, :], mask=there, other=0.0).to(tl.float32)
        b = tl.load(row_ptr[:, None] + HALF + pair[None, :], mask=there, other=0.0).to(tl.float32)
        return a, b


@jit
def store_pairs(row_ptr, a, b, live, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        col = tl.arange(0, 2 * PAIRS)
        both = tl.reshape(tl.join(a, b), (a.shape[0], 2 * PAIRS))
        tl.store(row_ptr[:, None] + col[None, :], both, mask=live[:, None] & (col < 2 * HALF)[None, :])
    else:
        pair = tl.arange(0, PAIRS)
        there = live[:, None] & (pair < HALF)[None, :]
        tl.store(row_ptr[:, None] + pair[None, :], a, mask=there)
        tl.store(row_ptr[:, None] + HALF + pair[None, :], b, mask=there)


@jit
def load_parameter(
    ptr,
    default: tl.constexpr,
    head,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """The pairs of these heads of a (HEADS * head_dim) vector, or where it is None a row of `default`."""
    if ptr is None:
        return tl.full([1, PAIRS], default, tl.float32), tl.full([1, PAIRS], default, tl.float32)
    else:
        return load_pairs(ptr + head * (2 * HALF), head < HEADS, HALF, PAIRS, INTERLEAVED)


@jit
def _mean(a, b, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """The mean of each row of pairs, or of all of them."""
    rows = tl.sum(a, 1) + tl.sum(b, 1)
    if WIDTH:
        return tl.sum(rows, 0) / CHANNELS
    else:
        return (rows / CHANNELS)[:, None]


@jit
def norm_pairs(a, b, live, eps, HALF: tl.constexpr, NORM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """The normed pairs and rstd, over the CHANNELS of each row or, with WIDTH, of all rows that are live."""
    if NORM == "layer":
        mean = _mean(a, b, CHANNELS, WIDTH)
        there = live[:, None] & (tl.arange(0, a.shape[1]) < HALF)[None, :]
        a, b = tl.where(there, a - mean, 0.0), tl.where(there, b - mean, 0.0)
    rstd = 1.0 / tl.sqrt(_mean(a * a, b * b, CHANNELS, WIDTH) + eps)
    # Squares beyond fp32's range would make it 0 and the normed pairs too, as if nothing were wrong.
    rstd = tl.where(rstd == 0.0, float("nan"), rstd)
    return a * rstd, b * rstd, rstd


@jit
def norm_pairs_backward(da, db, a, b, rstd, NORM: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """The gradient of what `norm_pairs` was given, by that of its normed pairs a, b."""
    gn = _mean(da * a, db * b, CHANNELS, WIDTH)
    g = 0.0
    if NORM == "layer":
        g = _mean(da, db, CHANNELS, WIDTH)
    return (da - g - a * gn) * rstd, (db - g - b * gn) * rstd
