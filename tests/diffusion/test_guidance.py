"""Guidance by one network and by two."""

import pytest
import torch

from ditfast.diffusion import ClassifierFreeGuidance, TwoNetworkGuidance, create_diffusion

X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1, 2, 3])
NULL = 10


class Network:
    """A model whose every output channel tells apart labels, samples and calls; it records its batch sizes."""

    def __init__(self, channels=8):
        self.channels, self.batches = channels, []

    def __call__(self, x, t, y=None):
        self.batches.append(len(x))
        y = torch.full((len(x),), 20) if y is None else y
        wave = torch.sin(torch.arange(1.0, self.channels + 1).view(1, -1, 1, 1) * (1 + y.view(-1, 1, 1, 1)))
        return wave * x.repeat(1, self.channels // x.shape[1], 1, 1) + t.view(-1, 1, 1, 1) / 1000


def at(t):
    return torch.full((3,), t)


@torch.no_grad()
def test_equals_the_golden_guided_forward(golden, dit):
    guided = ClassifierFreeGuidance(dit, 4.0, null_class=NULL)(golden["in/x"], at(500), y=golden["in/y"])
    expected = golden["out/forward_with_cfg_4.0_t500"][:3]
    assert float((guided - expected).abs().max()) <= 3e-6 * float(expected.abs().max())


@pytest.mark.parametrize("channels", [3, 4])
def test_equals_the_first_half_of_forward_with_cfg_bit_for_bit(golden, dit, channels):
    x, y, t = golden["in/x"], golden["in/y"], at(500)
    labels = torch.cat([y, torch.full_like(y, NULL)])
    official = dit.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), labels, 4.0, channels=channels)[:3]
    assert torch.equal(ClassifierFreeGuidance(dit, 4.0, NULL, channels)(x, t, y), official)


@pytest.mark.parametrize(("channels", "guided"), [(3, 3), (None, 4), (1, 1)])
def test_only_the_guided_channels_move(channels, guided):
    out = ClassifierFreeGuidance(Network(), 2.5, NULL, channels)(X, at(0), Y)
    cond, uncond = Network()(X, at(0), Y), Network()(X, at(0), torch.full_like(Y, NULL))
    torch.testing.assert_close(out[:, :guided], (uncond + 2.5 * (cond - uncond))[:, :guided])
    assert torch.equal(out[:, guided:], cond[:, guided:])


def test_a_model_without_sigma():
    assert ClassifierFreeGuidance(Network(4), 2.0, NULL, None)(X, at(0), Y).shape == X.shape


@pytest.mark.parametrize(("t", "batches"), [(99, [3]), (100, [6]), (499, [6]), (500, [3])])
@pytest.mark.parametrize("host", [False, True])
def test_outside_the_interval_only_the_conditional_runs(t, batches, host):
    model = Network()
    guide = ClassifierFreeGuidance(model, 3.0, NULL, interval=(100, 500))
    out = (guide.at_timestep(t) if host else guide)(X, at(t), y=Y)
    assert model.batches == batches
    assert torch.equal(out, Network()(X, at(t), Y)) is (batches == [3])


@pytest.mark.parametrize("t", [99, 100])
def test_at_timestep_reads_nothing_on_the_host(t):
    guide = ClassifierFreeGuidance(lambda x, t, y: torch.cat([x, x], 1), 3.0, NULL, interval=(100, 500)).at_timestep(t)
    out = guide(X.to("meta"), at(t).to("meta"), y=Y.to("meta"))  # of which nothing can be read
    assert out.shape == (3, 8, 2, 2)


def test_interval_holds_for_each_sample():
    guide = ClassifierFreeGuidance(Network(), 3.0, NULL, interval=(100, 500))
    out = guide(X, torch.tensor([50, 100, 600]), Y)
    assert torch.equal(out[[0, 2]], Network()(X, torch.tensor([50, 100, 600]), Y)[[0, 2]])
    assert torch.equal(out[1], ClassifierFreeGuidance(Network(), 3.0, NULL)(X, at(100), Y)[1])


def test_chain_pays_for_guidance_inside_the_interval_only():
    model = Network()
    guide = ClassifierFreeGuidance(model, 3.0, NULL, interval=(100, 500))
    create_diffusion("ddim5").p_sample_loop(guide, X.shape, X, model_kwargs={"y": Y})
    assert model.batches == [3, 3, 6, 6, 3]


@pytest.mark.parametrize(("null_class", "label"), [(None, 20), (NULL, NULL)])
@pytest.mark.parametrize("uncond_channels", [4, 8])
def test_two_networks(null_class, label, uncond_channels):
    cond, uncond = Network(), Network(uncond_channels)
    out = TwoNetworkGuidance(cond, uncond, 0.7, null_class)(X, at(3), Y)
    eps, base = Network()(X, at(3), Y), Network()(X, at(3), torch.full_like(Y, label))
    torch.testing.assert_close(out[:, :4], (1.7 * eps - 0.7 * base)[:, :4])
    assert torch.equal(out[:, 4:], eps[:, 4:])
    assert cond.batches == uncond.batches == [3]


def test_one_network_twice_is_classifier_free_guidance():
    two = TwoNetworkGuidance(Network(), Network(), 1.5, NULL)(X, at(3), Y)
    torch.testing.assert_close(two, ClassifierFreeGuidance(Network(), 2.5, NULL, None)(X, at(3), Y))


def test_weight_zero_is_the_conditional_network():
    torch.testing.assert_close(TwoNetworkGuidance(Network(), Network(), 0.0)(X, at(3), Y), Network()(X, at(3), Y))


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_bad_scales(value):
    with pytest.raises(ValueError, match="scale must be a finite number >= 0"):
        ClassifierFreeGuidance(Network(), value, NULL)
    with pytest.raises(ValueError, match="weight must be a finite number >= 0"):
        TwoNetworkGuidance(Network(), Network(), value)


@pytest.mark.parametrize("interval", [(500, 100), (100, 100), (float("nan"), 3)])
def test_bad_intervals(interval):
    with pytest.raises(ValueError, match="lo < hi"):
        ClassifierFreeGuidance(Network(), 2.0, NULL, interval=interval)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ClassifierFreeGuidance(Network(), 2.0, NULL, channels=0), "at least 1"),
        (lambda: ClassifierFreeGuidance(Network(), 2.0, NULL)(X, at(0), Y.repeat(2)), "3 samples need 3 labels, got 6"),
        (lambda: ClassifierFreeGuidance(Network(12), 2.0, NULL)(X, at(0), Y), r"conditional.*C=4.*2\*C=8"),
        (lambda: TwoNetworkGuidance(Network(), Network(12), 2.0)(X, at(0), Y), "unconditional model returned"),
    ],
)
def test_bad_shapes(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_more_channels_than_there_are_guide_all():
    everything, more = (ClassifierFreeGuidance(Network(), 2.0, NULL, channels=n)(X, at(0), Y) for n in (None, 99))
    assert torch.equal(everything, more)


class Rescaled(ClassifierFreeGuidance):
    """A guidance that does more than mix."""

    def __call__(self, x, t, y, **kwargs):
        return 0.5 * super().__call__(x, t, y, **kwargs)


class Wrapper:
    """What delegates all but the call."""

    def __init__(self, guide):
        self.guide = guide

    def __getattr__(self, name):
        return getattr(self.guide, name)

    def __call__(self, x, t, y):
        return 0.5 * self.guide(x, t, y)


@pytest.mark.parametrize("interval", [None, (200, 700)])
@pytest.mark.parametrize(
    "make",
    [
        lambda interval: Rescaled(Network(), 3.0, NULL, interval=interval),
        lambda interval: Wrapper(ClassifierFreeGuidance(Network(), 3.0, NULL, interval=interval)),
    ],
    ids=["subclass", "wrapper"],
)
def test_sampling_goes_through_a_call_of_its_own(make, interval):
    process = create_diffusion("ddim5")
    guide = make(interval)
    options = {"noise": X, "model_kwargs": {"y": Y}}
    expected = process.ddim_sample_loop(lambda x, t, y: guide(x, t, y), X.shape, **options)
    assert torch.equal(process.ddim_sample_loop(guide, X.shape, **options), expected)
