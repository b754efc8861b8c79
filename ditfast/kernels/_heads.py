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
def load_parameter(ptr, default: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The pairs of a (head_dim) vector as rows of one, `default` everywhere where it is None."""
    if ptr is None:
        return tl.full([1, PAIRS], default, tl.float32), tl.full([1, PAIRS], default, tl.float32)
    else:
        one = tl.arange(0, 1)
        return load_pairs(ptr + one, one == 0, HALF, PAIRS, INTERLEAVED)


@jit
def norm_pairs(a, b, eps, HALF: tl.constexpr, PAIRS: tl.constexpr, NORM: tl.constexpr):
    """The normed pairs and rstd of each row."""
    if NORM == "layer":
        mean = ((tl.sum(a, 1) + tl.sum(b, 1)) / (2 * HALF))[:, None]
        there = (tl.arange(0, PAIRS) < HALF)[None, :]
        a, b = tl.where(there, a - mean, 0.0), tl.where(there, b - mean, 0.0)
    rstd = 1.0 / tl.sqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
    return a * rstd, b * rstd, rstd
