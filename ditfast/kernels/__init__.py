"""The ops of the engine: plain functions and `torch.ops.ditfast.*`, one op a file, all listed in OPS.

Importing compiles nothing and needs neither a GPU nor Triton. Each function takes `backend`: "auto", or one by name;
`backend_of` says what "auto" takes where. Nothing falls back silently: a backend that cannot run raises BackendError.
"""

import torch

from ._capture import captured_tables
from ._op import BackendError
from .adaln_modulate import SPEC as _ADALN_MODULATE
from .adaln_modulate import adaln_modulate, rms_norm
from .adamw_ema import SPEC as _ADAMW_EMA
from .adamw_ema import adamw_ema
from .attention import PACKED_SPEC as _ATTENTION_QKVPACKED
from .attention import SPEC as _ATTENTION
from .attention import attention, attention_qkvpacked
from .autotune import tuned_in_use, use_pinned, use_tuned
from .diffusion_loss import SPEC as _DIFFUSION_LOSS
from .diffusion_loss import diffusion_loss
from .gate_residual import SPEC as _GATE_RESIDUAL
from .gate_residual import gate_residual
from .gate_residual_adaln_modulate import SPEC as _GATE_RESIDUAL_ADALN_MODULATE
from .gate_residual_adaln_modulate import gate_residual_adaln_modulate
from .gelu_backward import SPEC as _GELU_BACKWARD
from .gelu_backward import gelu_backward
from .gelu_mlp import SPEC as _GELU_MLP
from .gelu_mlp import gelu_mlp
from .guided_step import SPEC as _GUIDED_STEP
from .guided_step import guided_step
from .patchify import SPEC as _PATCHIFY
from .patchify import patchify
from .q_sample import SPEC as _Q_SAMPLE
from .q_sample import q_sample
from .qk_norm_rope import SPEC as _QK_NORM_ROPE
from .qk_norm_rope import qk_norm_rope
from .spec import OpSpec
from .swiglu_backward import SPEC as _SWIGLU_BACKWARD
from .swiglu_backward import swiglu_backward
from .swiglu_mlp import SPEC as _SWIGLU_MLP
from .swiglu_mlp import swiglu_mlp
from .timestep_embedding import SPEC as _TIMESTEP_EMBEDDING
from .timestep_embedding import timestep_embedding
from .unpatchify import SPEC as _UNPATCHIFY
from .unpatchify import unpatchify

OPS: tuple[OpSpec, ...] = (
    _ADALN_MODULATE,
    _GATE_RESIDUAL,
    _GATE_RESIDUAL_ADALN_MODULATE,
    _ATTENTION,
    _ATTENTION_QKVPACKED,
    _QK_NORM_ROPE,
    _GELU_MLP,
    _GELU_BACKWARD,
    _SWIGLU_MLP,
    _SWIGLU_BACKWARD,
    _TIMESTEP_EMBEDDING,
    _PATCHIFY,
    _UNPATCHIFY,
    _Q_SAMPLE,
    _DIFFUSION_LOSS,
    _GUIDED_STEP,
    _ADAMW_EMA,
)


def backend_of(name: str, device: str | torch.device, dtype: torch.dtype, backend: str = "auto") -> str:
    """The backend that op `name` takes for tensors of this device and dtype; BackendError where it cannot run.

    ValueError for a name that is not in OPS.
    """
    specs = {spec.name: spec for spec in OPS}
    if name not in specs:
        raise ValueError(f"no op {name!r}; there are {', '.join(specs)}")
    return specs[name].op.choose(backend, torch.device(device), dtype)


__all__ = [
    "OPS",
    "BackendError",
    "OpSpec",
    "adaln_modulate",
    "adamw_ema",
    "attention",
    "attention_qkvpacked",
    "backend_of",
    "captured_tables",
    "diffusion_loss",
    "gate_residual",
    "gate_residual_adaln_modulate",
    "gelu_backward",
    "gelu_mlp",
    "guided_step",
    "patchify",
    "q_sample",
    "qk_norm_rope",
    "rms_norm",
    "swiglu_backward",
    "swiglu_mlp",
    "timestep_embedding",
    "tuned_in_use",
    "unpatchify",
    "use_pinned",
    "use_tuned",
]
