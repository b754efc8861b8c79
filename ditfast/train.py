"""The training loop: one class whose `step` is the algorithm and whose `run` is the life of a run around it."""

import dataclasses
import fcntl
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ditfast import checkpoint, convert, kernels
from ditfast.build import build_data, build_model, build_process, predictor, resolve_model
from ditfast.config import ConfigError, RunConfig, config_from, differences, save_config
from ditfast.cuda_graph import CudaGraph, check_cuda_graph
from ditfast.data import Loader
from ditfast.distributed import World
from ditfast.layers import count_parameters, training_flops
from ditfast.logs import LossWindow, Meter, Recorder, log, peak_flops, peak_memory
from ditfast.optimizer import AdamWEMA, LossScaler
from ditfast.reproducibility import (
    deterministic_algorithms,
    generator_for,
    measured_configs,
    restore_rng,
    rng_tensors,
    seed_everything,
)
from ditfast.sample import LoopNetwork, Network, prepare, preview
from ditfast.stopping import Interrupted, stop_requests

# The options that a checkpoint cannot go on without, and the further ones that decide a run's numbers.
IDENTITY = ("process", "model.", "diffusion.", "transport.", "optim.ema_rates")
NUMBERS = (*IDENTITY, "seed", "data.kind", "data.flip", "optim.", "train.batch_size", "train.precision")
SAMPLING_ALONE = "transport.sample_eps"
SMALLEST_SCALE = 2.0**-14  # a loss scale below it means that the forward itself overflows


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and which checkpoint is good."""


def train(config: RunConfig) -> Path:
    """Trains to `config.train.steps`, from the newest sound checkpoint in `config.out` on. Returns that directory.

    Under torchrun every process calls this. Raises ConfigError, DataError, CheckpointError or TrainingError with a
    message for the user, and Interrupted after Ctrl-C or SIGTERM.
    """
    with (
        World.join(config.device) as world,
        deterministic_algorithms(config.deterministic),
        measured_configs(config.tuned),
    ):
        trainer = Trainer(config, world)
        try:
            stopped = trainer.run()
        except OSError as error:
            reason = f"stopped after step {trainer.step_done}: {error}; {trainer.good_checkpoint()}"
            raise TrainingError(reason) from error
        finally:
            trainer.close()
    if stopped:
        raise Interrupted(stopped)
    return Path(config.out)


def lr_factor(config: RunConfig, step: int) -> float:
    """The factor on the learning rate at a 0-based step: linear warm-up, then constant or a cosine to zero."""
    warmup = config.optim.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.optim.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.train.steps - warmup, 1)))


class Trainer:
    """A run: its parts, one optimization step, logging, checkpoints and a clean stop.

    All randomness of a step is drawn for the global batch from a generator seeded by (seed, step), and each process
    takes its rows: the numbers do not depend on the number of processes, and resuming needs nothing replayed.
    """

    def __init__(self, config: RunConfig, world: World):
        self.world, self.device, self.out = world, world.device, Path(config.out)
        share = world.size * config.train.accumulate
        if config.train.batch_size % share:
            raise ConfigError(
                f"train.batch_size {config.train.batch_size} must be a multiple of {share} = "
                "processes x train.accumulate"
            )
        self.claim = _claim(self.out) if world.is_main else None
        seed_everything(config.seed)
        self.dataset = build_data(config)
        self.config = dataclasses.replace(config, model=resolve_model(config.model, self.dataset))
        self.process, self.timesteps, t_end = build_process(config)
        precision = config.precision
        model = build_model(self.config.model)
        if config.train.init_from:
            self._start_from(model, config.train.init_from)
        fp32 = {name: p.detach().to(self.device) for name, p in model.named_parameters()}
        self.model = precision.apply(model.to(self.device)).train()
        self.model.recompute = config.train.recompute
        self.optimizer = AdamWEMA(self.model, config.optim, precision, fp32)
        self.scaler = LossScaler(
            self.device.type, init_scale=65536.0, growth_interval=1000, enabled=precision.scales_loss
        )
        if config.train.sample_every:
            # Now rather than in the middle of the run: a sampler that cannot be, an EMA that is not kept.
            prepare(LoopNetwork(Network(self.model, precision, self.device), config.sample), self.config)
            self.optimizer.ema_rate(config.sample.ema)
        # On a GPU, looking makes the host wait: so only for a sampler that must know, and else with a line to log.
        self.checks_each_step = self.device.type == "cpu" or config.diffusion.timestep_sampler != "uniform"
        self.losses = LossWindow(t_end, self.device)
        self.step_done = 0
        self._resume()
        module = torch.compile(self.model, fullgraph=True) if config.train.compile else self.model
        self.parallel = DistributedDataParallel(module, gradient_as_bucket_view=True) if world.size > 1 else None
        self.predict = predictor(self.parallel or module, precision, self.device)
        self.learn: Callable[..., tuple[dict[str, Tensor], Tensor, Tensor]] = self._learn
        if config.train.cuda_graph:
            check_cuda_graph("train.cuda_graph", self.device, self.model, world.size, compiled=config.train.compile)
            self.learn = CudaGraph(self._learn, "train.cuda_graph", self.device, max_shapes=1)
        self.loader = Loader(
            self.dataset, config.train.batch_size, rank=world.rank, world_size=world.size, seed=config.seed,
            workers=config.data.workers, start_step=self.step_done, pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        self.recorder = Recorder(
            self.out, config.train.steps, self.step_done, enabled=world.is_main, tensorboard=config.train.tensorboard
        )
        self.meter = Meter()
        self.norm, self.first_overflow = torch.zeros(2, device=self.device)

    def run(self) -> str | None:
        """Steps until the end, or until a signal asks to stop: then the reason, for the user."""
        config = self.config.train
        if self.world.is_main and self.step_done < config.steps:
            save_config(self.config, self.out / "config.yaml")
        self._announce()
        with stop_requests() as requests:
            while self.step_done < config.steps:
                # Processes agree before the step: afterwards the answer is there without a wait.
                asked = self.world.any(bool(requests))
                self.step()
                stopping = bool(asked) or (self.world.size == 1 and bool(requests))
                finished = self.step_done == config.steps
                self.recorder.advance(self.step_done)
                if finished or self.step_done % config.log_every == 0:
                    self._log()
                with self.meter.paused():
                    if config.sample_every and self.step_done % config.sample_every == 0:
                        self._draw_samples()
                    if stopping or finished or self.step_done % config.save_every == 0:
                        self._save()
                if stopping and not finished:
                    reason = "/".join(requests) or "another process"
                    return f"stopped on {reason} after step {self.step_done}; the same command continues from there"
        return None

    def step(self) -> None:
        """One update from one global batch."""
        started = time.perf_counter()
        x, y = next(self.loader)
        self.meter.waited += time.perf_counter() - started
        x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
        t, weights, noise, drop = self._draw(x.shape[1:])
        self.optimizer.schedule(self.step_done, lr_factor(self.config, self.step_done))
        terms, self.norm, overflow = self.learn(x, y, t, weights, noise, drop)
        self.losses.add(t, weights, terms)
        if self._applied(overflow):
            self.timesteps.update_with_local_losses(t, terms["loss"])
        self.step_done += 1
        self.meter.steps += 1

    def _draw(self, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This process's rows of the step's timesteps, their weights, noise and label drops."""
        config, rows = self.config, self.world.rows(self.config.train.batch_size)
        n = config.train.batch_size
        host = generator_for(config.seed, "timesteps", self.step_done)
        t, weights = self.timesteps.sample(n, generator=host)
        drop = torch.rand(n, generator=host) < config.model.class_dropout_prob
        t, weights, drop = (v[rows].to(self.device, non_blocking=True) for v in (t, weights, drop))
        generator = generator_for(config.seed, "noise", self.step_done, self.device)
        return t, weights, torch.randn(n, *shape, generator=generator, device=self.device)[rows], drop

    def _learn(self, *batch: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Gradients of a batch (x, y, t, weights, noise, drop) and their update; its losses, their norm, the overflow.

        A CUDA graph replays it: nothing here may depend on numbers of the host that change, or wait for the device.
        """
        parts, chunks = [], self.config.train.accumulate
        for i, chunk in enumerate(zip(*(v.chunk(chunks) for v in batch), strict=True)):
            # Gradients are reduced across processes once, with the last chunk.
            with self.parallel.no_sync() if self.parallel and i < chunks - 1 else nullcontext():
                parts.append(self._backward(*chunk))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, *self._update()

    def _backward(
        self, x: Tensor, y: Tensor, t: Tensor, weights: Tensor, noise: Tensor, drop: Tensor
    ) -> dict[str, Tensor]:
        """Adds a chunk's gradients; returns its losses (B,) by name."""
        drops = {"force_drop_ids": drop} if self.config.model.class_dropout_prob > 0 else {}
        terms = self.process.training_losses(self.predict, x, model_kwargs={"y": y, **drops}, t=t, noise=noise)
        loss = self.scaler.scale((terms["loss"] * weights).mean() / self.config.train.accumulate)
        with self.config.precision.products():
            loss.backward()
        return {name: terms[name].detach() for name in LossWindow.TERMS if name in terms}

    def _update(self) -> tuple[Tensor, Tensor]:
        """Applies the gradients if they are finite; their norm (), and (1,) one if they were not."""
        inverse_scale = self.scaler.inverse()
        norm = self.optimizer.gradient_norm(inverse_scale)
        overflow = self.optimizer.update(norm, inverse_scale)
        self.scaler.advance(overflow)
        return norm, overflow

    def _applied(self, overflow: Tensor) -> bool:
        """Whether the gradients were finite and so applied, as far as that is known without waiting."""
        here = overflow.new_full((), self.step_done + 1)
        self.first_overflow = torch.where((self.first_overflow == 0) & (overflow[0] > 0), here, self.first_overflow)
        if not self.checks_each_step:
            return True
        self._check_overflow()
        return math.isfinite(self.last_norm)

    @property
    def last_norm(self) -> float:
        """The norm of the last step's gradients."""
        return float(self.norm)

    def _check_overflow(self) -> None:
        """TrainingError if gradients were not finite; with a loss scale, if lowering it does not help."""
        step = int(self.first_overflow)
        if step and not self.scaler.is_enabled():
            raise TrainingError(
                f"the gradient at step {step} is not finite, so it was not applied; "
                f"{self.good_checkpoint()}. Lower optim.lr, set optim.clip_norm, or look for bad data"
            )
        # With a loss scale an overflow is expected now and then: the update is skipped and the scale lowered.
        if step and self.scaler.get_scale() < SMALLEST_SCALE:
            raise TrainingError(
                f"fp16 overflows at any loss scale (step {step}); {self.good_checkpoint()}. Use train.precision bf16"
            )
        self.first_overflow.zero_()

    def _log(self) -> None:
        self._check_overflow()
        config, peak = self.config, peak_flops(self.device, self.config.precision)
        record = {
            "step": self.step_done,
            **self.losses.read(self.world.sum_),
            "grad_norm": self.last_norm if math.isfinite(self.last_norm) else None,
            "lr": config.optim.lr * lr_factor(config, self.step_done - 1),
            **self.meter.read(config.train.batch_size, training_flops(self.model), peak and peak * self.world.size),
            "peak_bytes": peak_memory(self.device),
        }
        if self.scaler.is_enabled():
            record["loss_scale"] = self.scaler.get_scale()
        self.recorder.write(record)

    def _draw_samples(self) -> None:
        """A grid from the first EMA's weights, on the main process; the others wait at their next reduction."""
        if not self.world.is_main:
            return
        path = self.out / "samples" / f"step-{self.step_done:08d}.png"
        with self.optimizer.ema_weights(self.config.sample.ema):
            preview(self.model, self.config, self.device, path)
        self.recorder.image("samples", path, self.step_done)

    def _save(self) -> None:
        self._check_overflow()
        window = self.losses.gather(self.world.sum_, self.world.is_main)
        if self.world.is_main:
            state = {"config": dataclasses.asdict(self.config), "scaler": self.scaler.state_dict()}
            state["tuned"] = kernels.tuned_in_use()
            groups = self.optimizer.state_tensors() | {"rng": rng_tensors(self.device)}
            groups |= {"timesteps": self.timesteps.state_dict(), "losses": {"sums": window}}
            path = checkpoint.save(
                self.out, self.step_done, groups, state, keep=self.config.train.keep, world_size=self.world.size
            )
            log.info("saved %s", path)
        self.world.barrier()

    def _resume(self) -> None:
        if checkpoint.latest(self.out) is None:
            return
        loaded = checkpoint.load(self.out, self.device)
        changed = {
            key: f"{key}: {theirs} there, {ours} here"
            for key, (theirs, ours) in differences(config_from(loaded.state["config"]), self.config).items()
            if key.startswith(NUMBERS) and key != SAMPLING_ALONE
        }
        if others := [text for key, text in changed.items() if key.startswith(IDENTITY)]:
            raise ConfigError(
                f"{loaded.path} belongs to another run ({'; '.join(others)}); give the same options, or another out"
            )
        if changed:
            log.warning("%s was trained with other options (%s)", loaded.path, "; ".join(changed.values()))
        tuned = {key: tuple(config) for key, config in loaded.state.get("tuned", {}).items()}
        if tuned != kernels.tuned_in_use():
            log.warning(
                "%s was trained with other measured configs of the kernels: numbers may go on differently in the last "
                "bits", loaded.path,
            )  # fmt: skip
        self.optimizer.load_state_tensors(loaded.tensors)
        if self.scaler.is_enabled() and loaded.state["scaler"]:
            self.scaler.load_state_dict(loaded.state["scaler"])
        self.timesteps.load_state_dict(loaded.tensors["timesteps"])
        if self.world.is_main:
            self.losses.load(loaded.tensors["losses"]["sums"])
        restore_rng(loaded.tensors["rng"], self.device)
        self.step_done = loaded.step
        log.info("resuming %s at step %d", loaded.path, loaded.step)

    def _start_from(self, model: torch.nn.Module, path: str) -> None:
        if checkpoint.latest(self.out) is not None:
            return
        state, info = convert.load_official(path)
        log.info("starting from %s (%s)", path, info["which"])
        state, notes = convert.fit_state_dict(state, model)
        model.load_state_dict(state)
        for note in notes:
            log.info("%s: %s", path, note)

    def good_checkpoint(self) -> str:
        """A clause for messages: where training can go on from."""
        path = checkpoint.latest(self.out)
        return f"the last checkpoint is {path}" if path else "there is no checkpoint yet"

    def _announce(self) -> None:
        config, taken = self.config, dict[str, list[str]]()
        for spec in kernels.OPS:
            backend = kernels.backend_of(spec.name, self.device, config.precision.stream)
            taken.setdefault(backend, []).append(spec.name)
        log.info(
            "%s: %s parameters, %.2f GFLOP per image and step, %s on %d x %s; kernels: %s",
            config.out, f"{count_parameters(self.model):,}", training_flops(self.model) / 1e9, config.train.precision,
            self.world.size, self.device, "; ".join(f"{name} for {', '.join(ops)}" for name, ops in taken.items()),
        )  # fmt: skip
        if self.step_done >= config.train.steps:
            log.info("nothing to do: step %d of %d is reached; raise train.steps", self.step_done, config.train.steps)

    def close(self) -> None:
        self.loader.close()
        self.recorder.close()
        if self.claim is not None:
            self.claim.close()


def _claim(out: Path) -> TextIO:
    """Makes a run's directory and locks it against other processes for as long as the returned file is open."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        claim = (out / "lock").open("a+")
    except OSError as error:
        raise ConfigError(f"cannot write to out={out}: {error}; choose another directory") from error
    try:
        # A record lock: it dies with this process, and the loader's workers do not inherit it.
        fcntl.lockf(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        claim.close()
        raise ConfigError(f"another process is training in out={out}; stop it, or choose another directory") from None
    return claim
