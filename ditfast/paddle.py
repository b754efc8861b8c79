"""LargeDiT's weights from and to the names and layouts of PaddleMIX's DiT_Llama (ppdiffusers), given as arrays.

Paddle's Linear holds its weight as (in, out), PyTorch's as (out, in). wq, wk and wv are one packed weight here, w1 and
w3 of the SwiGLU another, and the linear patch embedding is a convolution's weight (D, C, p, p).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditfast.convert import ConvertError
from ditfast.layers import LargeDiT

# One name there for one here; those of a Linear's weight are turned.
_OUTER = {
    "x_embedder.bias": "x_embedder.proj.bias",
    "y_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
    **{
        f"{linear}.{part}": f"{linear}.{part}"
        for linear in ("t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1")
        for part in ("weight", "bias")
    },
}
_INNER = {
    "attention.wo.weight": "attn.proj.weight",
    "feed_forward.w2.weight": "mlp.w3.weight",
    "attention_norm.weight": "norm1.weight",
    "ffn_norm.weight": "norm2.weight",
    "adaLN_modulation.1.weight": "adaLN_modulation.1.weight",
    "adaLN_modulation.1.bias": "adaLN_modulation.1.bias",
}
_QK_NORM = {f"attention.{qk}_norm.{part}": f"attn.{qk}_norm.{part}" for qk in "qk" for part in ("weight", "bias")}
# Several weights there for one here, side by side along its rows.
_PACKED = {
    ("attention.wq.weight", "attention.wk.weight", "attention.wv.weight"): "attn.qkv.weight",
    ("feed_forward.w1.weight", "feed_forward.w3.weight"): "mlp.w12.weight",
}


def from_dit_llama(arrays: Mapping[str, Any], model: LargeDiT) -> dict[str, Tensor]:
    """The state dict of `model` (on any device, meta included) with DiT_Llama's parameters, arrays or tensors by name.

    They keep their dtypes. Raises ConvertError naming what is missing, unknown or of another shape.
    """
    wanted = model.state_dict()
    sources = _sources(model)
    known = {name for names in sources.values() for name in names}
    if missing := sorted(known - set(arrays)):
        raise ConvertError(f"not the parameters of this LargeDiT: {', '.join(missing[:4])} missing ({len(missing)})")
    if unknown := sorted(set(arrays) - known):
        raise ConvertError(f"not the parameters of this LargeDiT: it has no {', '.join(unknown[:4])} ({len(unknown)})")
    state = {}
    for target, names in sources.items():
        parts = [_turned(name, torch.as_tensor(arrays[name])) for name in names]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(names, parts, strict=True))
            raise ConvertError(f"{target} is made of weights that take inputs of one width, got (out, in): {shapes}")
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if target == "x_embedder.proj.weight" and value.numel() == wanted[target].numel():
            value = value.view(wanted[target].shape)
        if value.shape != wanted[target].shape:
            there, here = tuple(value.shape), tuple(wanted[target].shape)
            raise ConvertError(f"{' | '.join(names)} makes {target} {there}, but this LargeDiT has {here}")
        state[target] = value.contiguous()
    return {name: state[name] for name in wanted}


def to_dit_llama(model: LargeDiT) -> dict[str, np.ndarray]:
    """The parameters of `model` as DiT_Llama's, float32 arrays by its names."""
    state, arrays = model.state_dict(), {}
    a = model.architecture
    kv = (a.kv_heads or a.num_heads) * a.head_dim
    for target, names in _sources(model).items():
        value = state[target].detach().float().cpu()
        if target == "x_embedder.proj.weight":
            value = value.flatten(1)
        sizes = (a.hidden_size, kv, kv) if len(names) == 3 else len(value) // len(names)
        for name, part in zip(names, value.split(sizes), strict=True):
            arrays[name] = _turned(name, part).numpy().copy()
    return arrays


def _sources(model: LargeDiT) -> dict[str, tuple[str, ...]]:
    """The names there that make each name here."""
    found: dict[str, tuple[str, ...]] = {"x_embedder.proj.weight": ("x_embedder.weight",)}
    found |= {here: (there,) for there, here in _OUTER.items()}
    inner = _INNER | (_QK_NORM if model.architecture.qk_norm else {})
    for i in range(model.architecture.depth):
        found |= {f"blocks.{i}.{here}": (f"layers.{i}.{there}",) for there, here in inner.items()}
        found |= {f"blocks.{i}.{here}": tuple(f"layers.{i}.{n}" for n in there) for there, here in _PACKED.items()}
    return found


def _turned(name: str, value: Tensor) -> Tensor:
    """A Linear's weight transposed; an embedding table and vectors as they are."""
    return value if value.ndim != 2 or "embedding_table" in name else value.T
