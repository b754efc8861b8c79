"""Running a suite: going on, ending in time, passing over failures, and the table."""

import pytest
import torch

from bench import runner
from bench.contest import Settings
from bench.rows import Results, Row

SETTINGS = Settings(torch.device("cpu"))


class Piece:
    """A job that takes `seconds` of a clock and gives one row."""

    def __init__(self, name, clock=None, seconds=0.0, error=None):
        self.job = "suite", name, "fp32", "B 2"
        self.clock, self.seconds, self.error, self.times = clock, seconds, error, 0

    def measure(self, settings):
        self.times += 1
        if self.clock:
            self.clock.now += self.seconds
        if self.error:
            raise self.error
        return [row(self.job[1])]


def row(name, provider="ditfast", ms=1.0, **rest):
    return Row("suite", name, provider, "fp32", "B 2", ms, ms, ms, **rest)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_suite_goes_on_where_it_was_ended(tmp_path):
    path, clock = tmp_path / "results.json", Clock()
    pieces = [Piece(name, clock, 10) for name in "abc"]
    assert runner.run(pieces, Results({}), SETTINGS, seconds=25, path=path, clock=clock) == 1
    assert [piece.times for piece in pieces] == [1, 1, 0]
    assert runner.run(pieces, Results.load(path), SETTINGS, seconds=25, path=path, clock=clock) == 0
    assert [piece.times for piece in pieces] == [1, 1, 1]
    assert [found.name for found in Results.load(path).rows] == ["a", "b", "c"]


def test_none_is_begun_that_would_not_end_in_time():
    clock = Clock()
    pieces = [Piece("long", clock, 10), Piece("next", clock, 10)]
    assert runner.run(pieces, Results({}), SETTINGS, seconds=19, clock=clock) == 1
    assert clock.now == 10


def test_only_what_matches_is_measured():
    pieces = [Piece("gate fwd"), Piece("gate bwd"), Piece("norm fwd")]
    runner.run(pieces, Results({}), SETTINGS, only="gate .* fp32")
    assert [piece.times for piece in pieces] == [1, 1, 0]


def test_a_name_that_no_job_has_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="--only gelu: no job is of that name; there are gate fwd, norm fwd$"):
        runner.run([Piece("gate fwd"), Piece("norm fwd")], Results({}), SETTINGS, only="gelu")


def test_a_failing_piece_is_a_row_and_the_next_is_measured():
    results = Results({})
    assert runner.run([Piece("a", error=OSError("no disk")), Piece("b")], results, SETTINGS) == 0
    assert [(found.name, found.why_not) for found in results.rows] == [("a", "failed: OSError: no disk"), ("b", None)]


def test_what_raised_is_measured_again_after_the_others():
    results = Results({})
    broken = Piece("a", error=MemoryError("full"))
    runner.run([broken], results, SETTINGS)
    broken.error = None
    runner.run([broken, Piece("b")], results, SETTINGS)
    assert [found.name for found in results.rows] == ["b", "a"] and not any(found.why_not for found in results.rows)


@pytest.mark.parametrize("reason", ("absent", "refused"))
def test_what_could_not_run_is_measured_again_where_asked(reason):
    results, piece = Results({}, rows=[row("a", "liger", None, extra={reason: "why"}), row("a")]), Piece("a")
    runner.run([piece], results, SETTINGS)
    assert piece.times == 0
    runner.run([piece], results, SETTINGS, retry=True)
    assert piece.times == 1


def test_failures_are_those_of_ditfast():
    rows = [
        row("a", ms=None, extra={"refused": "wrong"}),
        row("b", ms=None, extra={"failed": "raised"}),
        row("c", ms=None, extra={"absent": "no GPU"}),
        row("d", "liger", None, extra={"refused": "wrong"}),
        row("e"),
        row("f", "ditfast graph", None, extra={"refused": "wrong"}),
    ]
    assert [found.name for found in runner.failures(rows)] == ["a", "b", "f"]


def test_the_table_prints_ratios():
    rows = [
        row("gate", percent_of_limit=92.4, peak_bytes=3_000_000),
        row("gate", "eager", 3.0),
        row("gate", "compile", 1.5),
        row("gate", "apex", 1.2),
        row("gate", "liger", 1.1),
        row("gate", "cudnn", None, extra={"absent": "no GPU"}),
        row("norm", ms=None, extra={"refused": "off by 1 %"}),
    ]
    lines = [" ".join(line.split()) for line in runner.table(rows).splitlines()]
    assert lines == [
        "job dtype shape ditfast ms x eager x compile x fastest other % of limit MB",
        "gate fp32 B 2 1 3.00 1.50 1.10 liger 92 3.0",
        "norm fp32 B 2 - - - - - - ditfast refused: off by 1 %",
    ]


@pytest.mark.parametrize("rows", ([], [row("a", "measured")]))
def test_the_table_of_rows_without_ditfast(rows):
    assert len(runner.table(rows).splitlines()) == 1 + len(rows)
