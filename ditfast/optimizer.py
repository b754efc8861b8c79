"""AdamW with fp32 masters, the exponential moving averages, and the low-precision weights that the model reads."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ditfast import kernels
from ditfast.config import ConfigError, OptimConfig, Precision


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies under `decay="matrices"`: to weights, not to biases, norms and tables."""
    return parameter.ndim >= 2 and "embedding_table" not in name


class AdamWEMA:
    """AdamW (Loshchilov & Hutter 2019) and EMAs over the trainable parameters of a model.

    Masters are fp32. Where the precision policy keeps the model's own parameters in a lower dtype, they are a rounded
    copy of the masters, refreshed by every step; else master and parameter are one tensor. Frozen parameters have
    neither master nor EMA.

    Use: before a step, `schedule(step)`; after backward, `update(gradient_norm())`; of a scaled loss, both with the
    inverse scale. None makes the host wait for a GPU, and only `schedule` depends on numbers of the host.
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
        self.decays = [
            config.weight_decay if config.decay == "all" or decays(name, master) else 0.0
            for name, master in self.masters.items()
        ]
        self.moments = {
            field: {n: torch.zeros_like(m, requires_grad=False) for n, m in self.masters.items()}
            for field in ("exp_avg", "exp_avg_sq")
        }
        device = next(iter(self.masters.values())).device
        self.steps = torch.zeros(len(self.masters), device=device)
        # On the device, where a step finds them without the host's waiting or being waited for.
        self._lr = torch.tensor([config.lr], dtype=torch.float32, device=device)
        self._alphas = torch.tensor([1 - rate for rate in self.emas], dtype=torch.float32, device=device)

    def gradients(self) -> list[Tensor]:
        """The gradients in the order of the masters, as backward left them. ValueError for a parameter without."""
        for name, p in self.parameters.items():
            if p.grad is None:
                raise ValueError(f"{name} has no gradient: let the loss depend on it, or freeze it")
        return [p.grad.contiguous() for p in self.parameters.values() if p.grad is not None]

    @torch.no_grad()
    def gradient_norm(self, inverse_scale: Tensor | None = None) -> Tensor:
        """The global L2 norm of the gradients () in fp32, of a loss whose scale is undone."""
        norm = torch.stack(torch._foreach_norm(self.gradients(), 2, torch.float32)).norm()
        return norm if inverse_scale is None else norm * inverse_scale

    def schedule(self, step: int, factor: float = 1.0) -> None:
        """Sets what a 0-based step has: `factor` times the configured learning rate, and the EMAs' rates in warm-up."""
        self._lr.fill_(self.config.lr * factor)
        if self.config.ema_warmup:
            for alpha, rate in zip(self._alphas, self.emas, strict=True):
                alpha.fill_(1 - min(rate, (1 + step) / (10 + step)))

    @torch.no_grad()
    def update(self, norm: Tensor, inverse_scale: Tensor | None = None) -> Tensor:
        """One step from the gradients, whose norm () this is, clipped as configured; then there are no gradients.

        The EMAs follow, e <- rate e + (1 - rate) w for every rate, and the low-precision copies. Returns (1,) fp32: one
        where the norm is not finite, and then nothing has changed.
        """
        factor = inverse_scale
        if self.config.clip_norm > 0:
            factor = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            factor = factor if inverse_scale is None else factor * inverse_scale
        found_inf = (~norm.isfinite()).float().reshape(1)
        names = list(self.masters)
        kernels.adamw_ema(
            list(self.masters.values()),
            self.gradients(),
            [self.moments["exp_avg"][name] for name in names],
            [self.moments["exp_avg_sq"][name] for name in names],
            [[ema[name] for name in names] for ema in self.emas.values()],
            [p for name, p in self.parameters.items() if p is not self.masters[name]],
            steps=self.steps,
            lr=self._lr,
            found_inf=found_inf,
            alphas=self._alphas,
            decays=self.decays,
            grad_factor=None if factor is None else factor.reshape(1),
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            eps=self.config.eps,
        )
        for p in self.parameters.values():
            p.grad = None
        return found_inf

    @torch.no_grad()
    def _refresh(self, source: dict[str, Tensor]) -> None:
        """Rounds `source` into the parameters that are not their own masters."""
        stale = [(p, source[name]) for name, p in self.parameters.items() if p is not self.masters[name]]
        if stale:
            torch._foreach_copy_([p for p, _ in stale], [s for _, s in stale])

    def ema_rate(self, asked: float | None) -> float:
        """`choose_rate` among this optimizer's."""
        return choose_rate(asked, self.emas, "this run")

    @contextmanager
    def ema_weights(self, rate: float | None) -> Iterator[None]:
        """Puts an EMA's weights (see `choose_rate`) into the model for the block's duration."""
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
            f"{name}:{field}": value
            for i, name in enumerate(self.masters)
            for field, value in (("step", self.steps[i].clone()), *((f, m[name]) for f, m in self.moments.items()))
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
            target = self.steps[list(self.masters).index(name)] if field == "step" else self.moments[field][name]
            if value.shape != target.shape:
                shapes = f"{tuple(value.shape)}, this model {tuple(target.shape)}"
                raise ValueError(f"optimizer/{key}: the checkpoint has {shapes}")
            target.copy_(value)
        self._refresh(self.masters)


def choose_rate(asked: float | None, kept: Iterable[float], keeper: str) -> float:
    """The rate of an EMA: the first kept for None, 0 for the raw weights. ConfigError for one that is not kept."""
    kept = list(kept)
    rate = next(iter(kept), 0.0) if asked is None else asked
    if rate and rate not in kept:
        rates = ", ".join(map(str, kept)) or "none"
        raise ConfigError(f"ema {rate}: {keeper} keeps EMAs of rates {rates}, and 0 for the raw weights")
    return rate


def ema_group(rate: float) -> str:
    """Name of an EMA's tensor group in a checkpoint."""
    return f"ema-{rate}"


class LossScaler(torch.amp.GradScaler):
    """torch's dynamic loss scale, for an optimizer that undoes it and finds the overflows itself, on the device."""

    def inverse(self) -> Tensor | None:
        """One over the scale () in fp32; None where it is disabled."""
        if not self.is_enabled():
            return None
        assert self._scale is not None, "scale the loss first"
        return self._scale.double().reciprocal().float()

    def advance(self, found_inf: Tensor) -> None:
        """Lowers the scale after an overflow, raises it after long enough without."""
        if self.is_enabled():
            assert self._scale is not None and self._growth_tracker is not None
            rates = self.get_growth_factor(), self.get_backoff_factor(), self.get_growth_interval()
            torch._amp_update_scale_(self._scale, self._growth_tracker, found_inf, *rates)
