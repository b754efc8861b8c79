"""timestep_embedding and patchify by diffusers."""

from functools import lru_cache
from typing import Any

import torch

from ._base import DIFFUSERS, PeerError, importing


def diffusers_timestep_embedding(**inputs: Any) -> torch.Tensor:
    """timestep_embedding by diffusers' function, with the official DiT's order and exponents."""
    with importing(DIFFUSERS, inputs["t"].device):
        from diffusers.models.embeddings import get_timestep_embedding
    embedding = get_timestep_embedding(
        inputs["t"],
        inputs.get("dim", 256),
        flip_sin_to_cos=True,
        downscale_freq_shift=0,
        max_period=inputs.get("max_period", 10000),
    )
    return embedding.to(inputs.get("out_dtype") or torch.float32)


def diffusers_patchify(**inputs: Any) -> torch.Tensor:
    """patchify by diffusers' PatchEmbed, which gives its result in the dtype that it computes in."""
    with importing(DIFFUSERS, inputs["x"].device):
        import diffusers  # noqa: F401
    x, weight, bias, pos_embed = (inputs[name] for name in ("x", "weight", "bias", "pos_embed"))
    compute = inputs.get("compute_dtype") or torch.promote_types(x.dtype, weight.dtype)
    if torch.promote_types(compute, pos_embed.dtype) != compute:
        raise PeerError(f"diffusers' PatchEmbed computes in {compute} and would round pos_embed's {pos_embed.dtype}")
    state = {"proj.weight": weight.to(compute), "proj.bias": bias.to(compute), "pos_embed": pos_embed}
    module = _patch_embed(*x.shape[2:], *weight.shape[:3])
    return torch.func.functional_call(module, state, (x.to(compute),))


@lru_cache
def _patch_embed(height: int, width: int, dim: int, channels: int, patch: int) -> torch.nn.Module:
    """diffusers' module, without weights."""
    from diffusers.models.embeddings import PatchEmbed

    with torch.device("meta"):
        module = PatchEmbed(height, width, patch, channels, dim, pos_embed_type=None)
    # In place of the attribute None, which the state could not replace.
    del module.pos_embed
    module.register_buffer("pos_embed", torch.empty(0))
    return module
