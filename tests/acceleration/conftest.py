"""Other people's models: a stand-in with the official DiT's and timm's module names, and diffusers' own."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from ditfast import reference


class Attention(nn.Module):
    """timm's, as the official DiT and SiT make it."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.fused_attn = self.head_dim**-0.5, True
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm, self.k_norm, self.attn_drop = nn.Identity(), nn.Identity(), nn.Dropout(0.0)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x, attn_mask=None):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        weights = self.q_norm(q) * self.scale @ self.k_norm(k).transpose(-2, -1)
        weights = (weights if attn_mask is None else weights + attn_mask).softmax(-1)
        return self.proj_drop(self.proj((self.attn_drop(weights) @ v).transpose(1, 2).flatten(2)))


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, dim, width):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, width), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(width, dim), nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class Block(nn.Module):
    """The official DiTBlock and SiTBlock."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(reference.modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(reference.modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        return self.linear(reference.modulate(self.norm_final(x), *self.adaLN_modulation(c).chunk(2, dim=1)))


class TimestepEmbedder(reference.TimestepEmbedder):
    def __init__(self, dim):
        super().__init__(dim)
        self.frequency_embedding_size = self.frequency_size


class DiT(reference.DiT):
    """The reference's frame around modules named as the official ones."""

    def __init__(self, make_block: Callable[..., nn.Module] = Block, **sizes: Any):
        super().__init__(**sizes)
        dim, heads = sizes["hidden_size"], sizes["num_heads"]
        self.t_embedder = TimestepEmbedder(dim)
        self.blocks = nn.ModuleList(make_block(dim, heads) for _ in range(sizes["depth"]))
        self.final_layer = FinalLayer(dim, self.final_layer.linear.out_features)

    def forward(self, x, t, y):
        """Officially the final layer returns tokens, and the frame makes the image of them."""
        p, c = self.patch_size, self.t_embedder(t) + self.y_embedder(y, self.training)
        h, w = x.shape[2] // p, x.shape[3] // p
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            tokens = block(tokens, c)
        patches = self.final_layer(tokens, c).reshape(-1, h, w, p, p, self.out_channels)
        return torch.einsum("nhwpqc->nchpwq", patches).reshape(-1, self.out_channels, h * p, w * p)


class Subject(NamedTuple):
    """A model, the arguments of a call, the names of its blocks, and of parts of a block.

    The linear `called` stays a call when fused, the linear `read` and the norm are bypassed.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    blocks: str
    called: str
    read: str
    norm: str
    ops: tuple[str, ...]  # of one block, in order

    def run(self, model: nn.Module | None = None) -> torch.Tensor:
        """The output of this or of another model for the arguments."""
        model = self.model if model is None else model
        dtype = next(model.parameters()).dtype
        args = (arg.to(dtype) if arg.is_floating_point() else arg for arg in self.args)
        out = model(*args, **self.kwargs)
        return out if isinstance(out, torch.Tensor) else out.sample

    def block(self, i: int = 0) -> nn.Module:
        """One of the blocks."""
        return self.model.get_submodule(f"{self.blocks}.{i}")


def randomize(model: nn.Module) -> nn.Module:
    """Weights of a trained model's size, none of them zero, so that every branch shows in the output."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
    return model


OFFICIAL = {"input_size": 8, "patch_size": 2, "hidden_size": 80, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture
def official() -> Callable[..., Subject]:
    """make(make_block=Block, **sizes): a stand-in of the official DiT with random weights."""

    def make(make_block: Callable[..., nn.Module] = Block, **sizes: Any) -> Subject:
        torch.manual_seed(0)
        model = randomize(DiT(make_block, **OFFICIAL | sizes)).eval()
        args = torch.randn(3, 4, 8, 8), torch.tensor([0, 7, 40]), torch.tensor([0, 3, 10])
        ops = ("adaln_modulate", "attention_qkvpacked", "gate_residual_adaln_modulate", "gelu_mlp", "gate_residual")
        return Subject(model, args, {}, "blocks", "attn.qkv", "mlp.fc1", "norm2", ops)

    return make


@pytest.fixture
def diffusers_dit() -> Callable[..., Subject]:
    """make(**config): diffusers' DiTTransformer2DModel with random weights."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -e '.[dev]'")

    def make(**config: Any) -> Subject:
        torch.manual_seed(0)
        sizes = {"num_attention_heads": 2, "attention_head_dim": 40, "num_layers": 2, "sample_size": 8}
        more = {"out_channels": 8, "num_embeds_ada_norm": 10}
        model = randomize(diffusers.DiTTransformer2DModel(**sizes | more | config)).eval()
        kwargs = {"timestep": torch.tensor([0, 7, 40]), "class_labels": torch.tensor([0, 3, 10])}
        ops = ("timestep_embedding", "adaln_modulate", "attention", "gate_residual_adaln_modulate", "gelu_mlp")
        names = ("transformer_blocks", "attn1.to_q", "ff.net.0.proj", "norm3")
        return Subject(model, (torch.randn(3, 4, 8, 8),), kwargs, *names, (*ops, "gate_residual"))

    return make


@pytest.fixture(params=("official", "diffusers"))
def subject(request) -> Subject:
    """Each kind of model in turn."""
    return request.getfixturevalue("official" if request.param == "official" else "diffusers_dit")()
