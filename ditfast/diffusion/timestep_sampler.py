"""How training draws its timesteps: uniformly, or by importance, with the weights that keep the loss unbiased."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .schedules import unknown_name

if TYPE_CHECKING:
    from .gaussian import GaussianDiffusion
    from .transport import Transport


class TimestepSampler(ABC):
    """What training draws its timesteps from, and tells its losses."""

    @abstractmethod
    def sample(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Timesteps t (B,) and the weights (B,) fp32 of their losses, both on `device`.

        Args:
            generator: where the randomness comes from, a CPU generator; torch's global one if None.
        """

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:  # noqa: B027
        """Learn from this rank's timesteps (B,) and their unweighted losses (B,); by default, nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to draw the same timesteps from the same generator."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned; ValueError where it comes from another kind or length of sampler."""
        expected = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if given != expected:
            raise ValueError(f"the state of another timestep sampler: expected tensors {expected}, got {given}")


class TransportSampler(TimestepSampler):
    """A transport's times in [0, 1], as it draws them; every weight is 1."""

    def __init__(self, transport: "Transport") -> None:
        self.transport = transport

    def sample(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Times t (B,) fp32, see `Transport.sample_timesteps`, and ones (B,)."""
        t = self.transport.sample_timesteps(batch_size, device, generator)
        return t, torch.ones_like(t)


class ScheduleSampler(TimestepSampler):
    """A distribution p over the timesteps 0 .. T - 1 of a process."""

    @abstractmethod
    def weights(self) -> Tensor:
        """(T,) float64 positive values on the CPU, p up to a factor."""

    def sample(
        self, batch_size: int, device: torch.device | str = "cpu", generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw timesteps t (B,) int64 and importance weights 1 / (T p(t)) (B,) fp32, both on `device`.

        The mean of weight * loss(t) is an unbiased estimate of the mean over uniform t (Nichol and Dhariwal 2021,
        equation 18).

        Args:
            generator: where the randomness comes from, a CPU generator; torch's global one if None.
        """
        p = self.weights()
        p = p / p.sum()
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        weights = 1 / (len(p) * p[t])
        return t.to(device), weights.to(device=device, dtype=torch.float32)


class UniformSampler(ScheduleSampler):
    """Every timestep is as likely, every weight is 1."""

    def __init__(self, diffusion: "GaussianDiffusion") -> None:
        self.num_timesteps = diffusion.num_timesteps

    def weights(self) -> Tensor:
        """(T,) ones."""
        return torch.ones(self.num_timesteps, dtype=torch.float64)


class LossSecondMomentResampler(ScheduleSampler):
    """p(t) proportional to the root mean square of the last losses at t (Nichol and Dhariwal 2021, section 3.3).

    Uniform until every timestep has its whole history. All ranks see all losses, so they hold the same state.

    Args:
        history_per_term: losses kept for each timestep.
        uniform_prob: the part of p that stays uniform, so that no weight is unbounded.
    """

    def __init__(self, diffusion: "GaussianDiffusion", history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        if history_per_term < 1 or not 0 <= uniform_prob <= 1:
            raise ValueError(
                f"history_per_term must be >= 1 and uniform_prob in [0, 1], got {history_per_term} and {uniform_prob}"
            )
        self.uniform_prob = uniform_prob
        self._history = torch.zeros(diffusion.num_timesteps, history_per_term, dtype=torch.float64)
        self._counts = torch.zeros(diffusion.num_timesteps, dtype=torch.int64)

    def weights(self) -> Tensor:
        """(T,) probabilities, or ones before every history is full."""
        steps, length = self._history.shape
        if not bool((self._counts >= length).all()):
            return torch.ones(steps, dtype=torch.float64)
        rms = self._history.square().mean(dim=1).sqrt()
        return rms / rms.sum().clamp(min=1e-300) * (1 - self.uniform_prob) + self.uniform_prob / steps

    def update_with_local_losses(self, local_ts: Tensor, local_losses: Tensor) -> None:
        """Learn from all ranks' timesteps (B,) and unweighted losses (B,), B free per rank; a collective call."""
        pairs = torch.stack([local_ts.detach().double(), local_losses.detach().double()], dim=1)
        if dist.is_available() and dist.is_initialized():
            pairs = _all_gather_rows(pairs)
        pairs = pairs.cpu()
        self.update_with_all_losses(pairs[:, 0].long(), pairs[:, 1])

    def update_with_all_losses(self, ts: Tensor, losses: Tensor) -> None:
        """Put losses (N,) at timesteps (N,) into the histories, each replacing the oldest of its timestep."""
        ts, losses = torch.as_tensor(ts), torch.as_tensor(losses, dtype=torch.float64)
        if not bool(losses.isfinite().all()):
            raise ValueError(f"losses must be finite, got {losses[~losses.isfinite()][:4].tolist()}")
        length = self._history.shape[1]
        order = ts.argsort(stable=True)
        _, group, size = ts[order].unique_consecutive(return_inverse=True, return_counts=True)
        rank = torch.arange(len(ts)) - (size.cumsum(0) - size)[group]
        # Of more losses than a history holds only the last count, so no place is written twice.
        order, rank = order[rank >= size[group] - length], rank[rank >= size[group] - length]
        kept = ts[order]
        self._history[kept, (self._counts[kept] + rank) % length] = losses[order]
        self._counts += torch.bincount(ts, minlength=len(self._counts))

    def state_dict(self) -> dict[str, Tensor]:
        """`history` (T, history_per_term) float64 and `counts` (T,) int64."""
        return {"history": self._history.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        super().load_state_dict(state)
        self._history.copy_(state["history"])
        self._counts.copy_(state["counts"])


def _all_gather_rows(rows: Tensor) -> Tensor:
    """The rows (N_rank, K) of all ranks, in rank order; ranks may hold different numbers of them."""
    world = dist.get_world_size()
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    counts = [int(n) for n in torch.cat(sizes)]
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])


SAMPLERS = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}


def create_named_schedule_sampler(name: str, diffusion: "GaussianDiffusion") -> ScheduleSampler:
    """The sampler called "uniform" or "loss-second-moment" for a process."""
    if name not in SAMPLERS:
        raise unknown_name("timestep sampler", name, SAMPLERS)
    return SAMPLERS[name](diffusion)
