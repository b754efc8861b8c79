"""The goals on one H200, each with what finds its measured figure among an H200's rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.report.markdown import NOT_MEASURED, number, table
from bench.rows import DITFAST, Row

DEVICE = "H200"


@dataclass(frozen=True)
class Target:
    """A goal; `figure` gives a row's figure as text, None of a row that is not about it."""

    goal: str
    commit: str
    stretch: str
    figure: Callable[[Row], str | None]


def _own(row: Row, suite: str, name: str, shape: str = "") -> bool:
    timed = row.ms is not None and row.provider == DITFAST
    return timed and row.suite == suite and row.name == name and shape in row.shape


def _training(text: Callable[[Row], str]) -> Callable[[Row], str | None]:
    return lambda row: (
        text(row) if _own(row, "model", "DiT-XL/2", "256 px, batch 256") and row.dtype == "bf16" else None
    )


def _op(name: str, shape: str, text: Callable[[Row], str]) -> Callable[[Row], str | None]:
    return lambda row: text(row) if _own(row, "ops", name, shape) else None


def _sampling(batch: int) -> Callable[[Row], str | None]:
    def figure(row: Row) -> str | None:
        of_it = _own(row, "sample", "DiT-XL/2 ddim-50", f"256 px, batch {batch}") and row.shape.endswith(f" {batch}")
        return f"{number(row.extra['ms_per_image'])} ms" if of_it else None

    return figure


def _rate(row: Row) -> str:
    mfu = row.extra.get("mfu")
    return f"{number(row.extra['images_per_s'])} images/s" + ("" if mfu is None else f", {mfu:.1%} MFU")


def _ratio(row: Row) -> str:
    return NOT_MEASURED if row.ratio_to_compile is None else f"{row.ratio_to_compile:.2f}x"


def _limit(row: Row) -> str:
    return NOT_MEASURED if row.percent_of_limit is None else f"{row.percent_of_limit:.0f} %"


def _tflops(row: Row) -> str:
    return f"{number(row.extra['flops'] / (row.ms or 1) / 1e9)} TFLOP/s"


def _milliseconds(row: Row) -> str:
    return f"{number(row.ms)} ms"


def _memory(policy: str) -> Callable[[Row], str | None]:
    """Weights and state as well, where the suite gives them as `state_bytes`."""

    def figure(row: Row) -> str | None:
        of_it = _own(row, "model", f"DiT-XL/2 recompute={policy}", "256 px, batch 256") and row.dtype == "bf16"
        held = row.extra.get("state_bytes")
        return f"{number((held + row.peak_bytes) / 1e9)} GB" if of_it and held and row.peak_bytes else None

    return figure


def _never(row: Row) -> None:
    return None


TARGETS = (
    Target("training in bf16, 256 px, batch 256", "750 images/s, 54 % MFU", "850, 61 %", _training(_rate)),
    Target("the same against torch.compile", "1.15x", "1.25x", _training(_ratio)),
    Target("training in FP8", "950 images/s", "1,080", _never),
    Target("peak memory at batch 256, no GEMM recomputed", "68 GB", "63 GB", _memory("ops")),
    Target("with fc1 recomputed", "48 GB", "46 GB", _memory("mlp")),
    Target("with whole blocks recomputed", "23 GB", "21 GB", _memory("block")),
    Target("sampling, batch 1, DDIM-50 with guidance", "85 ms", "65 ms", _sampling(1)),
    Target("sampling, batch 32, an image", "43 ms", "38 ms", _sampling(32)),
    Target("adaLN-modulate forward", "92 % of the limit", "97 %", _op("adaln_modulate fwd", "DiT-XL/2:", _limit)),
    Target("adaLN-modulate backward", "85 % of the limit", "92 %", _op("adaln_modulate bwd", "DiT-XL/2:", _limit)),
    Target("fused backward against torch.compile", "1.3x", "1.5x",
           _op("gate_residual_adaln_modulate bwd", "DiT-XL/2:", _ratio)),
    Target("attention, head_dim 72, T 256, forward", "250 TFLOP/s", "320", _op("attention fwd", "DiT-XL/2:", _tflops)),
    Target("the same, backward", "220 TFLOP/s", "300", _op("attention bwd", "DiT-XL/2:", _tflops)),
    Target("attention, head_dim 72, T 1024, forward", "300 TFLOP/s", "380",
           _op("attention fwd", "DiT-XL/2, T = 1024:", _tflops)),
    Target("the same, backward", "240 TFLOP/s", "320", _op("attention bwd", "DiT-XL/2, T = 1024:", _tflops)),
    Target("AdamW + EMA + cast", "7 ms", "6.3 ms", _op("adamw_ema fwd", "DiT-XL/2", _milliseconds)),
)  # fmt: skip


def targets(rows: Sequence[Row]) -> str:
    """The goals beside what `rows`, of an H200, have measured."""
    lines = []
    for target in TARGETS:
        found = next((text for row in rows if (text := target.figure(row))), NOT_MEASURED)
        lines.append((target.goal, target.commit, target.stretch, found))
    return table(("on one H200", "goal", "stretch", "measured"), lines)
