"""Modulation ahead of the loop: the same samples from less reading, within the bound on bytes, or a word why not."""

import logging

import pytest
import torch

from ditfast.config import PRECISIONS, RunConfig, SampleConfig
from ditfast.layers import DiT
from ditfast.modulation import ModulationTable
from ditfast.sample import LoopNetwork, Network, cycle_labels, draw

CPU = torch.device("cpu")


def network(seed=0, precision="fp32", depth=1):
    """A small network with every weight random, on 4-channel 8 x 8 latents of 5 classes."""
    torch.manual_seed(seed)
    model = DiT(8, 2, 4, hidden_size=32, depth=depth, num_heads=2, num_classes=5)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    return Network(PRECISIONS[precision].apply(model).eval(), PRECISIONS[precision], CPU)


def config(**options):
    """Of sampling, on the linear schedule."""
    return RunConfig(sample=SampleConfig(**{"sampler": "ddim", "steps": 5, "guidance_scale": 2.0} | options))


def both(make, labels, **options):
    """Samples with modulation in each step, and ahead."""
    return [
        draw(make(), config(**options | {"modulation_ahead": ahead}), labels, seed=3).double()
        for ahead in (False, True)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddpm"},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.2, 0.7)},
        {"eta": 1.0, "batch_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("depth", [1, 2])
def test_samples_are_the_same(options, depth):
    """In float64, where only what the products' row counts do to the order of their sums is left."""

    def make():
        made = network(depth=depth)
        made.model.double().stream_dtype = torch.float64
        return made

    within, ahead = both(make, cycle_labels(5, [0, 3, 4], 5), **options)
    torch.testing.assert_close(ahead, within, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sampler", ["ddim", "dpm-solver++", "diffusers:DDIMScheduler", "diffusers:HeunDiscreteScheduler"]
)
def test_every_sampler_computes_it_ahead(sampler, monkeypatch):
    if sampler.startswith("diffusers"):
        pytest.importorskip("diffusers")
    rows, original = [], DiT.modulations
    monkeypatch.setattr(DiT, "modulations", lambda model, t, y: rows.append(t.tolist()) or original(model, t, y))
    draw(network(), config(sampler=sampler), cycle_labels(3, None, 5))
    (at_once,) = rows
    assert len(set(at_once)) == 5 and len(at_once) == 5 * 4, "five steps, for three labels and none"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fast"])
def test_the_networks_error_does_not_grow(precision):
    """Sums in another order round otherwise, but no more: against float64 the error stays what it was."""
    policy, timesteps, labels = PRECISIONS[precision], [0, 250, 700], torch.tensor([4, 1, 1, 5])
    exact = network(depth=2).model.double()
    exact.stream_dtype = None
    made = LoopNetwork(network(precision=precision, depth=2), config().sample)
    made.begin(timesteps, labels)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    errors = {"ahead": 0.0, "within": 0.0}
    for step in reversed(timesteps):
        made.go_to(step)
        t = torch.full((4,), step)
        with torch.no_grad():
            truth = exact(x.double(), t, labels)
            with policy.autocast(CPU):
                within = made.model(x, t, labels)
            errors["ahead"] += (made(x, t, y=labels) - truth).square().sum().item()
            errors["within"] += (within - truth).square().sum().item()
    assert errors["ahead"] <= 1.2**2 * errors["within"] + 1e-10, errors


def test_two_networks_have_a_table_each():
    labels = cycle_labels(3, None, 5)

    def samples(ahead):
        return draw(network(0), config(modulation_ahead=ahead), labels, unconditional=network(1))

    torch.testing.assert_close(samples(True), samples(False), atol=1e-4, rtol=1e-4)


def table(limit, asked, timesteps=(0, 10, 20, 30, 40), classes=(2, 5)):
    """A table of 8-byte rows t + y / 100 that notes how many rows it was asked for."""

    def modulations(t, y):
        asked.append(len(t))
        return (t + y / 100).double()[:, None]

    made = ModulationTable(modulations, num_labels=7, most=2, device=CPU, row_bytes=8, limit=limit)
    made.begin(timesteps, torch.tensor(classes))
    return made


@pytest.mark.parametrize("limit, asked", [(10**6, [10]), (8 * 5, [2, 4, 4]), (1, [2] * 5)])
def test_as_many_steps_as_fit_are_computed_at_once(limit, asked):
    rows: list[int] = []
    made = table(limit, rows)
    for t in (40, 30, 20, 10, 0):
        made.go_to(t)
        torch.testing.assert_close(made(torch.tensor([5, 2, 5]))[:, 0], t + torch.tensor([0.05, 0.02, 0.05]).double())
    assert rows == asked


@pytest.mark.parametrize("label", [0, 3, 6])
def test_a_label_that_was_not_announced_fails(label):
    made = table(10**6, [])
    made.go_to(0)
    with pytest.raises(IndexError):
        made(torch.tensor([label]))


def test_what_calls_read_stays_in_place():
    """A CUDA graph reads it there."""
    made = table(8 * 5, [])
    made.go_to(40)
    now, row = made._now, made._row
    made.go_to(0)
    made.begin([0, 7], torch.tensor([3]))
    made.go_to(7)
    assert made._now is now and made._row is row
    torch.testing.assert_close(made(torch.tensor([3]))[:, 0], torch.tensor([7.03]).double())


def test_more_labels_than_announced_and_calls_before_the_first_step():
    made = table(8, [])
    with pytest.raises(ValueError, match="3 different labels in a loop, but modulation was to be for 2"):
        made.begin([0], torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="begin a loop and go to its step first"):
        made(torch.tensor([2]))


def test_batches_of_the_same_classes_share_a_table(monkeypatch):
    net, calls = network(), []
    real = net.model.modulations
    monkeypatch.setattr(net.model, "modulations", lambda t, y: calls.append(len(t)) or real(t, y))
    draw(net, config(batch_size=3), cycle_labels(9, [1, 2, 4], 5))
    assert calls == [5 * 4], "5 steps, three classes and the null class, once"


@pytest.mark.parametrize("timesteps, labels", [([0, 600], [1, 2]), ([0, 500], [1, 3])])
def test_another_loop_has_another_table(timesteps, labels):
    net = network()
    used, fresh = (LoopNetwork(net, config().sample) for _ in range(2))
    used.begin([0, 500], torch.tensor([1, 2]))
    used.go_to(500)
    x, t, y = torch.ones(2, 4, 8, 8), torch.full((2,), timesteps[1]), torch.tensor(labels)
    for loop in (used, fresh):
        loop.begin(timesteps, y)
        loop.go_to(timesteps[1])
    assert torch.equal(used(x, t, y=y), fresh(x, t, y=y))


def test_with_hooks_each_step_computes_its_own_and_the_log_says_so(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ditfast"), "propagate", True)
    net, calls = network(), []
    expected = draw(net, config(modulation_ahead=False), cycle_labels(2, None, 5))
    net.model.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    with caplog.at_level("INFO", logger="ditfast"):
        assert torch.equal(draw(net, config(), cycle_labels(2, None, 5)), expected)
    assert len(calls) == 5
    assert "modulation is computed in every step: blocks.0 has hooks" in caplog.text
