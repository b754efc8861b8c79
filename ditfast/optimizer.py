"""AdamW with fp32 masters, the exponential moving averages, and the low-precision weights that the model reads."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditfast.config import OptimConfig, Precision


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies under `decay="matrices"`: to weights, not to biases, norms and tables."""
    return parameter.ndim >= 2 and "embedding_table" not in name


class AdamWEMA:
    """AdamW (Loshchilov & Hutter 2019) and EMAs over the trainable parameters of a model.

    Masters are fp32. Where the precision policy keeps the model's own parameters in a lower dtype, they are a rounded
    copy of the masters, refreshed by every step; else master and parameter are one tensor. Frozen parameters have
    neither master nor EMA.

    Use: `collect()` after backward (moves the gradients to the masters), then `clip()` or a GradScaler on `adamw`,
    `adamw.step()`, and `finish(step)` for the EMAs and the copies.
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, precision: Precision, fp32: dict[str, Tensor] | None = None
    ):
        """`fp32` gives the masters' values where the model's parameters are already rounded."""
        self.config = config
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, p in self.parameters.items():
            if p.dtype is precision.optimizer:
                self.masters[name] = p
            else:
                source = p if fp32 is None else fp32[name]
                self.masters[name] = source.detach().to(p.device, precision.optimizer, copy=True).requires_grad_()
        self.emas = {
            rate: {n: m.detach().to(precision.ema, copy=True) for n, m in self.masters.items()}
            for rate in config.ema_rates
        }
        split: dict[float, list[Tensor]] = {}
        for name, master in self.masters.items():
            decay = config.weight_decay if config.decay == "all" or decays(name, master) else 0.0
            split.setdefault(decay, []).append(master)
        self.adamw = torch.optim.AdamW(
            [{"params": tensors, "weight_decay": decay} for decay, tensors in split.items()],
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            fused=True,
        )

    def collect(self) -> None:
        """Hands the parameters' gradients to the masters, in the masters' dtype."""
        for name, p in self.parameters.items():
            master = self.masters[name]
            if master is not p and p.grad is not None:
                master.grad = p.grad.to(master.dtype)
                p.grad = None

    def gradient_norm(self) -> Tensor:
        """The global L2 norm of the collected gradients."""
        return torch.nn.utils.get_total_norm([m.grad for m in self.masters.values() if m.grad is not None])

    def clip(self, norm: Tensor) -> None:
        """Scales the collected gradients, whose norm this is, down to the configured norm."""
        if self.config.clip_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(list(self.masters.values()), self.config.clip_norm, norm)

    def set_lr(self, factor: float) -> float:
        """Sets the learning rate to `factor` times the configured one and returns it."""
        lr = self.config.lr * factor
        for group in self.adamw.param_groups:
            group["lr"] = lr
        return lr

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """After an applied update: EMA e <- rate e + (1 - rate) w for every rate, and the low-precision copies."""
        masters = [m.detach() for m in self.masters.values()]
        for rate, ema in self.emas.items():
            effective = min(rate, (1 + step) / (10 + step)) if self.config.ema_warmup else rate
            torch._foreach_lerp_(list(ema.values()), masters, 1 - effective)
        self._refresh(self.masters)

    @torch.no_grad()
    def _refresh(self, source: dict[str, Tensor]) -> None:
        """Rounds `source` into the parameters that are not their own masters."""
        stale = [(p, source[name]) for name, p in self.parameters.items() if p is not self.masters[name]]
        if stale:
            torch._foreach_copy_([p for p, _ in stale], [s for _, s in stale])

    def ema_rate(self, asked: float | None) -> float:
        """The rate of an EMA: the first for None, 0 for the raw weights. ValueError for one that is not kept."""
        rate = next(iter(self.emas), 0.0) if asked is None else asked
        if rate and rate not in self.emas:
            kept = ", ".join(map(str, self.emas)) or "none"
            raise ValueError(f"no EMA of rate {rate}; this run keeps {kept}, and 0 stands for the raw weights")
        return rate

    @contextmanager
    def ema_weights(self, rate: float | None) -> Iterator[None]:
        """Puts an EMA's weights (see `ema_rate`) into the model for the block's duration."""
        rate = self.ema_rate(rate)
        if rate == 0:
            yield
            return
        ema = self.emas[rate]
        self._swap(ema)
        try:
            yield
        finally:
            self._swap(ema)
            self._refresh(self.masters)

    def _swap(self, ema: dict[str, Tensor]) -> None:
        """Exchanges storages: a parameter that is its own master has no other copy of its value."""
        for name, p in self.parameters.items():
            if self.masters[name] is p:
                p.data, ema[name] = ema[name], p.data
        self._refresh(ema)

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Groups of tensors to checkpoint: masters, one group per EMA rate, AdamW's moments and step counts."""
        groups = {"model": {n: m.detach() for n, m in self.masters.items()}}
        groups |= {ema_group(rate): dict(ema) for rate, ema in self.emas.items()}
        groups["optimizer"] = {
            f"{name}:{key}": value
            for name, master in self.masters.items()
            for key, value in self.adamw.state.get(master, {}).items()
        }
        return groups

    @torch.no_grad()
    def load_state_tensors(self, groups: dict[str, dict[str, Tensor]]) -> None:
        """Restores what `state_tensors` gave. Raises ValueError naming what is missing or differs in shape."""
        for group, targets in (("model", self.masters), *((ema_group(r), e) for r, e in self.emas.items())):
            source = groups.get(group)
            if source is None:
                raise ValueError(f"the checkpoint has no group {group!r}, only {', '.join(sorted(groups))}")
            for name, target in targets.items():
                if name not in source or source[name].shape != target.shape:
                    got = tuple(source[name].shape) if name in source else "nothing"
                    raise ValueError(f"{group}/{name}: the checkpoint has {got}, this model {tuple(target.shape)}")
                target.copy_(source[name])
        for key, value in groups["optimizer"].items():
            name, field = key.rsplit(":", 1)
            if name not in self.masters:
                raise ValueError(f"optimizer/{key}: this model has no parameter {name!r}")
            master = self.masters[name]
            # AdamW keeps its step count where it was made; moments live beside the parameter.
            self.adamw.state[master][field] = value.to(master.device, copy=True)
        self._refresh(self.masters)


def ema_group(rate: float) -> str:
    """Name of an EMA's tensor group in a checkpoint."""
    return f"ema-{rate}"
