"""Whether a training step updates as AdamW and the EMA do: a step at the run's learning rate, against float64.

It begins in the middle of a run, as it were. There the moments are of the gradients' size, all the same number, so that
the update follows small errors of a gradient smoothly (AdamW's first step is the sign of each, also of noise); and the
EMA is so small that its decay and the new weights' share both show in it. AdamW's eps does not show: it matters to far
smaller moments, which the parity of `adamw_ema` has.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.baselines import Baseline
from bench.exactness import Tensors, Truth
from bench.oracles import ditfast_names
from ditfast.config import OptimConfig
from ditfast.train import Trainer

STEP = 11  # the one that is judged
SHRUNK = 2.0**-13  # of the weights: the EMA before it


@dataclass(frozen=True)
class Expected(Mapping[str, Tensor]):
    """In float64 what one step leaves of fp32 weights, from gradients by the same names; each made when asked for.

    AdamW without decay (Loshchilov and Hutter 2019, algorithm 2) from moments of `size` and its square.
    """

    weights: Tensors
    gradients: Tensors
    optim: OptimConfig
    size: float

    KINDS = ("weights", "EMA", "exp_avg", "exp_avg_sq")

    def __getitem__(self, key: str) -> Tensor:
        kind, name = key.split(" of ", 1)
        o, w, g = self.optim, self.weights[name].double(), self.gradients[name].double()
        first = o.beta1 * self.size + (1 - o.beta1) * g
        second = o.beta2 * self.size**2 + (1 - o.beta2) * g.square()
        if kind.startswith("exp"):
            return first if kind == "exp_avg" else second
        moved = first / (1 - o.beta1**STEP) / ((second / (1 - o.beta2**STEP)).sqrt() + o.eps)
        moved, rate = w - o.lr * moved, o.ema_rates[0]
        return moved if kind == "weights" else rate * SHRUNK * w + (1 - rate) * moved

    def __iter__(self) -> Iterator[str]:
        return (f"{kind} of {name}" for name in self.weights for kind in self.KINDS)

    def __len__(self) -> int:
        return len(self.KINDS) * len(self.weights)


class Update:
    """The update that a truth's gradients make of fp32 `weights`, by the same names, under a run's options."""

    def __init__(self, weights: Tensors, truth: Truth, optim: OptimConfig):
        exact = {name: grad for name, grad in truth.exact.items() if name in weights}
        square = sum(float(grad.square().sum()) for grad in exact.values())
        count = sum(grad.numel() for grad in exact.values())
        self.size = 2.0 ** round(math.log2(square / count) / 2)  # of which the square is exact as well
        self.optim = optim
        updated = [Expected(weights, grads, optim, self.size) for grads in (truth.exact, truth.granted())]
        self.truth = Truth(updated[0], updated[1], truth.each)

    @torch.no_grad()
    def judge(self, training: Trainer | Baseline, step: Callable[[], object]) -> str | None:
        """None where `step`, a whole one of `training`, updates within the budgets of exactness.py, else what is wrong.

        It is made twice, once at a rate of zero; the weights and the EMA are as before in the end.
        """
        with torch.enable_grad():
            step()  # so that there are moments, and gradients that were not cleared count twice
        holder = training if isinstance(training, Baseline) else training.optimizer
        before = {name: master.detach().clone() for name, master in holder.masters.items()}
        self._begin(training)
        try:
            with torch.enable_grad():
                step()
            if isinstance(training, Baseline):
                state = {kind: ditfast_names(training.config, v) for kind, v in training.state().items()}
            else:
                state = _state(training)
            found = {f"{kind} of {name}": v for kind, tensors in state.items() for name, v in tensors.items()}
            return self.truth.judge(found) or _stale(holder.parameters, holder.masters)
        finally:
            _set_rate(training, 0.0)
            average = training.ema if isinstance(training, Baseline) else _state(training)["EMA"]
            for name, value in before.items():
                for tensor in (holder.masters[name], holder.parameters[name], average[name]):
                    tensor.copy_(value)

    def _begin(self, training: Trainer | Baseline) -> None:
        _set_rate(training, self.optim.lr)
        if isinstance(training, Baseline):
            state = training.state()
            steps = [one["step"] for one in training.optimizer.state.values()]
        else:
            state, steps = _state(training), [training.optimizer.steps]
        for count in steps:
            count.fill_(STEP - 1)
        for name, average in state["EMA"].items():
            average.copy_(state["weights"][name] * SHRUNK)
            state["exp_avg"][name].fill_(self.size)
            state["exp_avg_sq"][name].fill_(self.size**2)


def _state(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    optimizer = trainer.optimizer
    return {"weights": optimizer.masters, "EMA": next(iter(optimizer.emas.values())), **optimizer.moments}


def _set_rate(training: Trainer | Baseline, lr: float) -> None:
    if isinstance(training, Baseline):
        for group in training.optimizer.param_groups:
            group["lr"] = lr
    else:
        training.optimizer.schedule(0, factor=lr / training.config.optim.lr)


def _stale(parameters: Tensors, masters: Tensors) -> str | None:
    """What is wrong with the weights that a model reads, which are masters or their rounded copies."""
    odd = [name for name, p in parameters.items() if not torch.equal(p, masters[name].to(p.dtype))]
    return f"{odd[0]} ({len(odd)} in all) is not its master, rounded" if odd else None
