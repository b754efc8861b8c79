"""Stand-ins for the libraries: what each documents that its functions compute, in PyTorch, under their signatures."""

import importlib.util
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from ditfast.kernels.peers import _base


def liger_layer_norm(X, W, B, eps):
    return F.layer_norm(X, X.shape[-1:], W, B, eps)


def liger_rms_norm(X, W, eps, offset=0.0, casting_mode="llama", in_place=True):
    assert (offset, casting_mode, in_place) == (0.0, "gemma", False)
    return F.rms_norm(X, X.shape[-1:], W, eps)


def liger_modulated_rms_norm(X, W, scale, shift, eps, offset=0.0, casting_mode="llama", in_place=True):
    y = liger_rms_norm(X, W, eps, offset, casting_mode, in_place) * (1 + scale.unsqueeze(1))
    return y if shift is None else y + shift.unsqueeze(1)


def rotate_halves(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def liger_rope(q, k, cos, sin):
    assert q.shape[2] == k.shape[2] == cos.shape[0] and q.shape[3] == cos.shape[1]
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)


def liger_silu_mul(a, b):
    return F.silu(a) * b


LIGER = {
    "layer_norm.LigerLayerNormFunction": liger_layer_norm,
    "rms_norm.LigerRMSNormFunction": liger_rms_norm,
    "modulated_rms_norm.LigerModulatedRMSNormFunction": liger_modulated_rms_norm,
    "rope.LigerRopeFunction": liger_rope,
    "swiglu.LigerSiLUMulFunction": liger_silu_mul,
}


def apex_rms_norm(input, normalized_shape, eps=1e-6):
    return F.rms_norm(input, normalized_shape, None, eps)


def apex_rms_norm_affine(input, weight, normalized_shape, eps=1e-6):
    return F.rms_norm(input, normalized_shape, weight, eps)


def apex_layer_norm(input, normalized_shape, eps=1e-6):
    return F.layer_norm(input, normalized_shape, None, None, eps)


def apex_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def apex_dense_gelu_dense(input, weight1, bias1, weight2, bias2):
    assert input.ndim == 2 and input.is_contiguous()
    return F.linear(F.gelu(F.linear(input, weight1, bias1), approximate="tanh"), weight2, bias2)


def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction, decay):
    """What apex's kernel computes, in PyTorch."""
    assert mode == bias_correction == 1 and len({t.dtype for tensors in lists for t in tensors}) == 1
    for g, w, m, v in zip(*lists, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        w.sub_(lr * (update + decay * w))


def multi_tensor_applier(kernel, noop, lists, *args):
    return kernel(65536, noop, lists, *args)


def flash_attn_norm(x, weight, bias, residual=None, eps=1e-6, is_rms_norm=False):
    assert residual is None
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    assert bias is None
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def flash_attn_rotary(x, cos, sin, interleaved=False, inplace=False):
    assert x.dtype == cos.dtype == sin.dtype and x.shape[1] == cos.shape[0]
    if not interleaved:
        return rotate_halves(x, *(torch.cat((t, t), -1).unsqueeze(1) for t in (cos, sin)))
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def flash_attn_mlp(x, weight1, weight2, bias1=None, bias2=None, activation=None, checkpoint_lvl=0, heuristic=0):
    assert activation == "gelu_approx" and checkpoint_lvl in (0, 2) and heuristic in (-1, 0)
    return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate="tanh"), weight2, bias2)


def xformers_swiglu(x, w1, b1, w2, b2, w3, b3):
    return F.linear(F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2), w3, b3)


class DotProductAttention:
    """Transformer Engine's module, which joins the heads of its result."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        *,
        num_gqa_groups,
        attention_dropout,
        qkv_format,
        attn_mask_type,
        softmax_scale,
    ):
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "bshd", "no_mask")
        self.shapes = (num_attention_heads, kv_channels), (num_gqa_groups, kv_channels)
        self.scale = softmax_scale

    def __call__(self, query_layer, key_layer, value_layer):
        assert (query_layer.shape[2:], key_layer.shape[2:]) == self.shapes
        q, k, v = (t.transpose(1, 2) for t in (query_layer, key_layer, value_layer))
        o = F.scaled_dot_product_attention(q, k, v, scale=self.scale, enable_gqa=True)
        return o.transpose(1, 2).flatten(2)


MODULES = {
    "fused_layer_norm_cuda": {},
    "fused_dense_cuda": {},
    "apex.normalization.fused_layer_norm": {
        "fused_rms_norm": apex_rms_norm,
        "fused_rms_norm_affine": apex_rms_norm_affine,
        "fused_layer_norm": apex_layer_norm,
        "fused_layer_norm_affine": apex_layer_norm_affine,
    },
    "apex.fused_dense": {"fused_dense_gelu_dense_function": apex_dense_gelu_dense},
    "apex.multi_tensor_apply": {"multi_tensor_applier": multi_tensor_applier},
    "amp_C": {"multi_tensor_adam": multi_tensor_adam},
    "flash_attn.ops.triton.layer_norm": {"layer_norm_fn": flash_attn_norm},
    "flash_attn.ops.fused_dense": {"fused_mlp_func": flash_attn_mlp},
    "flash_attn.layers.rotary": {"apply_rotary_emb": flash_attn_rotary},
    "xformers.ops": {"swiglu": xformers_swiglu},
    "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention},
    "transformer_engine.pytorch.optimizers": {"multi_tensor_applier": multi_tensor_applier},
    "transformer_engine_torch": {"multi_tensor_adam": multi_tensor_adam},
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Every library in place; of an installed Liger its own classes, whose signatures the calls then have to fit."""

    def add(path, names):
        parent, _, child = path.rpartition(".")
        if parent and parent not in sys.modules:
            add(parent, {})
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        if parent:
            monkeypatch.setattr(sys.modules[parent], child, sys.modules[path], raising=False)
        for name, value in names.items():
            monkeypatch.setattr(sys.modules[path], name, value, raising=False)

    monkeypatch.setattr(_base, "_kind", lambda device: "cuda")
    for path, names in MODULES.items():
        add(path, names)
    installed = importlib.util.find_spec("liger_kernel") is not None
    for path, compute in LIGER.items():
        module, name = path.split(".")
        module = f"liger_kernel.ops.{module}"
        if not installed:
            add(module, {name: SimpleNamespace(apply=compute)})
        else:
            real = getattr(importlib.import_module(module), name)
            monkeypatch.setattr(real, "apply", fitting(inspect.signature(real.forward), compute))


def fitting(signature, compute):
    """compute, of arguments that the library's own function takes too."""

    def apply(*args):
        signature.bind(None, *args)
        return compute(*args)

    return apply
