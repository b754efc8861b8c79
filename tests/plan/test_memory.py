"""The memory of a plan is what a run really holds, by the storages alive, and performance.md's for DiT-XL/2."""

import gc

import pytest
import torch

from bench.storages import Storages
from ditfast.config import PRECISIONS, OptimConfig
from ditfast.layers import DiT
from ditfast.optimizer import AdamWEMA
from ditfast.plan import Job, Layout, plan_memory, published_model, state
from ditfast.plan.layout import memory_of


@pytest.mark.parametrize("emas", [0, 1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-fast"])
def test_state_is_what_a_run_keeps(precision, emas):
    """Model, optimizer and gradients behind a backward, without autocast's copies, which its end frees."""
    held = PRECISIONS[precision]
    with Storages() as storages:
        torch.manual_seed(0)
        model = held.apply(DiT(input_size=8, in_channels=1, hidden_size=48, depth=2, num_heads=2, num_classes=7))
        optimizer = AdamWEMA(model, OptimConfig(ema_rates=[0.9, 0.99][:emas]), held)
        with held.autocast("cpu"):
            loss = model(torch.randn(2, 1, 8, 8), torch.arange(2), torch.arange(2)).float().square().sum()
        loss.backward()
        del loss
        gc.collect()
    assert optimizer.masters.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    frozen = model.pos_embed.nbytes
    modelled = state(model, held, emas)
    # Step counts, the norms' constants and the like are a few bytes a tensor.
    assert storages.alive() - frozen == pytest.approx(modelled.total - modelled.copies, rel=0.02)


def test_worked_example():
    """performance.md: 46.5 GB of activations at 11 D, about 13.5 GB of state."""
    xl, held = published_model("DiT-XL/2"), PRECISIONS["bf16-fast"]
    rows = {row.policy: row for row in plan_memory(xl, held, 256)}
    assert rows["ops"].activations / 1e9 == pytest.approx(46.5, abs=0.05)
    assert rows["ops"].per_token == 11 * 1152 * 2
    assert state(xl, held).total / 1e9 == pytest.approx(13.5, abs=0.05)
    assert memory_of(Job(xl, held), Layout(1), "ops", 256).total == pytest.approx(62.1e9, abs=0.05e9)


def test_what_is_shared_is_divided():
    xl, held = published_model("DiT-XL/2"), PRECISIONS["bf16-fast"]
    job, modelled = Job(xl, held), state(xl, held)

    def of(*args: object) -> dict[str, float]:
        return vars(memory_of(job, Layout(*args), "ops", 4))

    plain, optimizer, full = of(8), of(8, "optimizer"), of(8, "full")
    assert plain["optimizer"] + plain["emas"] == modelled.optimizer
    assert optimizer["optimizer"] == plain["optimizer"] / 8 and optimizer["emas"] == plain["emas"] / 8
    assert optimizer["weights"] == plain["weights"] and full["weights"] == plain["weights"] / 8
    assert full["gradients"] == plain["gradients"] / 8 and full["buffers"] > 0
    tensor, sequence = of(2, "optimizer", 4), of(2, "optimizer", 1, 4)
    assert tensor["weights"] == plain["weights"] / 4 and sequence["weights"] == plain["weights"]
    for split in (tensor, sequence):
        assert split["optimizer"] == plain["optimizer"] / 8
        assert split["activations"] == plain["activations"] / 4
