"""What a model of the family is, in one description from which every preset comes."""

from dataclasses import dataclass, fields

MODULATION = {  # what modulates each of a block's two branches, in the order of adaLN_modulation's rows
    "adaln_zero": ("shift", "scale", "gate"),
    "adaln": ("shift", "scale"),
    "adaln_zero_no_shift": ("scale", "gate"),
}
BLOCK_VARIANTS = (*MODULATION, "cross_attention", "in_context")
POSITIONS = {  # the width that a position divides into pairs, of sincos and rope_2d for each direction, and the divisor
    "sincos": ("hidden_size", 4),
    "rope_1d": ("head_dim", 2),
    "rope_2d": ("head_dim", 4),
}


def check_heads(hidden_size: int, num_heads: int, kv_heads: int | None = None) -> None:
    """ValueError for heads that do not divide the width, or of k and v those of q."""
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} must be divisible by num_heads {num_heads}")
    if kv_heads and num_heads % kv_heads:
        raise ValueError(f"num_heads {num_heads} must be divisible by kv_heads {kv_heads}")


@dataclass(frozen=True)
class NormForm:
    """A norm over the last dim: kind "layer" (arXiv:1607.06450) or "rms" (arXiv:1910.07467), its eps and parameters."""

    kind: str = "layer"  # layer or rms
    eps: float = 1e-6  # added to the variance or the mean square
    weight: bool = False  # whether it has one
    bias: bool = False  # whether it has one; layer alone

    def __post_init__(self) -> None:
        if self.kind not in ("layer", "rms"):
            raise ValueError(f"a norm's kind must be 'layer' or 'rms', got {self.kind!r}")
        if not 0 < self.eps < 1:
            raise ValueError(f"a norm's eps must be positive and below 1, got {self.eps}; 1e-6 is DiT's")
        if self.kind == "rms" and self.bias:
            raise ValueError("an RMSNorm has no bias; leave it out, or take kind='layer'")


@dataclass(frozen=True)
class Architecture:
    """Sizes and forms of a diffusion transformer; the defaults are DiT-XL/2.

    patch_size: side of a square patch.
    hidden_size: width D of a token.
    depth: number of blocks.
    num_heads: heads of q, dividing D.
    kv_heads: heads of k and v, dividing num_heads; None: as many.
    mlp: "gelu" or "swiglu" (arXiv:2002.05202).
    mlp_ratio: width of the MLP over D; of a SwiGLU two thirds of that.
    mlp_multiple: the MLP's width is rounded up to a multiple of it.
    bias: whether the linears of attention and MLP have biases.
    block: how the conditioning enters: "adaln_zero", "adaln" (no gates), "adaln_zero_no_shift" (scales and gates
        alone), "cross_attention" or "in_context".
    norm: of the blocks, before their modulation; without bias, which is the shift's.
    final_norm: of the final layer, as norm.
    qk_norm: norm of q and k before the rotation; None: none.
    qk_norm_over: what qk_norm norms: each "head" or the whole "width".
    position: "sincos" (a table added to the patches), "rope_1d" over the flattened tokens or "rope_2d" over their grid
        (arXiv:2104.09864), or sincos and one of these.
    conditioning_limit: the embeddings of t and y are min(D, this) wide; None: D.
    returns_sigma: False lets forward discard the second half of the channels that `learn_sigma` adds, as SiT does.

    Raises ValueError for sizes that do not divide, unknown forms, and forms that a block variant does not have.
    """

    patch_size: int = 2
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    kv_heads: int | None = None
    mlp: str = "gelu"
    mlp_ratio: float = 4.0
    mlp_multiple: int = 1
    bias: bool = True
    block: str = "adaln_zero"
    norm: NormForm = NormForm()
    final_norm: NormForm = NormForm()
    qk_norm: NormForm | None = None
    qk_norm_over: str = "head"
    position: tuple[str, ...] = ("sincos",)
    conditioning_limit: int | None = None
    returns_sigma: bool = True

    def __post_init__(self) -> None:
        self._check_sizes()
        choices = {"block": BLOCK_VARIANTS, "mlp": ("gelu", "swiglu"), "qk_norm_over": ("head", "width")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        known_positions = set(self.position) <= set(POSITIONS) and len(self.position) == len(set(self.position))
        if not known_positions or {"rope_1d", "rope_2d"} <= set(self.position):
            raise ValueError(f"position must be sincos, rope_1d, rope_2d, or sincos and a rope, got {self.position}")
        for name in self.position:
            size, parts = POSITIONS[name]
            if getattr(self, size) % parts:
                raise ValueError(f"{name} needs a {size} that is a multiple of {parts}, got {getattr(self, size)}")
        if self.norm.bias or self.final_norm.bias:
            raise ValueError("norm and final_norm cannot have a bias: the modulation's shift stands for it")
        if not self.adaptive:
            forms = ("norm", "final_norm", "qk_norm", "mlp", "bias", "position", "kv_heads", "conditioning_limit")
            of_dit = {f.name: f.default for f in fields(self)}
            if other := [name for name in forms if getattr(self, name) != of_dit[name]]:
                raise ValueError(
                    f"block {self.block!r} has DiT's {other[0]} alone, {of_dit[other[0]]!r}; take an adaln block"
                )
        elif self.mlp == "gelu" and not self.bias:
            raise ValueError("mlp 'gelu' has biases; take bias=True, or mlp='swiglu'")

    def _check_sizes(self) -> None:
        counts = ["patch_size", "hidden_size", "depth", "num_heads", "mlp_multiple"]
        counts += [name for name in ("kv_heads", "conditioning_limit") if getattr(self, name) is not None]
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if not self.mlp_ratio * self.hidden_size >= 1:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        check_heads(self.hidden_size, self.num_heads, self.kv_heads)

    @property
    def adaptive(self) -> bool:
        """Whether norms are modulated by the conditioning; it enters as tokens otherwise."""
        return self.block in MODULATION

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def qkv_heads(self) -> int:
        """Heads of q, k and v together."""
        return self.num_heads + 2 * (self.kv_heads or self.num_heads)

    @property
    def mlp_width(self) -> int:
        """Channels of the MLP's activation; a SwiGLU has a gate and a value of as many."""
        width = int(self.hidden_size * self.mlp_ratio)
        if self.mlp == "swiglu":
            width = 2 * width // 3
        return -(-width // self.mlp_multiple) * self.mlp_multiple

    @property
    def conditioning_width(self) -> int:
        return min(self.hidden_size, self.conditioning_limit or self.hidden_size)

    @property
    def rope(self) -> str | None:
        """The rotary position among `position`."""
        return next((name for name in self.position if name.startswith("rope")), None)
