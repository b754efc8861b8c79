"""ditfast: an engine for Diffusion Transformers. Names load on first use; importing this costs nothing."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DiT": "ditfast.layers",
    "DiT_models": "ditfast.layers",
    "SiT": "ditfast.layers",
    "SiT_models": "ditfast.layers",
    "LightningDiT": "ditfast.layers",
    "LightningDiT_models": "ditfast.layers",
    "LargeDiT": "ditfast.layers",
    "LargeDiT_models": "ditfast.layers",
    "create_diffusion": "ditfast.diffusion",
    "accelerate": "ditfast.acceleration",
    "restore": "ditfast.acceleration",
    "kernels": "ditfast.kernels",
    "layers": "ditfast.layers",
    "diffusion": "ditfast.diffusion",
    "reference": "ditfast.reference",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ditfast' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = importlib.import_module(_HOMES[name])
    return module if module.__name__.endswith(f".{name}") else getattr(module, name)
