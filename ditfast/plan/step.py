"""The time of a training step on one GPU, from FLOPs, bytes and what the GPU reaches at most."""

import inspect
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ditfast import kernels
from ditfast.config import ConfigError, Precision
from ditfast.hardware import Ceilings, rate_name
from ditfast.kernels.spec import Case
from ditfast.layers import DiffusionTransformer, attention_macs, linear_rows, mlp_linears, policy_of_block
from ditfast.layers.architecture import MODULATION
from ditfast.plan.memory import trainable


@dataclass(frozen=True)
class Factor:
    """A number that the model counts on, mostly a share of a ceiling, and why."""

    value: float
    reason: str


# Until bench/ has measured these on a GPU they are single measurements, targets or estimates, as each says.
FACTORS = {
    "gemm by datasheet": Factor(0.80, "8192^3 in bf16 on an H200: 790 of 989 TFLOP/s, measured"),
    "copy by datasheet": Factor(0.90, "copy on an H200: 4.3 of 4.8 TB/s, measured"),
    "gemm": Factor(0.87, "DiT's shapes over 8192^3: K and N of a few thousand, weight gradients (estimate)"),
    "attention": Factor(0.60, "of the GEMM rate on long sequences: as FA2 on A100 and cuDNN on Hopper (estimate)"),
    "attention tokens": Factor(
        138, "tokens that reach half of it: 230 TFLOP/s at 256 and head_dim 72 on an H200 (target)"
    ),
    "elementwise": Factor(0.88, "of the copy bandwidth: one-pass norm kernels 92 % forward, 85 % backward (target)"),
    "optimizer": Factor(0.86, "of the copy bandwidth: AdamW + EMA in one pass, 7.0 ms for 6.0 (target)"),
    "rest": Factor(0.012, "of the others, on top: embeddings, loss, q_sample, gaps between kernels (estimate)"),
}


@dataclass(frozen=True)
class StepTime:
    """Milliseconds of a step: matrix products, attention, norms with modulation and residuals, GELU and its gradient,
    bias gradients, optimizer with EMA and casts of weights, the rest, and communication that nothing hides.
    """

    gemm: float
    attention: float
    elementwise: float
    gelu: float
    bias: float
    optimizer: float
    rest: float
    communication: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Share:
    """What one GPU does of a step: `micro_batches` of `images`, of whose tokens or heads it has one part in `parts`.

    tensor        of `parts`, how many split the weights too
    optimizer     ranks over which the optimizer's state is sharded
    """

    images: int
    micro_batches: int = 1
    parts: int = 1
    tensor: int = 1
    optimizer: int = 1


@dataclass(frozen=True)
class Rates:
    """FLOP/s of large matrix products and bytes/s of large copies that programs reach."""

    gemm: float
    copy: float


def rates(ceilings: Ceilings, precision: Precision) -> Rates:
    """The rates for a precision, from measured ceilings or, by a factor, from a datasheet's; ConfigError for none."""
    name, derated = rate_name(precision), ceilings.source == "datasheet"
    if name not in ceilings.gemm_tflops:
        raise ConfigError(
            f"{ceilings.machine} has no GEMM rate of {name}, there are {', '.join(ceilings.gemm_tflops) or 'none'}: "
            "choose another --precision, or measure by python -m bench limits"
        )
    gemm = FACTORS["gemm by datasheet"].value if derated else 1.0
    copy = FACTORS["copy by datasheet"].value if derated else 1.0
    return Rates(1e12 * gemm * ceilings.gemm_tflops[name], 1e9 * copy * ceilings.copy_gbps)


def step_time(
    model: DiffusionTransformer, precision: Precision, policy: str, share: Share, reached: Rates, emas: int = 1
) -> StepTime:
    """The time of a step without communication; ValueError for an unknown policy. `model` may be on meta."""
    policies, copy = [policy_of_block(policy, i) for i in range(len(model.blocks))], reached.copy
    gemm = sum(_gemm_seconds(model, precision, policies, share, reached))
    attention = attention_flops(model, policies) * share.images / share.parts
    attention /= reached.gemm * _attention_share(model)
    passes = stream_bytes(model, precision, policies, share.images)
    stream = {name: count / share.parts / (copy * FACTORS["elementwise"].value) for name, count in passes.items()}
    weights, casts = optimizer_bytes(model, precision, emas)
    optimizer = weights / share.optimizer + casts * share.micro_batches
    seconds = {
        "gemm": share.micro_batches * gemm,
        "attention": share.micro_batches * attention,
        **{name: share.micro_batches * each for name, each in stream.items()},
        "optimizer": optimizer / share.tensor / (copy * FACTORS["optimizer"].value),
    }
    seconds["rest"] = FACTORS["rest"].value * sum(seconds.values())
    return StepTime(**{name: 1e3 * each for name, each in seconds.items()})


def gemm_flops(model: DiffusionTransformer, policies: list[str]) -> dict[str, int]:
    """FLOPs of every Linear and convolution for one image, forward and backward and what a policy computes again."""
    return {
        name: 2 * rows * layer.weight.numel() * _passes(model, name, policies)
        for name, (layer, rows) in linear_rows(model).items()
    }


def attention_flops(model: DiffusionTransformer, policies: list[str]) -> int:
    """FLOPs of both attention products for one image, forward and backward and what a policy computes again.

    The backward counts twice the forward; the scores that every fused attention computes again in it do not count.
    """
    forward = 2 * attention_macs(model)
    return 3 * forward + forward * policies.count("block") // len(policies)


def _passes(model: DiffusionTransformer, name: str, policies: list[str]) -> int:
    """How often a step has this Linear's product: forward, both gradients, and again by its block's policy.

    The inputs of the first layers have no gradient.
    """
    if name in ("x_embedder.proj", "t_embedder.mlp.0"):
        return 2
    parts = name.split(".")
    if parts[0] != "blocks":
        return 3
    policy, layer = policies[int(parts[1])], ".".join(parts[2:])
    first, last = mlp_linears(model)
    if policy == "mlp":
        return 3 + (layer == first)
    # A block's modulation is computed before it, and its last product, the recomputation's end, is for its gate.
    unread = "adaLN_modulation" in layer or (layer == last and "gate" not in MODULATION.get(model.block, ()))
    return 3 + (policy == "block" and not unread)


def _gemm_seconds(
    model: DiffusionTransformer, precision: Precision, policies: list[str], share: Share, reached: Rates
) -> list[float]:
    """Of each layer: as long as its FLOPs or its bytes take, whatever is longer."""
    rate, copy = reached.gemm * FACTORS["gemm"].value, reached.copy * FACTORS["elementwise"].value
    seconds, size = [], precision.compute.itemsize
    for name, (layer, rows) in linear_rows(model).items():
        weight = layer.weight.numel()
        # What is computed once a sample, the conditioning, is not split.
        parts, tensor = (share.parts, share.tensor) if name.startswith("blocks.") and rows > 2 else (1, 1)
        local = rows * share.images * tensor / parts
        width = layer.weight.shape[0]
        flops = 2 * local * weight / tensor
        moved = size * (weight / tensor + local * (width + weight / width) / tensor)
        seconds.append(_passes(model, name, policies) * max(flops / rate, moved / copy))
    return seconds


def _attention_share(model: DiffusionTransformer) -> float:
    """Of the GEMM rate; kernels work on multiples of 32 channels of a head, and short sequences do not fill them."""
    dim, tokens = model.architecture.head_dim, model.x_embedder.num_patches
    useful = dim / (32 * -(-dim // 32))
    return FACTORS["attention"].value * useful * tokens / (tokens + FACTORS["attention tokens"].value)


def stream_bytes(
    model: DiffusionTransformer, precision: Precision, policies: list[str], images: int
) -> dict[str, float]:
    """Bytes that the ops between the matrix products move for some images: "elementwise", "gelu" and "bias".

    Of a norm with its residual and modulation, of QK-norm with rotation, and of an activation's backward, the fewest
    possible, by the ops' own count. "gelu" is a SwiGLU's too.
    """
    a = model.architecture
    tokens, width = model.x_embedder.num_patches + (2 if model.block == "in_context" else 0), a.hidden_size
    compute, mixed = precision.compute, precision.stream is not precision.compute
    sizes = {"B": images, "T": tokens, "D": width}
    ops = ["gate_residual_adaln_modulate"] if a.adaptive else ["adaln_modulate", "gate_residual"]
    counted = [_op_bytes(name, sizes, compute, mixed) for name in ops]
    site = {way: sum(count[way] for count in counted) for way in ("fwd", "bwd")}
    sites, again = 3 if model.block == "cross_attention" else 2, sum(policy != "none" for policy in policies)
    blocks = len(policies)
    elementwise = (blocks * sites + 1) * (site["fwd"] + site["bwd"]) + again * sites * site["fwd"]
    if a.rope or a.qk_norm:
        heads = {"N": a.qkv_heads, "head_dim": a.head_dim, "half": a.head_dim // 2}
        # Its parameters and angles are a thousandth of what it moves, whatever a norm is over.
        heads |= dict.fromkeys(("q_channels", "k_channels"), a.head_dim)
        without = _spec("qk_norm_rope").optional
        turned = _op_bytes("qk_norm_rope", sizes | heads, compute, False, without, num_heads=a.num_heads, norm="none")
        elementwise += blocks * sum(turned.values()) + again * turned["fwd"]
    layers = linear_rows(model)
    first = mlp_linears(model)[0]
    hidden = layers[f"blocks.0.{first}"][0].weight.shape[0]
    rows = images * tokens
    activation = rows * (hidden + a.mlp_width) * compute.itemsize
    backward = "swiglu_backward" if a.mlp == "swiglu" else "gelu_backward"
    activation_bwd = _op_bytes(backward, {"M": rows, "F": a.mlp_width}, compute, mixed)["fwd"]
    # The bias gradient of the MLP's first layer is summed there; the others read the gradient of their layer's output.
    biased = [
        layer.weight.shape[0] * r * images
        for name, (layer, r) in layers.items()
        if r > 2 and layer.bias is not None and not name.endswith(first)
    ]
    return {
        "elementwise": elementwise,
        "gelu": blocks * (activation + activation_bwd) + policies.count("block") * activation,
        "bias": sum(biased) * compute.itemsize,
    }


def optimizer_bytes(model: DiffusionTransformer, precision: Precision, emas: int = 1) -> tuple[int, int]:
    """(bytes of an update with EMAs and the gradients' norm, bytes of autocast's casts in a forward and backward)."""
    count, p = trainable(model), precision

    def numbers(dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.empty(count, dtype=dtype, device="meta")]

    inputs: dict[str, Any] = {name: numbers(p.optimizer) for name in ("weights", "exp_avgs", "exp_avg_sqs")}
    inputs |= {"grads": numbers(p.grads), "emas": [numbers(p.ema) for _ in range(emas)]}
    inputs |= {
        "copies": numbers(p.params) if p.params is not p.optimizer else [],
        "steps": torch.empty(1, device="meta"),
    }
    casts = 0
    if p.compute is not p.params:
        casts = count * (p.params.itemsize + p.compute.itemsize) + count * (p.compute.itemsize + p.grads.itemsize)
    return _spec("adamw_ema").bytes_min(inputs)["fwd"] + count * p.grads.itemsize, casts


def _op_bytes(
    name: str, sizes: dict[str, int], dtype: torch.dtype, mixed: bool, absent: tuple[str, ...] = (), **arguments: Any
) -> dict[str, int]:
    spec = _spec(name)
    # A norm over an fp32 stream gives what its Linear computes in.
    dtypes = tuple({"out_dtype"} & inspect.signature(spec.fn).parameters.keys())
    case = Case("plan", sizes, arguments, mixed=mixed, absent=absent, dtypes=dtypes)
    return spec.bytes_min(spec.make_inputs(case, dtype, "meta"))


def _spec(name: str) -> kernels.OpSpec:
    return next(spec for spec in kernels.OPS if spec.name == name)
