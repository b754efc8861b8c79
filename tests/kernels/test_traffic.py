"""The traffic count: every Triton op within its limits, waste caught, masked-off lanes not counted."""

import json
from dataclasses import replace

import pytest
import torch

from ditfast.kernels import OPS, _rows, _triton, traffic
from ditfast.kernels.__main__ import main
from ditfast.kernels._triton import jit, launch, tl

SPECS = {spec.name: spec for spec in OPS}
KERNELS = [pytest.param(spec, id=spec.name) for spec in OPS if "triton" in spec.op.backends]
pytestmark = pytest.mark.skipif(not _triton.INTERPRETED, reason="counted in the interpreter")


@pytest.mark.parametrize("spec", KERNELS)
def test_no_kernel_moves_more_than_its_limit(spec):
    # float32 streams halve the share of everything else, so the bfloat16 cases are the strict ones.
    cases = traffic.cases(spec)
    strict = replace(spec, traffic=tuple(case for case in cases if not case.mixed) or cases)
    rows = list(traffic.traffic([strict]))
    assert rows
    for row in rows:
        assert row.ok, traffic.table(rows)


@jit
def _copy_kernel(x_ptr, y_ptr, N, TIMES: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(TIMES):
        x = tl.load(x_ptr + cols, mask=cols < N)
    tl.store(y_ptr + cols, x, mask=cols < N)


@jit
def _scalar_kernel(x_ptr, y_ptr):
    tl.store(y_ptr, tl.load(x_ptr))


def counted(kernel, programs, *args, **meta):
    with traffic.counting() as launches:
        launch(kernel, programs, *args, **meta)
    return launches


@pytest.mark.parametrize(("dtype", "size"), ((torch.bfloat16, 2), (torch.float32, 4), (torch.float64, 8)))
def test_masked_off_lanes_do_not_count(dtype, size):
    x = torch.arange(10).to(dtype)
    y = torch.zeros_like(x)
    (one,) = counted(_copy_kernel, 2, x, y, 10, TIMES=1, BLOCK=8)
    assert torch.equal(x, y)
    assert one == traffic.Launched("_copy_kernel", 2 * 10 * size, 2 * 10 * size)


def test_a_repeated_load_is_requested_again_and_unique_once():
    x = torch.zeros(10)
    (one,) = counted(_copy_kernel, 2, x, torch.zeros(10), 10, TIMES=3, BLOCK=8)
    assert (one.requested, one.unique) == (4 * (3 * 10 + 10), 4 * (10 + 10))


def test_each_launch_counts_for_itself_and_loads_without_a_mask_too():
    x, y = torch.zeros(1), torch.zeros(1)
    with traffic.counting() as launches:
        for _ in range(2):
            launch(_scalar_kernel, 3, x, y)
    assert [(one.requested, one.unique) for one in launches] == [(3 * 8, 8)] * 2


def test_outside_the_count_nothing_is_hooked():
    from triton.runtime import interpreter

    before = interpreter.interpreter_builder.create_masked_load, interpreter.GridExecutor.__call__
    counted(_scalar_kernel, 1, torch.zeros(1), torch.zeros(1))
    assert before == (interpreter.interpreter_builder.create_masked_load, interpreter.GridExecutor.__call__)


def small_adaln():
    spec = SPECS["adaln_modulate"]
    case = replace(spec.bench[0], sizes={"B": 2, "T": 64, "D": 64})
    return replace(spec, traffic=(case,))


def test_a_wasteful_launcher_is_caught(monkeypatch):
    """One row a program: shift, scale and the partial rows then weigh as much as x itself."""
    spec = small_adaln()
    monkeypatch.setattr(_rows, "rows_per_program", lambda *args: 1)
    fwd, bwd = traffic.traffic([spec])
    assert not fwd.ok and fwd.ratios["requested"] > 1.9 and fwd.ratios["unique"] < 1.2
    assert not bwd.ok and bwd.ratios["unique"] > 1.5


def test_the_tiling_is_that_of_a_full_grid(monkeypatch):
    tilings = []
    plain = _rows.rows_per_program
    monkeypatch.setattr(_rows, "rows_per_program", lambda *args: tilings.append(plain(*args)) or tilings[-1])
    list(traffic.traffic([small_adaln()]))
    assert tilings == [32, 64] and plain(32, 64, 2, 64) == 32


def test_json_has_a_row_per_stage(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("ditfast.kernels.__main__.OPS", (small_adaln(),))
    main(["traffic", "--json", str(tmp_path / "traffic.json")])
    rows = json.loads((tmp_path / "traffic.json").read_text())
    assert [(row["op"], row["stage"]) for row in rows] == [("adaln_modulate", "fwd"), ("adaln_modulate", "bwd")]
    for row in rows:
        assert row["bytes_requested"] >= row["bytes_unique"] >= row["bytes_min"] > 0
    assert "_norm_bwd_kernel" in capsys.readouterr().out


def test_too_much_traffic_is_exit_status_1(monkeypatch, capsys):
    monkeypatch.setattr("ditfast.kernels.__main__.OPS", (small_adaln(),))
    monkeypatch.setattr(traffic, "LIMITS", {"requested": 9.0, "unique": 9.0})
    assert main(["traffic"]) == 0
    monkeypatch.setattr(traffic, "LIMITS", {"requested": 9.0, "unique": 1.0})
    assert main(["traffic"]) == 1 and "TOO MUCH" in capsys.readouterr().out


def test_without_the_interpreter_it_says_what_to_set(monkeypatch, capsys):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    assert main(["traffic"]) == 2 and "TRITON_INTERPRET=1" in capsys.readouterr().err
