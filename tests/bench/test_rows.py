"""Rows, their file, and going on from it."""

import json

import pytest

from bench.rows import Results, Row, resume

ROW = Row("ops", "gate_residual fwd", "ditfast", "bf16", "B 2", 1.5, 1.0, 2.0, 1.25, 80.0, 4096, {"pass": "fwd"})
HERE = {"device": "H200", "torch": "2.13", "source": "abc", "threads": 16}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "results" / "ops.json"
    Results(HERE, {"copy_gbps": 4300.0}, [ROW, Row("ops", "a", "eager", "fp32", "B 2")]).save(path)
    return path


def test_saved_results_load_as_they_were(path):
    found = Results.load(path)
    assert found.machine == HERE and found.limits == {"copy_gbps": 4300.0}
    assert found.rows == [ROW, Row("ops", "a", "eager", "fp32", "B 2")]
    assert len(path.read_text().splitlines()) == 3  # a row a line


@pytest.mark.parametrize(
    ("change", "says"),
    (
        (lambda tree: tree["rows"][1].update(ms="fast"), r"rows\[1\]\.ms is 'fast', expected a whole number or a numb"),
        (lambda tree: tree["rows"][0].update(ms=-1.0), r"rows\[0\]\.ms is -1\.0, expected a finite number from 0"),
        (lambda tree: tree["rows"][0].update(ms=float("nan")), r"rows\[0\]\.ms is nan, expected a finite number"),
        (lambda tree: tree["rows"][0].update(peak_bytes=1.5), r"rows\[0\]\.peak_bytes is 1\.5"),
        (lambda tree: tree["rows"][0].update(name=None), r"rows\[0\]\.name is None, expected a string"),
        (lambda tree: tree["rows"][0].pop("dtype"), r"rows\[0\] is .*, expected an object with suite, name, provider"),
        (lambda tree: tree["rows"][0].update(speed=3), r"rows\[0\] is .*, expected an object with suite"),
        (lambda tree: tree.update(machine=None), r"machine is None, expected an object"),
        (lambda tree: tree.pop("limits"), r"expected an object with machine, limits and rows"),
    ),
)
def test_what_is_wrong_in_a_file_is_named(path, change, says):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=says) as error:
        Results.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "half.json").write_text('{"machine": {')
    with pytest.raises(ValueError, match=r"half\.json: no JSON .*delete it"):
        Results.load(tmp_path / "half.json")
    with pytest.raises(ValueError, match=r"none\.json: no results can be read"):
        Results.load(tmp_path / "none.json")


def test_a_new_row_takes_the_place_of_its_provider_and_job(path):
    results = Results.load(path)
    faster = Row(*(ROW.suite, ROW.name, ROW.provider, ROW.dtype, ROW.shape), 1.0)
    results.add([faster, Row("ops", ROW.name, "eager", "bf16", "B 2")])
    assert [row for row in results.rows if row.provider == "ditfast"] == [faster]
    assert {row.provider for row in results.of(ROW.job)} == {"ditfast", "eager"}


def test_results_of_this_machine_and_source_are_gone_on_with(path):
    assert resume(path, HERE | {"date": "later", "commit": "of the results"}).rows[0] == ROW


@pytest.mark.parametrize("changed", ("torch", "source", "threads"))
def test_other_results_are_kept_aside_and_begun_anew(path, changed, caplog):
    before = path.read_bytes()
    for kept in ("ops.json.1", "ops.json.2"):
        path.write_bytes(before)
        assert resume(path, HERE | {changed: "other"}).rows == []
        assert path.with_name(kept).read_bytes() == before and not path.exists()
        assert f"{kept}; then and now: {changed} {HERE[changed]} and other" in caplog.text


def test_results_of_another_device_are_not_lost(path):
    with pytest.raises(ValueError, match=r"ops\.json holds rows of H200, this is A100; name another file"):
        resume(path, HERE | {"device": "A100"})


def test_nothing_to_go_on_with(tmp_path):
    assert resume(None, HERE) == resume(tmp_path / "new.json", HERE) == Results(HERE)


def test_why_nothing_was_measured():
    assert ROW.why_not is None
    assert Row("s", "n", "p", "fp32", "", extra={"absent": "no GPU"}).why_not == "absent: no GPU"
