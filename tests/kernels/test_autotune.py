"""Pinned configs unless measured ones were asked for; the file of measured ones."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ditfast.kernels as kernels
from ditfast.kernels import OPS, _triton, autotune
from ditfast.kernels.autotune import Choice, pick
from ditfast.reproducibility import measured_configs

ROOT = Path(__file__).parents[2]
SPEC = next(spec for spec in OPS if spec.name == "unpatchify")
KEY, PINNED, OTHER = "unpatchify_fwd(2x4x8 float32, 2, 2)", (1024, 4), (256, 2)


@pytest.fixture(autouse=True)
def pinned_afterwards():
    yield
    kernels.use_pinned()


def choice(**changes) -> Choice:
    gpu, capability, triton = autotune.machine()
    values = {"source": autotune.hashes_of_ops()[SPEC.name], "gpu": gpu, "capability": capability, "triton": triton}
    return Choice(**{"op": SPEC.name, "key": KEY, "pinned": PINNED, "config": OTHER, "pinned_ms": 2.0, "ms": 1.0,
                     **values, **changes})  # fmt: skip


def block_of_a_launch() -> int:
    """BLOCK of unpatchify's forward on KEY's tensors."""
    with _triton.recording() as launched:
        kernels.unpatchify(torch.zeros(2, 4, 8, device="meta"), 2, (2, 2), backend="triton")
    return launched[0].meta["BLOCK"]


def test_pinned_configs_stay_while_nobody_asks_for_others(tmp_path):
    autotune.write(tmp_path / "tuned.json", [choice()])
    assert block_of_a_launch() == PINNED[0] and kernels.tuned_in_use() == {}


def test_measured_configs_are_used_from_the_call_on_until_it_is_taken_back(tmp_path, caplog):
    autotune.write(tmp_path / "tuned.json", [choice(), choice(key="unpatchify_bwd(another)", config=PINNED)])
    with caplog.at_level(logging.INFO, "ditfast.kernels"):
        assert kernels.use_tuned(tmp_path / "tuned.json") == {KEY: OTHER} == kernels.tuned_in_use()
    assert f"{KEY}: {PINNED} -> {OTHER}" in caplog.text and "another" not in caplog.text
    assert block_of_a_launch() == OTHER[0]
    kernels.use_pinned()
    assert block_of_a_launch() == PINNED[0]


def test_a_choice_holds_for_its_shapes_and_dtypes_alone():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    with autotune.asking() as asked:
        pick("op_fwd", (4, 2), x, 7, torch.float16, None)
    assert asked == {"op_fwd(2x3 bfloat16, 7, float16, None)": (4, 2)}
    with autotune.trying("op_fwd(2x3 bfloat16)", (8, 2)):
        assert pick("op_fwd", (4, 2), x) == (8, 2)
        for other in (x.float(), x[:1]):
            assert pick("op_fwd", (4, 2), other) == (4, 2)
        assert pick("op_bwd", (4, 2), x) == (4, 2)


def test_the_file_gives_back_what_was_written_and_new_choices_replace_old_ones(tmp_path):
    path = tmp_path / "below" / "tuned.json"
    elsewhere = choice(gpu="NVIDIA A100")
    autotune.write(path, [choice(), elsewhere])
    autotune.write(path, [newer := choice(config=(64, 1), ms=0.5)])
    assert sorted(autotune.read(path), key=str) == sorted([newer, elsewhere], key=str)
    assert sorted(os.listdir(path.parent)) == ["tuned.json", "tuned.json.lock"]


def test_the_file_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o022)
    try:
        autotune.write(tmp_path / "tuned.json", [choice()])
    finally:
        os.umask(before)
    assert (tmp_path / "tuned.json").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    autotune.write(path, [choice()])
    monkeypatch.setattr(os, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        autotune.write(path, [choice(config=(64, 1))])
    assert autotune.read(path) == [choice()] and len(os.listdir(tmp_path)) == 2


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/kernels")
from test_autotune import autotune, choice
for i in range(15):
    autotune.write(Path(sys.argv[1]), [choice(key=f"{sys.argv[2]} {i}")])
"""


def test_two_processes_that_write_one_file_lose_no_choice(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path / "tuned.json")]
    started = [subprocess.Popen([*command, name], cwd=ROOT) for name in ("a", "b")]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert len(autotune.read(tmp_path / "tuned.json")) == 30


def test_a_launch_without_a_choice_is_named_once_and_only_while_a_file_is_in_use(tmp_path, caplog):
    stays = choice(key="op_fwd(stays)", config=PINNED)
    autotune.write(tmp_path / "tuned.json", [choice(), stays])
    kernels.use_tuned(tmp_path / "tuned.json")
    for _ in range(2):
        pick("op_fwd", (4, 2), "missed")
        pick("op_fwd", PINNED, "stays")
        block_of_a_launch()
    kernels.use_pinned()
    pick("op_fwd", (4, 2), "unasked")
    assert [r.args[0] for r in caplog.records if "no measured config" in r.getMessage()] == ["op_fwd(missed)"]


def test_measured_configs_of_a_block_give_way_to_those_before(tmp_path):
    autotune.write(tmp_path / "outer.json", [choice()])
    autotune.write(tmp_path / "inner.json", [choice(config=(64, 1))])
    kernels.use_tuned(tmp_path / "outer.json")
    with measured_configs(str(tmp_path / "inner.json")):
        assert kernels.tuned_in_use() == {KEY: (64, 1)}
    assert kernels.tuned_in_use() == {KEY: OTHER}


@pytest.mark.parametrize("changes", ({"gpu": "NVIDIA A100"}, {"triton": "2.0"}, {"capability": "1.0"}, {"source": "0"}))
def test_choices_of_another_machine_or_source_are_left_out_with_a_warning(changes, tmp_path, caplog):
    autotune.write(tmp_path / "tuned.json", [choice(**changes)])
    assert kernels.use_tuned(tmp_path / "tuned.json") == {}
    reason = SPEC.name if "source" in changes else next(iter(changes.values()))
    assert reason in caplog.text and "left out" in caplog.text and "pinned" in caplog.text
    assert autotune.known(tmp_path / "tuned.json") == set()


def damage(**changes) -> str:
    entry = json.loads(json.dumps(vars(choice()))) | changes
    return json.dumps({"version": autotune.VERSION, "choices": [entry]})


@pytest.mark.parametrize(
    "text",
    (
        '{"version": 1, "choi', "[]", '{"version": 9, "choices": []}', '{"version": 1, "choices": [{"op": "x"}]}',
        damage(config=[256]), damage(config=[256, "2"]), damage(config=[256, -2]), damage(pinned=None),
        damage(gpu=5), damage(op=["q"]), damage(key=7), damage(ms="x"), damage(ms=float("nan")),
        damage(config=[1000, 3]), damage(config=[256, 2048]), damage(config=[256, 2, 2]), "[" * 100_000,
    ),
)  # fmt: skip
def test_a_damaged_file_is_named_with_what_to_do(text, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"tuned\.json.*delete it and measure anew with `python -m ditfast.kernels tune"
    ):
        kernels.use_tuned(path)


def test_what_is_wrong_in_a_damaged_file_is_named(tmp_path):
    (tmp_path / "tuned.json").write_text(damage(ms="x"))
    with pytest.raises(ValueError, match=r"ms is 'x', expected milliseconds"):
        kernels.use_tuned(tmp_path / "tuned.json")


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no measured configs at .*none\.json: measure anew with `python -m"):
        kernels.use_tuned(tmp_path / "none.json")


RANKS = """
import sys
import torch.distributed as dist
from ditfast import kernels
from ditfast.kernels import autotune
if "unforeseen" in sys.argv[3]:
    autotune.machine = lambda: 1 / 0
rank, rendezvous, own = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
try:
    print(kernels.use_tuned(own))
except (RuntimeError, ValueError) as error:
    print(error)
dist.destroy_process_group()
"""


def two_ranks(tmp_path, *files: Path) -> list[str]:
    """What use_tuned gives in each of two processes, each with a file of its own."""
    command = [sys.executable, "-c", RANKS]
    started = [
        subprocess.Popen([*command, str(rank), tmp_path / "rendezvous", file], cwd=ROOT, stdout=-1, text=True)
        for rank, file in enumerate(files)
    ]
    try:
        return [process.communicate(timeout=120)[0].strip() for process in started]
    finally:
        for process in started:
            process.kill()


def test_all_processes_take_the_choices_of_the_first(tmp_path):
    files = tmp_path / "0.json", tmp_path / "1.json"
    for file, config in zip(files, (OTHER, (64, 1)), strict=True):
        autotune.write(file, [choice(config=config)])
    assert two_ranks(tmp_path, *files) == [str({KEY: OTHER})] * 2


def test_an_error_of_the_first_process_is_raised_in_all(tmp_path):
    autotune.write(tmp_path / "1.json", [choice()])
    first, second = two_ranks(tmp_path, tmp_path / "none.json", tmp_path / "1.json")
    assert first == second and "none.json" in second


def test_an_unforeseen_error_of_the_first_process_keeps_no_other_waiting(tmp_path):
    autotune.write(tmp_path / "unforeseen.json", [choice()])
    first, second = two_ranks(tmp_path, tmp_path / "unforeseen.json", tmp_path / "1.json")
    assert first == second and "ZeroDivisionError" in second
