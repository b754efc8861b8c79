"""Steps that compute the right gradients and do something else with them are refused before they are timed."""

from dataclasses import replace

import pytest
import torch

from bench.exactness import Truth
from bench.rows import DITFAST, EAGER
from bench.suites.model import Steps, TrainingJob
from bench.training import TINY, random_batch, trainer_for
from bench.update import Expected, Update
from ditfast.config import OptimConfig
from ditfast.distributed import World
from ditfast.train import Trainer

CPU = torch.device("cpu")
JOB = TrainingJob("tiny", 64, 2, "fp32", CPU, compile=False)


def without_update(trainer):
    norm = trainer.optimizer.gradient_norm()
    for p in trainer.optimizer.parameters.values():
        p.grad = None
    return norm, torch.zeros(1)


def without_average(trainer, update=Trainer._update):
    averages = next(iter(trainer.optimizer.emas.values()))
    before = [ema.clone() for ema in averages.values()]
    result = update(trainer)
    for ema, value in zip(averages.values(), before, strict=True):
        ema.copy_(value)
    return result


def without_copies(trainer, update=Trainer._update):
    parameters = trainer.optimizer.parameters
    before = [p.detach().clone() for p in parameters.values()]
    result = update(trainer)
    for p, value in zip(parameters.values(), before, strict=True):
        p.data.copy_(value)
    return result


@pytest.mark.parametrize(
    ("update", "precision", "told"),
    [
        (without_update, "fp32", "the error of EMA"),
        (without_average, "fp32", "the error of EMA"),
        (without_copies, "bf16-fast", "is not its master, rounded"),
    ],
)
def test_a_step_that_does_not_update_is_refused(measured, update, precision, told, monkeypatch):
    monkeypatch.setattr(Trainer, "_update", update)
    rows = measured(replace(JOB, precision=precision))
    assert told in rows[DITFAST].extra["refused"] and rows[EAGER].ms


def test_a_peer_whose_average_stays_is_refused(measured, monkeypatch):
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda *_: None)
    rows = measured(JOB)
    assert "the error of EMA" in rows[EAGER].extra["refused"] and rows[DITFAST].ms and rows["fast-DiT"].ms


@pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
def test_a_judged_run_is_as_before(precision):
    with trainer_for(TINY, 2, precision, World(0, 1, CPU)) as trainer:
        steps = Steps(trainer, random_batch(TINY, 2, CPU))
        before = [p.detach().clone() for p in trainer.optimizer.parameters.values()]
        average = next(iter(trainer.optimizer.emas.values()))
        assert [steps.check(name) for name in (DITFAST, EAGER, "fast-DiT")] == [None] * 3
        trainer.learn(*steps.batch)
        for p, old, (name, master) in zip(
            trainer.optimizer.parameters.values(), before, trainer.optimizer.masters.items(), strict=True
        ):
            assert torch.equal(p, old) and torch.equal(average[name], master), name


@pytest.mark.parametrize(("error", "passes"), [(2e-6, True), (2e-5, False)])
def test_a_gradient_that_the_reference_happens_to_have_exact_makes_no_budget_of_its_second_moment(error, passes):
    """One far above the others' size, so that its moment, unlike theirs, is its own square."""
    generator, off, sizes = torch.Generator().manual_seed(0), (-1.0) ** torch.arange(32), {"d": 1e3}
    exact = {n: sizes.get(n, 1.0) * torch.randn(32, dtype=torch.float64, generator=generator) for n in "abcd"}
    eager = {n: x if n == "d" else x * (1 + 1e-6 * off) for n, x in exact.items()}
    update = Update(dict.fromkeys("abcd", torch.zeros(32)), Truth(exact, eager), OptimConfig())
    found = Expected(
        update.truth.exact.weights, {n: x * (1 + error * off) for n, x in exact.items()}, OptimConfig(), update.size
    )
    assert (update.truth.judge({name: v.float() for name, v in found.items()}) is None) == passes
