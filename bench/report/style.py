"""How every figure looks: colours that stay apart for colour-blind readers (Okabe & Ito), type sizes, who is which."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY, INK = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C", "#222222"
DTYPE_COLOURS = {"bf16": BLUE, "fp16": GREEN, "fp32": ORANGE, "tf32": PURPLE}
PROVIDER_COLOURS = {"ditfast": BLUE, "ditfast graph": GREEN, "compile": ORANGE, "eager": GREY, "fast-DiT": VERMILION}
CLASS_COLOURS = {
    "GEMM": BLUE, "attention": ORANGE, "norm, modulate, gate": GREEN, "GELU": PURPLE,
    "casts and copies": SKY, "optimizer": VERMILION, "loss": INK, "data": YELLOW, "other": GREY,
}  # fmt: skip
WIDTH = 8.5  # inches
RC: Any = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": INK, "axes.axisbelow": True,
    "text.color": INK, "axes.labelcolor": INK, "legend.frameon": False, "figure.constrained_layout.use": True,
    "svg.hashsalt": "ditfast",
}  # fmt: skip


@contextmanager
def drawing() -> Iterator[Any]:
    """pyplot without a display, in this style; closes what was drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(RC):
        yield pyplot
    pyplot.close("all")


def png(figure: Any) -> bytes:
    """The figure as PNG, of which equal data give equal bytes."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=120, metadata={"Software": None})
    return file.getvalue()
