"""GELU and SiLU with their derivatives, in fp32, as the kernels compute them.

gelu(x) = x s(z), z = 2 sqrt(2 / pi) (x + 0.044715 x^3), the tanh form (arXiv:1606.08415); silu(x) = x s(x); s is the
sigmoid.
A derivative holds s (1 - s), which is taken from an exponential and not from a rounded s near one.
"""

from ._triton import jit, tl


@jit
def sigmoid_and_slope(z):
    """s(z) and s(z) (1 - s(z))."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e), e / ((1.0 + e) * (1.0 + e))


@jit
def gelu(x):
    """gelu(x)."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@jit
def gelu_and_slope(x):
    """gelu(x) and gelu'(x)."""
    s, slope = sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x * s, s + x * slope * 1.5957691216057308 * (1.0 + 0.134145 * x * x)


@jit
def silu_and_slope(x):
    """silu(x) and silu'(x)."""
    s, slope = sigmoid_and_slope(x)
    return x * s, s + x * slope
