"""Predictions beside measured rows: the error is that of the row, and what cannot be compared is said."""

import json
from dataclasses import asdict

import pytest

from bench.rows import Results, Row
from ditfast import cli
from ditfast.config import PRECISIONS, ConfigError
from ditfast.hardware import Ceilings
from ditfast.plan import Share, published_model, rates, step_time
from ditfast.plan.against import compare

H200 = Ceilings(4300, {"bf16": 790}, "measured", "NVIDIA H200", "2.11.0")
EXTRA = {
    "network": {
        "depth": 12, "hidden_size": 384, "num_heads": 6, "patch_size": 2, "input_size": [32, 32], "in_channels": 4,
        "num_classes": 1000,
    },
    "batch": 64, "precision": "bf16-fast", "recompute": "ops",
}  # fmt: skip


def predicted() -> float:
    held = PRECISIONS["bf16-fast"]
    return step_time(published_model("DiT-S/2"), held, "ops", Share(64), rates(H200, held)).total


def results(path, rows: list[Row], limits: Ceilings | None = H200):
    Results({"device": "NVIDIA H200", "kind": "cuda"}, limits and asdict(limits), rows).save(path)
    return path


def row(ms: float | None = 10.0, provider: str = "ditfast", suite: str = "model", peak=None, **extra) -> Row:
    return Row(suite, "DiT-S/2", provider, "bf16", "batch 64", ms=ms, peak_bytes=peak, extra=EXTRA | extra)


def test_the_error_is_predicted_over_measured(tmp_path, capsys):
    path = results(tmp_path / "model.json", [row(predicted() / 1.25, peak=4 * 10**9)])
    (found,), passed_over = compare(path)
    assert found.error == pytest.approx(0.25) and not passed_over
    assert found.memory_error == pytest.approx(found.predicted_bytes / 4e9 - 1)
    assert cli.main(["plan", "--against", str(path)]) == 0
    title, head, line = capsys.readouterr().out.splitlines()
    assert title.endswith("NVIDIA H200") and head.startswith(" ms predicted") and len(line) < 80
    assert "+25%" in line and line.endswith("model.json: DiT-S/2 bf16")


def test_memory_is_that_above_what_was_there_before(tmp_path):
    """Activations at 11 D and a block at work: more than the gradients here."""
    (found,), _ = compare(results(tmp_path / "model.json", [row()]))
    tokens = 64 * 256
    assert found.predicted_bytes == pytest.approx(tokens * 384 * 2 * (12 * 11 + 14)) and found.memory_error is None


def test_only_own_measured_rows_of_the_model_suite_count(tmp_path):
    rows = [row(provider="compile"), row(suite="ops"), row(None)]
    found, passed_over = compare(results(tmp_path / "model.json", rows))
    assert not found and passed_over == ["model.json: DiT-S/2 bf16: was not measured"]
    incomplete = Row("model", "x", "ditfast", "bf16", "", ms=1.0, extra={"batch": 1})
    assert "no network, precision, recompute in extra" in compare(results(tmp_path / "a.json", [incomplete]))[1][0]
    assert "no rows of suite 'model'" in compare(results(tmp_path / "b.json", []))[1][0]
    assert "no measured limits" in compare(results(tmp_path / "c.json", [row()], None))[1][0]


def test_the_json_of_a_plan_has_the_comparison(tmp_path):
    path, out = results(tmp_path / "model.json", [row(predicted())]), tmp_path / "plan.json"
    assert cli.main(["plan", "--model=DiT-S/2", "--gpu=h200", f"--json={out}", "--against", str(path)]) == 0
    (found,) = json.loads(out.read_text())["against"]
    assert found["error"] == pytest.approx(0) and found["name"] == "model.json: DiT-S/2 bf16"


def test_without_a_model_the_comparison_alone_is_written(tmp_path, capsys):
    path, out = results(tmp_path / "model.json", [row(predicted())]), tmp_path / "against.json"
    assert cli.main(["plan", f"--json={out}", "--against", str(path)]) == 0
    assert json.loads(out.read_text())["against"][0]["error"] == pytest.approx(0)
    assert str(out) in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "[]", '{"rows": []}', '{"rows": [1], "limits": null, "machine": {"kind": "cuda"}}']
)
def test_a_file_that_holds_no_results_is_refused(tmp_path, text):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"model\.json holds no results"):
        compare(path)


@pytest.mark.parametrize(
    "extra, message",
    [({"precision": "bf17"}, "precision must be one of"), ({"network": {"width": 1}}, "extra.network")],
)
def test_a_row_that_cannot_be_read_is_refused_by_name(tmp_path, extra, message):
    with pytest.raises(ConfigError, match=f"model.json: DiT-S/2 bf16: .*{message}"):
        compare(results(tmp_path / "model.json", [row(**extra)]))
