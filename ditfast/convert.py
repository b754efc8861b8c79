"""Weights in the official DiT's format: read safely, fitted to a model, written back. Works on state dicts alone."""

import argparse
import itertools
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ditfast.files import replacing
from ditfast.layers.dit import SIZES, DiT_models
from ditfast.layers.large_dit import LargeDiT_models
from ditfast.layers.lightning_dit import LightningDiT_models

LABELS = "y_embedder.embedding_table.weight"
SWIGLU = "blocks.0.mlp.w12.weight"  # which no DiT has
ROPE = "feat_rope.freqs_cos"
_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
_NDIMS = {
    "x_embedder.proj.weight": 4, "pos_embed": 3, LABELS: 2, "blocks.0.mlp.fc1.weight": 2, "final_layer.linear.weight": 2
}  # fmt: skip
_WRAPPERS = ("module.", "_orig_mod.")
_BLOCK = re.compile(r"blocks\.(\d+)\.")


class ConvertError(ValueError):
    """A file or state dict that is not the expected model; the message says where they differ and what would fit."""


def official_keys(depth: int) -> list[str]:
    """Parameter names of the official DiT in the order of its state dict."""
    outer = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2"]
    blocks = [f"blocks.{i}.{linear}" for i, linear in itertools.product(range(depth), _LINEARS)]
    final = ["final_layer.linear", "final_layer.adaLN_modulation.1"]

    def parameters(modules: list[str]) -> list[str]:
        return [f"{module}.{name}" for module in modules for name in ("weight", "bias")]

    return ["pos_embed", *parameters(outer), LABELS, *parameters(blocks), *parameters(final)]


def load_official(path: str | Path, which: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of an official checkpoint, on the CPU, and what came with them.

    path: .pt of a bare state dict or of {model, ema, opt, args}, or .safetensors. Only tensors, plain values and
    argparse.Namespace are unpickled.
    which: "ema" or "model"; None takes ema where there is one. Prefixes of DDP and torch.compile are removed.
    info: {"which": "ema", "model" or "bare", "args": the training arguments as a dict, or None}.
    Raises ConvertError for a file that is missing, damaged, holds other objects, or lacks the weights asked for.
    """
    path = Path(path)
    if which not in (None, "ema", "model"):
        raise ConvertError(f"which is {which!r}, expected 'ema', 'model' or None")
    if not path.is_file():
        raise ConvertError(f"{path} is {'not a file' if path.exists() else 'missing'}")
    loaded = _read(path)
    if not isinstance(loaded, Mapping):
        raise ConvertError(f"{path} holds a {type(loaded).__name__}, expected a state dict")
    wrapped = isinstance(loaded.get("model"), Mapping) or isinstance(loaded.get("ema"), Mapping)
    if wrapped:
        chosen = which or ("ema" if isinstance(loaded.get("ema"), Mapping) else "model")
        if not isinstance(loaded.get(chosen), Mapping):
            raise ConvertError(f"{path} has no {chosen!r}; it has {', '.join(map(str, loaded))}")
        state = loaded[chosen]
    elif which:
        raise ConvertError(f"{path} is a bare state dict, so it has no {which!r}; leave `which` out")
    else:
        chosen, state = "bare", loaded
    if not state:
        raise ConvertError(f"{path} is not a state dict: it is empty")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what, wanted = (value, "tensor") if isinstance(name, str) else (name, "name")
            raise ConvertError(f"{path} is not a state dict: {name!r} is a {type(what).__name__}, not a {wanted}")
    args = loaded.get("args") if wrapped else None
    return _unwrapped(state), {"which": chosen, "args": vars(args) if isinstance(args, argparse.Namespace) else args}


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of the official DiT that these weights fit, and `preset`, its name in DiT_models.

    What shapes do not tell is None: num_heads and preset of a size that is not published, input_size when the number of
    tokens is no square. num_classes takes the last row of the label table for the null class. SiT's weights are a DiT's
    by name and shape. Those with a SwiGLU are a LargeDiT's or a LightningDiT's: of these `_infer_swiglu` tells less.
    Raises ConvertError when the weights are of none of them.
    """
    if SWIGLU in state:
        return _infer_swiglu(state)
    depth = 1 + max((int(match[1]) for name in state if (match := _BLOCK.match(name))), default=-1)
    missing = [name for name in official_keys(max(depth, 1)) if name not in state]
    if missing:
        found = ", ".join(list(state)[:4]) or "nothing"
        raise ConvertError(f"not the state dict of a DiT: {_some(missing)} missing; found {found}, ...")
    for name, ndim in _NDIMS.items():
        if state[name].ndim != ndim or not state[name].numel():
            raise ConvertError(
                f"not the state dict of a DiT: {name} is {tuple(state[name].shape)}, expected {ndim} dims of 1 or more"
            )
    hidden_size, in_channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    modulation = state["blocks.0.adaLN_modulation.1.weight"].shape
    if modulation != (6 * hidden_size, hidden_size):
        raise ConvertError(
            f"not an adaLN-Zero DiT: blocks.0.adaLN_modulation.1.weight is {tuple(modulation)}, "
            f"expected {(6 * hidden_size, hidden_size)}"
        )
    tokens = state["pos_embed"].shape[1]
    side = round(tokens**0.5)
    sizes = {(layers, width): (name, heads) for name, (layers, width, heads) in SIZES.items()}
    size, heads = sizes.get((depth, hidden_size), (None, None))
    preset = f"DiT-{size}/{patch_size}"
    return {
        "preset": preset if preset in DiT_models else None,
        "input_size": side * patch_size if side * side == tokens else None,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / hidden_size,
        "num_classes": state[LABELS].shape[0] - 1,
        "learn_sigma": state["final_layer.linear.weight"].shape[0] == 2 * in_channels * patch_size**2,
    }


def _infer_swiglu(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """preset, and options of `ModelConfig` that differ from its; input_size None of a LargeDiT, which fits any."""
    depth = 1 + max(int(match[1]) for name in state if (match := _BLOCK.match(name)))
    needed = ("x_embedder.proj.weight", LABELS, "final_layer.linear.weight")
    if missing := [name for name in needed if name not in state or state[name].ndim < 2]:
        raise ConvertError(f"not the state dict of a LargeDiT or LightningDiT: {_some(missing)} missing or no matrix")
    hidden_size, in_channels, patch_size = state[needed[0]].shape[:3]
    tokens = state["pos_embed"].shape[1] if "pos_embed" in state else None
    models = LightningDiT_models if tokens else LargeDiT_models
    side = round(tokens**0.5) if tokens else None
    shape = {"depth": depth, "hidden_size": hidden_size}
    names = (
        name
        for name, make in models.items()
        if name.endswith(f"/{patch_size}") and all(make.keywords[key] == value for key, value in shape.items())
    )
    preset = next(names, None)
    return {
        "preset": preset,
        "input_size": side * patch_size if side and side * side == tokens else None,
        "in_channels": in_channels,
        "num_classes": state[LABELS].shape[0] - 1,
        "learn_sigma": state[needed[2]].shape[0] == 2 * in_channels * patch_size**2,
        # What has a sincos table is a LightningDiT, whose file holds the table of its RoPE too if it has one.
        **({"position": ["sincos"]} if tokens and ROPE not in state else {}),
        **(_attention_forms(state, models[preset], hidden_size) if preset else {}),
    }


def _attention_forms(state: Mapping[str, Tensor], make: Callable[..., nn.Module], hidden_size: int) -> dict[str, Any]:
    """kv_heads and qk_norm, options of `ModelConfig`, where the weights have others than `make` gives by default."""
    defaults = {name: parameter.default for name, parameter in signature(make).parameters.items()}
    found: dict[str, Any] = {}
    heads = defaults["num_heads"]
    kv_heads, rest = divmod(len(state.get("blocks.0.attn.qkv.weight", ())) - hidden_size, 2 * (hidden_size // heads))
    if not rest and kv_heads > 0 and kv_heads != (defaults.get("num_kv_heads") or heads):
        found["kv_heads"] = kv_heads
    large = "num_kv_heads" in defaults
    normed = "blocks.0.attn.q_norm.weight" in state
    if normed != defaults["qk_norm" if large else "use_qknorm"]:
        form = {"kind": "layer", "eps": 1e-5, "bias": True} if large else {"kind": "rms"}
        found["qk_norm"] = form | {"weight": True} if normed else None
    return found


def fit_state_dict(
    state: Mapping[str, Tensor], target: nn.Module | Mapping[str, Tensor], *, generator: torch.Generator | None = None
) -> tuple[dict[str, Tensor], list[str]]:
    """`state` made loadable into `target` (a model or its state dict), in the target's order, and notes for the log.

    Another number of classes is the one difference allowed: the label table is made anew, N(0, 0.02) from `generator`
    (by default one of seed 0), and the rest kept. Raises ConvertError for any other, with the first differing names,
    both shapes, and the model that would fit.
    """
    wanted = target.state_dict() if isinstance(target, nn.Module) else target
    different = {
        name: f"{name}: checkpoint {_shape(state, name)}, model {_shape(wanted, name)}"
        for name in dict.fromkeys([*wanted, *state])
        if _shape(state, name) != _shape(wanted, name)
    }
    notes = []
    fitted = dict(state)
    same_keys = state.keys() == wanted.keys()
    if different.keys() == {LABELS} and same_keys and state[LABELS].shape[1:] == wanted[LABELS].shape[1:]:
        old, new = state[LABELS], wanted[LABELS]
        generator = generator or torch.Generator().manual_seed(0)
        fitted[LABELS] = torch.empty(new.shape, dtype=old.dtype).normal_(0, 0.02, generator=generator)
        notes.append(
            f"label table made anew for {len(new) - 1} classes (the checkpoint has {len(old) - 1}); "
            "all other weights kept"
        )
    elif different:
        raise ConvertError(
            f"the checkpoint does not fit the model: {_some(list(different.values()))}. {_fitting(state)}"
        )
    casts = {(fitted[name].dtype, value.dtype) for name, value in wanted.items() if fitted[name].dtype != value.dtype}
    notes.extend(sorted(f"loading casts {given} to {own}" for given, own in casts))
    return {name: fitted[name] for name in wanted}, notes


def export_official(path: str | Path, state: Mapping[str, Tensor], ema: Mapping[str, Tensor] | None = None) -> None:
    """Write weights as the official code reads them: fp32, in its order, a bare dict, or {model, ema} with `ema` given.

    A .safetensors file holds one set of weights. The file appears whole or not at all. Raises ConvertError for weights
    that are not those of an adaLN-Zero DiT or of a model with SwiGLU, and for another suffix.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".pth", ".safetensors") or (path.suffix == ".safetensors" and ema is not None):
        raise ConvertError(f"cannot write weights to {path}: use .pt or .pth, or .safetensors for one set of weights")
    content: dict[str, Any] = _official(state) if ema is None else {"model": _official(state), "ema": _official(ema)}
    with replacing(path) as file:
        if path.suffix == ".safetensors":
            file.write(to_safetensors(content))
        else:
            torch.save(content, file)


def _official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = _unwrapped(state)
    found = infer_config(state)
    # A LightningDiT's names are the official ones; a LargeDiT's are ditfast's, which its own converter knows.
    keys = list(state) if SWIGLU in state else official_keys(found["depth"])
    extra = sorted(set(state) - set(keys))
    if extra:
        raise ConvertError(f"the official DiT has no {_some(extra)}; only adaLN-Zero models can be exported")
    # clone: a slice or a tied tensor would drag its whole storage into the file.
    return {name: state[name].detach().to("cpu", torch.float32, copy=True).contiguous() for name in keys}


def _read(path: Path) -> Any:
    """The content of a weight file, without running code from it."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ConvertError(
            f"{path} was refused: {_foreign(path)}, which could run code. "
            "Ask its author for a .safetensors file or a plain state dict"
        ) from error
    except Exception as error:  # damaged bytes make the readers fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ConvertError(f"{path} cannot be read, it is damaged or no weight file: {reason}") from error


def _foreign(path: Path) -> str:
    """What else than tensors and plain values a refused pickle would import; finding out does not run it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        names = []
    return f"it calls for {_some(sorted(names))}" if names else "it is damaged or holds more than tensors and values"


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes that DDP and torch.compile put before every name."""
    result = dict(state)
    while prefix := next((p for p in _WRAPPERS if result and all(name.startswith(p) for name in result)), None):
        result = {name.removeprefix(prefix): value for name, value in result.items()}
    return result


def _fitting(state: Mapping[str, Tensor]) -> str:
    """A sentence that names the model for which these weights are."""
    try:
        config = infer_config(state)
    except ConvertError as error:
        return str(error)
    preset = config.pop("preset")
    arguments = ", ".join(f"{name}={value}" for name, value in config.items())
    return f"The checkpoint is for {preset or 'DiT'}: {arguments}"


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...] | str:
    return tuple(state[name].shape) if name in state else "has none"


def _some(items: list[str], count: int = 4) -> str:
    """The first few of `items`, and how many more there are."""
    rest = len(items) - count
    return ", ".join(items[:count]) + (f" and {rest} more" if rest > 0 else "")
