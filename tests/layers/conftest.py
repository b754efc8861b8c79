"""Tiny models of every family beside their oracles, and what a forward leaves behind."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from bench.storages import Storages
from ditfast import reference
from ditfast.config import PRECISIONS
from ditfast.kernels._op import Op
from ditfast.layers import DiffusionTransformer, DiT, LargeDiT, LightningDiT, SiT
from ditfast.paddle import from_dit_llama

SMALL = {"input_size": 8, "hidden_size": 48, "depth": 2, "num_heads": 4, "num_classes": 7}
LATENT = {"patch_size": 2, "in_channels": 3}


@dataclass(frozen=True)
class Family:
    """A model of the engine and its oracle, and the arguments of a tiny one."""

    ours: type[DiffusionTransformer]
    oracle: type[nn.Module]
    options: dict[str, Any]
    unit_time: bool = True  # t in [0, 1]

    def make(self, **options: Any) -> DiffusionTransformer:
        """A model none of whose weights is zero."""
        torch.manual_seed(0)
        return with_random_weights(self.ours(**SMALL | LATENT | self.options | options))

    def pair(self, **options: Any) -> tuple[DiffusionTransformer, nn.Module]:
        """The oracle's random weights in both, float64, in evaluation."""
        torch.manual_seed(0)
        arguments = SMALL | LATENT | self.options | options
        ours, oracle = self.ours(**arguments), with_random_weights(self.oracle(**arguments))
        ours.load_state_dict(self.converted(ours, oracle.state_dict()))
        return ours.double().eval(), oracle.double().eval()

    def converted(self, ours: DiffusionTransformer, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by the oracle's names as `ours` has them."""
        return from_dit_llama(paddle_layout(state), ours) if self.ours is LargeDiT else state

    def batch(self, model: DiffusionTransformer, n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n, model.in_channels, *model.x_embedder.img_size, generator=generator)
        t = torch.arange(n) / n + 0.1 if self.unit_time else torch.arange(n) * 100
        return x, t, torch.arange(n) % 7


def with_random_weights(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, mean=float(p.ndim == 1), std=0.1)
    return model.eval()


def paddle_layout(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As Paddle holds them: Linear weights (in, out), in numpy."""
    return {
        name: (value.T if value.ndim == 2 and "embedding_table" not in name else value).numpy()
        for name, value in state.items()
    }


LIGHTNING = Family(LightningDiT, reference.LightningDiT, {})
LARGE = Family(LargeDiT, reference.LargeDiT, {"multiple_of": 16}, unit_time=False)
FAMILIES = {
    "SiT": Family(SiT, reference.SiT, {}),
    "LightningDiT": LIGHTNING,
    "LightningDiT-qknorm": Family(LightningDiT, reference.LightningDiT, {"use_qknorm": True}),
    "LightningDiT-options": Family(
        LightningDiT,
        reference.LightningDiT,
        {"use_qknorm": True, "use_swiglu": False, "use_rmsnorm": False, "wo_shift": True, "learn_sigma": True},
    ),
    "LargeDiT": LARGE,
    "LargeDiT-gqa": Family(
        LargeDiT, reference.LargeDiT, {"multiple_of": 16, "num_kv_heads": 2, "qk_norm": False}, unit_time=False
    ),
    "LargeDiT-gqa-norm": Family(LargeDiT, reference.LargeDiT, {"num_kv_heads": 2, "multiple_of": 1}, unit_time=False),
}


@pytest.fixture
def randomized() -> Callable[..., DiT]:
    """make(**options): a small model none of whose weights is zero, in evaluation."""

    def make(**options) -> DiT:
        arguments = {"input_size": 8, "in_channels": 3, "hidden_size": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
        torch.manual_seed(0)
        model = DiT(**arguments | options)
        for p in model.parameters():
            if p.requires_grad:
                nn.init.normal_(p, std=0.1)
        return model.eval()

    return make


@pytest.fixture
def batch() -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """make(model, n=5): (x, t, y) that the model takes, always the same."""

    def make(model: DiT, n: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(n, model.in_channels, *model.x_embedder.img_size, generator=generator)
        t = torch.randint(0, 1000, (n,), generator=generator)
        return x, t, torch.randint(0, model.y_embedder.num_classes, (n,), generator=generator)

    return make


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def all_on(monkeypatch) -> Callable[[str], None]:
    """all_on(backend): from now on every op that has it takes it; "triton" in the interpreter where there is no GPU."""
    choose = Op.choose

    def force(backend: str) -> None:
        monkeypatch.setattr(
            Op, "choose", lambda op, asked, *rest: choose(op, backend if backend in op.backends else asked, *rest)
        )

    return force


@pytest.fixture
def on_triton(all_on) -> None:
    all_on("triton")


@pytest.fixture
def storages() -> Storages:
    return Storages()


Models = Mapping[int, DiffusionTransformer]


def per_token_and_layer(models: Models, kept: Callable[[DiffusionTransformer, int], int]) -> float:
    """What the further layers keep of further samples, and so without weights and the rest."""
    (less, shallow), (more, deep) = sorted(models.items())
    few, many = (kept(deep, n) - kept(shallow, n) for n in (1, 3))
    return (many - few) / (2 * (more - less) * shallow.x_embedder.num_patches)


@pytest.fixture
def kept_behind() -> Callable[..., float]:
    """kept_behind({depth: model, ...} of two depths, precision, batch): bytes alive per token and layer."""

    def measure(models: Models, precision: str, batch: Callable[..., Any]) -> float:
        def kept(model: DiffusionTransformer, n: int) -> int:
            with Storages() as storages, PRECISIONS[precision].autocast("cpu"):
                out = model(*batch(model, n))
            alive = storages.alive()
            assert out.requires_grad
            return alive

        return per_token_and_layer(models, kept)

    return measure


@pytest.fixture
def kept_by_compiled() -> Callable[..., float]:
    """kept_by_compiled({depth: model, ...}, batch): bytes per token and layer that its backward is handed."""

    def kept(model: DiffusionTransformer, inputs: tuple[torch.Tensor, ...]) -> int:
        torch._dynamo.reset()
        out = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
        nodes, saved = [out.grad_fn], {}
        while nodes:
            node = nodes.pop()
            nodes += [following for following, _ in node.next_functions if following is not None]
            for tensor in getattr(node, "saved_tensors", ()):
                if tensor is not None:
                    saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return sum(saved.values())

    return lambda models, batch: per_token_and_layer(models, lambda model, n: kept(model, batch(model, n + 1)))
