"""The elementwise terms of the bound against what they stand for."""

import torch

from ditfast.kernels.bound import approx_standard_normal_cdf, discretized_gaussian_log_likelihood, normal_kl


def test_likelihoods_of_all_bins_sum_to_one():
    x = (torch.arange(256).double() / 127.5 - 1)[:, None]
    means, scales = torch.tensor([-1.2, 0.003, 0.7]).double(), torch.tensor([-1.0, -5.0, 0.5]).double()
    nats = discretized_gaussian_log_likelihood(x.expand(256, 3), means=means, log_scales=scales)
    torch.testing.assert_close(nats.exp().sum(0), torch.ones(3).double(), rtol=1e-9, atol=0)


def test_cdf_is_the_published_approximation():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    error = (approx_standard_normal_cdf(x) - torch.special.ndtr(x)).abs().max()
    assert 1e-5 < float(error) < 1e-3


def test_normal_kl_is_that_of_torch():
    mean1, mean2, log1, log2 = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in ((mean1, log1), (mean2, log2)))
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(normal_kl(mean1, log1, mean2, log2), expected)
    torch.testing.assert_close(normal_kl(mean1, log1, 0.0, 0.0), normal_kl(mean1, log1, 0 * mean1, 0 * log1))
