"""The report: its tables, pictures and page, and that PERFORMANCE.md is what the committed results give."""

import html.parser
import itertools
import json
import re
from dataclasses import asdict, replace

import pytest
from matplotlib.text import Text

from bench.machine import ROOT
from bench.report import figures, page, tables, targets
from bench.report.markdown import number, table
from bench.rows import Results, Row
from ditfast.hardware import Ceilings

LIMITS = Ceilings(25.0, {"bf16": 0.26, "fp32": 0.12}, "measured", "a CPU", "2.13")
MACHINE = {"device": "a CPU", "commit": "0123456789abcdef", "threads": 1, "torch": "2.13", "date": "2026-01-01"}
PROVIDERS = {"ditfast": 1.0, "eager": 2.0, "compile": 1.5}


FAST_DIT = "checkpointing on, mixed on, cached on"


def timed(suite: str, name: str, provider: str, ms: float, dtype: str = "bf16", shape: str = "B 8", **extra) -> Row:
    slower = PROVIDERS.get(provider, 1.0)
    ratio = PROVIDERS["compile"] / slower if suite in ("ops", "model", "sample") else None
    return Row(
        suite,
        name,
        provider,
        dtype,
        shape,
        ms * slower,
        ms * slower * 0.9,
        ms * slower * 1.2,
        ratio,
        50.0,
        10**6,
        extra,
    )


def op_rows() -> list[Row]:
    made = []
    for name, stage, dtype, provider in itertools.product(
        ("adaln_modulate", "attention"), ("fwd", "bwd"), ("fp32", "bf16"), PROVIDERS
    ):
        flops = {"flops": 10**8} if name == "attention" else {}
        extra = {"op": name, "case": "DiT-S/2", "pass": stage, "bytes": 10**7, **flops}
        made.append(timed("ops", f"{name} {stage}", provider, 2.0, dtype, **extra))
    return made


CLASSES = {"GEMM": 500.0, "attention": 120.0, "norm, modulate, gate": 80.0, "other": 40.0}
LEAST = {"GEMM": 300.0, "attention": 10.0, "norm, modulate, gate": 60.0}
POLICIES = (("none", 15000.0), ("ops", 9261.0), ("mlp", 8990.0), ("block:2", 9000.0), ("block", 800.0))
SCALE = {"efficiency": 0.8, "communication_share": 0.1}


@pytest.fixture
def rows() -> list[Row]:
    """Rows of every suite, as if measured."""
    shape = "256 px, batch 8"
    return [
        *op_rows(),
        *(timed("model", "DiT-S/2", p, 700.0, shape=shape, images_per_s=11.0, mfu=None) for p in PROVIDERS),
        *(timed("sample", "DiT-S/2 ddim-50", p, 900.0, shape=shape, ms_per_image=100.0) for p in PROVIDERS),
        timed("breakdown", "DiT-S/2", "ditfast", 740.0, classes=CLASSES, least_ms=LEAST),
        timed("breakdown", "DiT-S/2", "eager", 370.0, classes=CLASSES),
        *(Row("memory", f"DiT-S/2 recompute={policy}", "ditfast", precision, "256 px", extra={
            "policy": policy, "precision": precision, "bytes_per_token_layer": measured,
            "estimate_per_token_layer": measured * 1.01,
        }) for policy, measured in POLICIES for precision in ("bf16", "fp32")),
        *(timed("scale", f"DiT-S/2 ranks {n}", "ditfast", 700.0, ranks=n, images_per_s=10.0 * n, **SCALE)
          for n in (1, 2)),
        timed("feed", "DiT-S/2", "ditfast", 700.0, images_per_s=11.0, data_wait=0.02),
        *(timed("fast-dit", FAST_DIT, p, 500.0, shape="DiT-S/2", steps_per_s=2.0,
                state_bytes=10**9) for p in ("ditfast", "fast-DiT")),
        timed("mindone", "step, recompute on, 1 device", "ditfast", 950.0, images_per_s=67.4),
    ]  # fmt: skip


@pytest.fixture
def section(rows) -> tables.Section:
    return tables.sections([Results(MACHINE, asdict(LIMITS), rows)])[0]


@pytest.fixture
def drawn(monkeypatch):
    """Draws a figure and returns it, laid out, in place of its bytes."""

    def keep(figure):
        figure.draw_without_rendering()
        return figure

    monkeypatch.setattr(figures, "png", keep)
    return figures.FIGURES


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_a_picture_of_its_rows_and_nothing_without(name, rows):
    assert figures.FIGURES[name]([], LIMITS) is None
    assert figures.FIGURES[name](rows, LIMITS).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", figures.FIGURES)
def test_no_text_of_a_figure_is_cut_off_or_lies_on_another(name, rows, drawn):
    figure = drawn[name](rows, LIMITS)
    width, height = figure.bbox.size
    boxes = []
    for text in figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible()):
        box = text.get_window_extent()
        if text.get_text().strip() and box.width and text.axes is not None:
            assert box.x0 + 1 >= 0 and box.x1 <= width + 1 and box.y0 + 1 >= 0 and box.y1 <= height + 1, text
            boxes.append((text.get_text(), box.shrunk(0.9, 0.8)))
    covered = [
        (a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if a[1].overlaps(b[1]) and a[1].bounds != b[1].bounds
    ]
    assert not covered


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_axis_says_what_it_shows(name, rows, drawn):
    panels = drawn[name](rows, LIMITS).axes
    assert all(axes.get_xlabel() and axes.get_title(loc="left") for axes in panels)
    assert panels[0].get_ylabel() or any(tick.get_text() for tick in panels[0].get_yticklabels())


def test_the_breakdown_stacks_the_classes(rows, drawn):
    bars = [bar for bar in drawn["breakdown"](rows, LIMITS).axes[0].patches if bar.get_width()]
    assert sorted(bar.get_width() for bar in bars) == sorted([*CLASSES.values(), *CLASSES.values(), *LEAST.values()])


def test_the_roof_stands_at_the_measured_rates(rows, drawn):
    traffic, roof = drawn["roofline"](rows, LIMITS).axes
    assert 25.0 in [line.get_xdata()[0] for line in traffic.lines if len(set(line.get_xdata())) == 1]
    assert {max(line.get_ydata()) for line in roof.lines if len(line.get_xdata()) == 3} == {260.0, 120.0}
    # 1e8 FLOPs and 1e7 bytes in 2 ms.
    assert (10.0, pytest.approx(50.0)) in [tuple(p[0] for p in line.get_data()) for line in roof.lines]
    assert pytest.approx(5.0) in [line.get_xdata()[0] for line in traffic.lines if len(line.get_xdata()) == 1]


@pytest.mark.parametrize("slowest", [0.05, 0.3, 0.9])
def test_ratios_far_apart_have_ticks_apart(slowest, drawn):
    rows = [row if i else replace(row, ratio_to_compile=slowest) for i, row in enumerate(op_rows())]
    axes = drawn["ratios"](rows, LIMITS).axes[0]
    boxes = [tick.get_window_extent() for tick in axes.get_xticklabels()]
    assert len(boxes) > 2 and not [p for p in itertools.pairwise(boxes) if p[0].overlaps(p[1])]


def test_a_faster_op_is_right_of_one_and_a_slower_one_left(drawn):
    row = op_rows()[0]
    extra = [row.extra | {"op": name} for name in ("fast", "slow")]
    rows = [replace(row, ratio_to_compile=ratio, extra=e) for ratio, e in zip((2.0, 0.5), extra, strict=True)]
    bars = [bar for bar in drawn["ratios"](rows, LIMITS).axes[0].patches if bar.get_width()]
    assert sorted((bar.get_x(), bar.get_width()) for bar in bars) == [(1, -0.5), (1, 1.0)]


@pytest.mark.parametrize("name", ["breakdown", "ratios", "steps", "memory"])
def test_bars_do_not_cover_each_other(name, rows, drawn):
    for axes in drawn[name](rows, LIMITS).axes:
        boxes = [bar.get_bbox().shrunk(0.99, 0.99) for bar in axes.patches if bar.get_width()]
        assert len(boxes) > 1
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_memory_stands_beside_its_estimate(rows, drawn):
    lengths = [bar.get_width() for bar in drawn["memory"](rows, LIMITS).axes[0].patches]
    measured = [value for _, value in POLICIES]
    assert lengths == pytest.approx([*measured, *(1.01 * value for value in measured)])


def test_models_of_one_precision_have_a_panel_each(rows, drawn):
    others = [replace(row, name=row.name.replace("DiT", "SiT")) for row in rows if row.suite == "memory"]
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in drawn["memory"](rows + others, LIMITS).axes]
    assert len(titles) == len(set(titles)) and {"SiT" in title for title in titles} == {True, False}


def test_scaling_shows_the_rates_and_those_of_ranks_that_do_not_wait(rows, drawn):
    axes = drawn["scaling"](rows, LIMITS).axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[10, 20], [12.5, 25]]
    assert [text.get_text() for text in axes.texts] == ["efficiency 80%,\n10% communication"]


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_table_has_a_line_and_only_full_ones(name, section):
    _, make = tables.TABLES[name]
    lines = [line for line in make(section).splitlines() if line.startswith("|")]
    if name != "gains":
        assert len(lines) > 2
        assert len({len(line) for line in lines}) == 1


def test_the_tables_have_the_measured_figures(section):
    assert re.search(r"attention fwd.* 2.00 .* 1.50 ", tables.ops(section))
    assert re.search(r"GEMM +\| +500 \| +68% \| +500 \| +300", tables.where(section))
    assert "GEMM 500 ms where the limit is 300" in tables.gains(section)
    assert re.search(r"recompute=none.* 15,000 \| +15,150 \| +\+1.0%", tables.memory(section))
    assert re.search(r"yes.*yes.*yes.* 0.84 \| +27,485 \| +2 \| +1,001", tables.fast_dit_table(section))
    assert re.search(r"0.95 s, 67.37 images/s \| 0.95 s, 67.4 images/s", tables.mindone_table(section))


def test_what_was_refused_or_is_absent_stands_as_that(section):
    refused = Row("ops", "an_op fwd", "ditfast", "bf16", "B 8", extra={"refused": "dx differs"})
    section.rows = [refused]
    assert "refused" in tables.ops(section)


def test_without_rows_a_table_says_so():
    assert {tables.render(name, []) for name in tables.TABLES if name != "machine"} == {"not measured"}
    goals = tables.render("targets", [])
    assert goals.count("not measured") == len(targets.TARGETS)


def test_goals_are_measured_on_that_gpu_alone(rows):
    training = timed("model", "DiT-XL/2", "ditfast", 326.0, shape="256 px, batch 256", images_per_s=785.0, mfu=0.565)
    for device, measured in (("NVIDIA H200", True), ("NVIDIA A100", False)):
        [found] = tables.sections([Results(MACHINE | {"device": device}, None, [training])])
        assert ("785 images/s, 56.5% MFU" in tables.render("targets", [found])) is measured


def test_results_of_a_device_are_joined_and_the_last_counts():
    old, new = timed("feed", "DiT-S/2", "ditfast", 1.0), timed("feed", "DiT-S/2", "ditfast", 2.0)
    other = Results({"device": "another"}, None, [old])
    joined, apart = tables.sections([Results(MACHINE, None, [old]), other, Results(MACHINE, asdict(LIMITS), [new])])
    assert joined.rows == [new] and joined.limits == LIMITS and apart.device == "another"


def test_rows_of_another_machine_of_the_same_device_are_refused_and_machines_are_all_named():
    one, two = (timed("feed", name, "ditfast", 1.0) for name in ("DiT-S/2", "DiT-S/4"))
    other = MACHINE | {"threads": 16, "commit": f"{'f' * 40}-dirty"}
    with pytest.raises(ValueError, match="two files have feed DiT-S/2 by ditfast on a CPU, .* threads: 1 and 16; name"):
        tables.sections([Results(MACHINE, None, [one]), Results(other, None, [two, one])])
    [joined] = tables.sections([Results(MACHINE, None, [one]), Results(other, None, [two])])
    text = tables.machine(joined)
    assert "-, 1; -, 16" in text and "0123456789ab, ffffffffffff-dirty " in text


def test_one_rank_communicates_with_nobody(section):
    one, two = tables.scaling(section).splitlines()[2:]
    assert re.search(r"\| +10 \| +- \| +- \|$", one) and re.search(r"\| +20 \| +80% \| +10% \|$", two)


def test_places_are_filled_and_the_rest_stays(section):
    text = "# A\n<!-- bench:memory -->\nold\n<!-- bench:end -->\nB\n<!-- bench:picture memory -->\n<!-- bench:end -->\n"
    filled = tables.fill(text, [section])
    assert "old" not in filled and "15,000" in filled and filled.startswith("# A\n") and "\nB\n" in filled
    assert "](docs/bench/a-cpu-memory.png)" in filled
    assert tables.fill(filled, [section]) == filled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- bench:nonsense -->\n<!-- bench:end -->", "no table 'nonsense'"),
        ("<!-- bench:picture nonsense -->\n<!-- bench:end -->", "no picture 'nonsense'"),
        ("<!-- bench:ops -->\n", "1 places begin"),
    ],
)
def test_a_place_that_cannot_be_filled_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        tables.fill(text, [])


def test_performance_md_is_what_the_committed_results_give():
    text = (ROOT / "PERFORMANCE.md").read_text()
    assert tables.fill(text, tables.load(tables.committed())) == text, "python -m bench report --fill PERFORMANCE.md"
    for link in re.findall(r"!\[.*\]\((.*)\)", text):
        assert (ROOT / link).exists(), link


class Elements(html.parser.HTMLParser):
    """The pictures, links to elsewhere, and the JSON of a page."""

    def __init__(self):
        super().__init__()
        self.images, self.outside, self.json, self.inside = [], [], "", False

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.inside = tag == "script" and found.get("id") == "results"
        self.images += [found["src"]] if tag == "img" else []
        self.outside += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]

    def handle_data(self, data):
        self.json += data if self.inside else ""

    def handle_endtag(self, tag):
        self.inside = False


def test_the_page_has_everything_in_it(rows, tmp_path, capsys):
    strange = timed("feed", "</script><b>", "ditfast", 1.0)
    Results(MACHINE, asdict(LIMITS), [*rows, strange]).save(tmp_path / "in.json")
    assert page.main([str(tmp_path / "in.json"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    found = Elements()
    found.feed(text)
    assert len(found.images) == len(figures.FIGURES) == len(list((tmp_path / "out").glob("*.png")))
    assert found.outside == [] and "http" not in text.replace("http-equiv", "")
    [twin] = json.loads(found.json)
    assert twin["rows"] == [asdict(row) for row in (*rows, strange)]
    assert "<b>" not in text and "&lt;b&gt;" in text


def test_a_page_of_markdown_is_filled_in_place(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "ROOT", tmp_path)
    Results(MACHINE, asdict(LIMITS), rows).save(tmp_path / "in.json")
    (tmp_path / "P.md").write_text("<!-- bench:picture memory -->\n<!-- bench:end -->\n")
    assert page.main([str(tmp_path / "in.json"), "--fill", str(tmp_path / "P.md")]) == 0
    [link] = re.findall(r"\((.*)\)", (tmp_path / "P.md").read_text())
    assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")


def test_files_that_are_no_results_are_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[]")
    assert page.main([str(tmp_path / "a.json"), "--out", str(tmp_path)]) == 2
    assert "a.json" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [
    ({"limits": {"copy": 3}}, "limits are none"), ({"limits": asdict(LIMITS) | {"copy_gbps": "3"}}, "limits are none"),
    ({"limits": asdict(LIMITS) | {"gemm_tflops": 3}}, "limits are none"),
    ({"rows": [asdict(timed("breakdown", "DiT-S/2", "ditfast", 7.0))]}, "extra of suite breakdown lacks classes"),
    ({"rows": [asdict(timed("scale", "DiT-S/2", "ditfast", 7.0, ranks=1))]}, "scale lacks images_per_s, efficiency"),
])  # fmt: skip
def test_damaged_results_are_refused_by_name(change, message, tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps({"machine": MACHINE, "limits": None, "rows": []} | change))
    assert page.main([str(tmp_path / "a.json"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "a.json" in error and message in error


def test_a_class_without_time_is_not_said_to_take_none(section):
    classes = CLASSES | {"loss": 0.0}
    section.rows = [timed("breakdown", "DiT-S/2", p, 740.0, classes=classes, least_ms=LEAST) for p in PROVIDERS]
    assert re.search(r"loss +\| +- \| +- \| +- \| +- \|", tables.where(section))
    assert re.search(r"whole step, profiled .* at least 370 \|", tables.where(section))


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (None, "-"), (0, "0")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_a_table_wants_full_lines():
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        table(("a", "b"), [("1",)])
    assert table(("a", "b"), [("x", "1")]).splitlines()[2] == "| x   |   1 |"
