"""What ditfast's training step is compared with: the reference model, trained as others train it.

Nothing here runs a kernel of ditfast: the loss and the moments are the plain PyTorch of its diffusion package.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.oracles import Recipe, build_reference, ditfast_names
from bench.timing import interleaved
from ditfast.config import ModelConfig, OptimConfig, Precision
from ditfast.diffusion import SpacedDiffusion, Transport

_WIDE = torch.float64
FLOAT64 = Precision(_WIDE, _WIDE, _WIDE, _WIDE, _WIDE, _WIDE)  # of the truth that all are held against


def plain_losses(
    process: SpacedDiffusion | Transport, predict: Callable[..., Tensor], x: Tensor, t: Tensor, y: Tensor, noise: Tensor
) -> Tensor:
    """The losses (B,) of a process, op by op as the official codes compute them.

    L_hybrid of Nichol and Dhariwal 2021, equation 16; of SiT that of a velocity on the path Linear, with that of its
    direction (LightningDiT, arXiv:2501.01423) where the process has it. ValueError for other paths and predictions.
    """
    if isinstance(process, Transport):
        return _velocity_losses(process, predict, x, t, y, noise)
    x_t = process.gather("sqrt_alphas_cumprod", t, x) * x
    x_t = x_t + process.gather("sqrt_one_minus_alphas_cumprod", t, x) * noise
    prediction, variance = predict(x_t, t, y).chunk(2, dim=1)
    frozen = torch.cat([prediction.detach(), variance], dim=1)
    bound = process.vb_terms_bpd(lambda *_: frozen, x, x_t, t, clip_denoised=False)["output"]
    return (noise - prediction).square().flatten(1).mean(dim=1) + bound


def _velocity_losses(
    process: Transport, predict: Callable[..., Tensor], x: Tensor, t: Tensor, y: Tensor, noise: Tensor
) -> Tensor:
    if (process.path_type, process.prediction) != ("Linear", "velocity"):
        given = f"{process.prediction} on {process.path_type}"
        raise ValueError(f"the reference trains a velocity on the path Linear, got {given}")
    at, target = t.view(-1, 1, 1, 1), x - noise
    prediction = predict(at * x + (1 - at) * noise, t, y)
    losses = (prediction - target).square().flatten(1).mean(dim=1)
    if process.use_cosine_loss:
        losses = losses + (1 - F.cosine_similarity(prediction, target, dim=1)).flatten(1).mean(dim=1)
    return losses


class Baseline:
    """A training step of the reference model by a recipe, under one of ditfast's precision policies.

    Args:
        state: the fp32 weights to start from, by ditfast's names, on the device to train on.
        batch_size: for which the fastest SDPA is sought.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: ModelConfig,
        state: dict[str, Tensor],
        precision: Precision,
        optim: OptimConfig,
        process: SpacedDiffusion | Transport,
        batch_size: int,
    ):
        self.recipe, self.config, self.precision, self.process = recipe, model, precision, process
        self.null, self.alpha = model.num_classes or 0, 1 - optim.ema_rates[0]
        self.model = build_reference(model, state, recipe).train()
        self.device = next(self.model.parameters()).device
        fp32 = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        self.model.to(precision.params)
        self.parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.apart = precision.params is not precision.optimizer
        self.masters = {n: w.requires_grad_() for n, w in fp32.items()} if self.apart else self.parameters
        self.ema = {name: m.detach().clone() for name, m in self.masters.items()}
        betas, fused = (optim.beta1, optim.beta2), None if recipe.plain_loop else True
        self.optimizer = torch.optim.AdamW(
            self.masters.values(), optim.lr, betas, optim.eps, optim.weight_decay, fused=fused
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision.scales_loss)
        self.network = torch.compile(self.model, fullgraph=True, dynamic=False) if recipe.compiled else self.model
        self.attention = attention_for(recipe, model, batch_size, precision, self.device, train=True)

    def __call__(self, *batch: Tensor) -> None:
        """One step from (x, y, t, weights, noise, drop), each of B rows, as `Trainer.learn` takes them."""
        losses = self.backward(batch)
        if self.recipe.plain_loop:
            losses.mean().item()
        self.update()

    def backward(self, batch: Sequence[Tensor], share: float = 1.0) -> Tensor:
        """Adds `share` times the batch's gradients, loss-scaled in fp16; returns its losses (B,)."""
        x, y, t, weights, noise, drop = batch
        y = torch.where(drop, self.null, y)
        with self.attention(), self.precision.products():
            losses = plain_losses(self.process, self._predict, x, t, y, noise)
            self.scaler.scale((losses * weights).mean() * share).backward()
        return losses.detach()

    def _predict(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self.precision.autocast(self.device):
            out = self.network(x if x.dtype is torch.float64 else x.to(self.precision.params), t, y)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    @torch.no_grad()
    def update(self) -> None:
        """AdamW and EMA from the gradients; then there are none."""
        if self.apart:
            for name, master in self.masters.items():
                grad = self.parameters[name].grad
                assert grad is not None, name
                master.grad = grad.to(master.dtype)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        averages, masters = list(self.ema.values()), list(self.masters.values())
        if self.recipe.plain_loop:
            for average, master in zip(averages, masters, strict=True):
                average.mul_(1 - self.alpha).add_(master.data, alpha=self.alpha)
        else:
            torch._foreach_lerp_(averages, masters, self.alpha)
        if self.apart:
            torch._foreach_copy_(list(self.parameters.values()), masters)
            self.model.zero_grad()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """After a step: the fp32 weights, their EMA and AdamW's moments, by kind and parameter."""
        weights = {name: master.detach() for name, master in self.masters.items()}
        moments = {
            kind: {name: self.optimizer.state[master][kind] for name, master in self.masters.items()}
            for kind in ("exp_avg", "exp_avg_sq")
        }
        return {"weights": weights, "EMA": self.ema, **moments}

    def gradients(self, batch: Sequence[Tensor], rows: int | None = None) -> dict[str, Tensor]:
        """The gradients of the batch by ditfast's names, and "losses" (B,); nothing is updated.

        They are computed at once, or `rows` at a time.
        """
        size = len(batch[0])
        chunks = zip(*(v.split(rows or size) for v in batch), strict=True)
        parts = [self.backward(chunk, share=len(chunk[0]) / size) for chunk in chunks]
        scale = self.scaler.get_scale()
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        found = {name: grad if scale == 1 else grad.double() / scale for name, grad in grads.items()}
        self.model.zero_grad()
        return {"losses": torch.cat(parts)} | ditfast_names(self.config, found)


def attention_for(
    recipe: Recipe, model: ModelConfig, batch: int, precision: Precision, device: torch.device, train: bool
) -> Callable[[], AbstractContextManager]:
    """Contexts in which a recipe's model attends by the fastest library; a CPU has one."""
    if not recipe.sdpa or device.type != "cuda":
        return nullcontext
    with precision.products():
        return partial(sdpa_kernel, fastest_sdpa(model, batch, precision.compute, device, train))


def fastest_sdpa(model: ModelConfig, batch: int, dtype: torch.dtype, device: torch.device, train: bool) -> SDPBackend:
    """The library behind torch's attention that is the fastest on a model's q, k and v; with `train`, backward as well.

    Plain PyTorch where none of them can.
    """
    assert model.input_size is not None
    tokens = model.input_size[0] * model.input_size[1] // model.patch_size**2
    heads, kv_heads = model.num_heads, model.kv_heads or model.num_heads
    q, k, v, dout = (
        torch.randn(batch, n, tokens, model.head_dim, dtype=dtype, device=device, requires_grad=train)
        for n in (heads, kv_heads, kv_heads, heads)
    )

    def attend(backend: SDPBackend) -> None:
        with sdpa_kernel(backend):
            o = F.scaled_dot_product_attention(q, k, v, enable_gqa=kv_heads < heads)
            if train:
                torch.autograd.grad(o, (q, k, v), dout)

    able = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        try:
            attend(backend)
        except RuntimeError:  # torch's word for a library that is not there, or not for these inputs
            continue
        able[backend.name] = lambda backend=backend: attend(backend)
    timings = interleaved(able, device, rounds=10, seconds=1.0)
    return SDPBackend.__members__[min(timings, key=lambda name: timings[name].ms)] if timings else SDPBackend.MATH
