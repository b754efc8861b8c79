"""The terms of a variational bound, elementwise: in plain PyTorch, and the likelihood of a bin for the kernels."""

import math

import torch

from ._triton import jit, tl


def mean_flat(tensor: torch.Tensor) -> torch.Tensor:
    """The mean over all dimensions but the first: (B, ...) -> (B,)."""
    return tensor.flatten(1).mean(dim=1)


def normal_kl(
    mean1: torch.Tensor, logvar1: torch.Tensor, mean2: torch.Tensor | float, logvar2: torch.Tensor | float
) -> torch.Tensor:
    """Elementwise KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))) in nats."""
    difference = logvar1 - logvar2
    inverse2 = logvar2.neg().exp() if isinstance(logvar2, torch.Tensor) else math.exp(-logvar2)
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2) ** 2 * inverse2)


def approx_standard_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation of the standard normal CDF by which published bounds were computed."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, *, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """Elementwise log probability in nats of the bin that holds x (DDPM equation 13).

    Bins are 2/255 wide, x is an 8-bit image scaled to [-1, 1]; the bins at -1 and 1 reach to infinity.
    """
    centered = x - means
    inverse = torch.exp(-log_scales)
    cdf_above = approx_standard_normal_cdf(inverse * (centered + 1 / 255))
    cdf_below = approx_standard_normal_cdf(inverse * (centered - 1 / 255))
    probability = torch.where(x > 0.999, 1 - cdf_below, cdf_above - cdf_below)
    return torch.where(x < -0.999, cdf_above, probability).clamp(min=1e-12).log()


@jit
def bin_log_likelihood(x, centered, logvar):
    """(log p, dlog p/dlogvar) in nats, of the same bins and CDF, x being `centered` above the mean.

    The CDF is S(z) = sigmoid(s (z + c z^3)) with s = 2 sqrt(2 / pi), and a bin has the probability S(u) - S(l) =
    S(u) S(-l) (1 - exp(s (l + c l^3) - s (u + c u^3))): no cancellation, where the difference of CDFs has only that.
    """
    inverse = tl.exp(-0.5 * logvar)
    upper = inverse * (centered + 0.00392156862745098)
    lower = inverse * (centered - 0.00392156862745098)
    width = 0.012515836247888084 * inverse
    # upper^2 + upper lower + lower^2 without infinities of either sign
    squares = 3.0 * (inverse * centered) * (inverse * centered) + 1.5378700499807768e-05 * inverse * inverse
    upper_image = 1.5957691216057308 * upper * (1.0 + 0.044715 * upper * upper)
    lower_image = 1.5957691216057308 * lower * (1.0 + 0.044715 * lower * lower)
    shrink = tl.exp(-width * (1.0 + 0.044715 * squares))
    at_top, at_bottom = x > 0.999, x < -0.999
    inner = tl.where(at_top | at_bottom, 1.0, 1.0 - shrink)
    p = tl.where(at_top, 1.0, tl.sigmoid(upper_image)) * tl.where(at_bottom, 1.0, tl.sigmoid(-lower_image)) * inner

    # Of an argument's image, -2 d/dlogvar; the slopes of z and z^3 are z and 3 z^3.
    above, below = tl.sigmoid(-upper_image), tl.sigmoid(lower_image)
    dupper = 1.5957691216057308 * upper * (1.0 + 0.134145 * upper * upper) * above
    dlower = 1.5957691216057308 * lower * (1.0 + 0.134145 * lower * lower) * below
    dinner = width * (1.0 + 0.134145 * squares) * shrink / inner
    # The exponential is the stronger: where it is 0, so is its product with what may be infinite.
    dupper = tl.where(above == 0.0, 0.0, dupper)
    dlower = tl.where(below == 0.0, 0.0, dlower)
    dinner = tl.where(shrink == 0.0, 0.0, dinner)
    slope = tl.where(at_top, 0.0, dupper) - tl.where(at_bottom, 0.0, dlower)
    slope += tl.where(at_top | at_bottom, 0.0, dinner)
    # Not a maximum, which would turn NaN into a number.
    return tl.log(tl.where(p < 1e-12, 1e-12, p)), tl.where(p < 1e-12, 0.0, -0.5 * slope)
