"""Pinned configs unless measured ones were asked for; the file of measured ones; the search that makes it."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ditfast.kernels as kernels
from ditfast.kernels import OPS, _triton, autotune, check, parity
from ditfast.kernels.__main__ import main
from ditfast.kernels.autotune import Choice, pick
from ditfast.kernels.tune import MARGIN, fastest, neighbours, tune

ROOT = Path(__file__).parents[2]
KERNELS = [pytest.param(spec, id=spec.name) for spec in OPS if "triton" in spec.op.backends]
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
    assert os.listdir(path.parent) == ["tuned.json"]


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
    ),
)  # fmt: skip
def test_a_damaged_file_is_named_with_what_to_do(text, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"tuned\.json.*delete it and measure anew with `python -m ditfast.kernels tune"
    ):
        kernels.use_tuned(path)


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    with pytest.raises(ValueError, match=r"no measured configs at .*none\.json: measure anew with `python -m"):
        kernels.use_tuned(tmp_path / "none.json")


RANKS = """
import sys
import torch.distributed as dist
from ditfast import kernels
rank, rendezvous, own = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
try:
    print(kernels.use_tuned(own))
except ValueError as error:
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


def stand_in(pinned=(16, 4), wrong=()):
    """A kernel whose configs are right but for some."""
    return SimpleNamespace(pinned=pinned, is_right=lambda config: config not in wrong, under=lambda config: config)


def test_neighbours_are_one_number_doubled_or_halved():
    assert neighbours((1, 8, 32)) == [(2, 8, 32), (1, 4, 32), (1, 16, 32), (1, 8, 16)]


def test_the_search_walks_to_the_fastest_config():
    def measure(configs):
        return [abs(tile - 64) + abs(warps - 1) + 1.0 for tile, warps in configs]

    assert fastest(stand_in(), measure, lambda kernel, config: True) == ((64, 1), 52.0, 1.0)


def test_what_fails_parity_or_does_not_compile_is_never_measured():
    measured = []

    def measure(configs):
        measured.extend(configs)
        return [1.0 / (tile * warps) for tile, warps in configs]

    config, *_ = fastest(stand_in(wrong={(32, 4)}), measure, lambda kernel, config: config[0] <= 64)
    assert config == (32, 32)
    assert (32, 4) not in measured and all(tile <= 64 for tile, _ in measured)


@pytest.mark.parametrize(("gain", "config"), ((MARGIN / 2, (16, 4)), (2 * MARGIN, (32, 4))))
def test_a_gain_within_the_scatter_changes_nothing(gain, config):
    def measure(configs):
        return [1.0 - gain * (each == (32, 4)) for each in configs]

    assert fastest(stand_in(), measure, lambda kernel, config: True)[0] == config


SMALL = replace(SPEC, bench=SPEC.cases[:1])
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def fewest_elements(runs):
    """In place of time: the elements of a tile."""
    for run in runs:
        run()
    return [float(run.config[0]) for run in runs]


def tuned(device, **options):
    everything = {"measure": fewest_elements, "compiles": lambda kernel, config: True, "device": device}
    return list(tune([SMALL], torch.float32, **everything | options))


def test_tune_gives_a_choice_for_each_kernel_of_each_case_and_leaves_what_is_known(device):
    choices = tuned(device)
    assert [choice.key.split("(")[0] for choice in choices] == ["unpatchify_fwd", "unpatchify_bwd"]
    for choice in choices:
        assert (choice.pinned, choice.config) == ((1024, 4), (64, 4)) and (choice.pinned_ms, choice.ms) == (1024, 64)
        assert choice.source == autotune.hashes_of_ops()[SPEC.name]
    assert tuned(device, known={choices[0].key}) == choices[1:]


def test_tune_takes_other_sizes_than_those_of_the_benches(device):
    batch = SMALL.bench[0].sizes["B"]
    (here, _), (there, _) = tuned(device), tuned(device, sizes={"B": batch + 1, "unused": 9})
    assert there.key == here.key.replace(f"({batch}x", f"({batch + 1}x") != here.key


def test_a_kernel_that_fails_parity_is_not_measured(device, monkeypatch):
    monkeypatch.setattr(parity.Verdict, "ok", False)
    with pytest.raises(RuntimeError, match="unpatchify, .*: fails parity as it is, so nothing was measured"):
        tuned(device)


CANDIDATES = """
import torch
from ditfast.kernels import OPS, autotune
from ditfast.kernels.tune import Kernel
autotune.machine = lambda: ("a chip", "9.0", "any")
spec, key = OPS[0], sys.argv[1]
kernel = Kernel(spec, spec.bench[0], torch.bfloat16, None, None, (), key, (2, 64, 4))
print([kernel.compiles(config) for config in ((2, 32, 4), (4, 64, 1), (3, 64, 4))])
"""


@pytest.mark.skipif(not _triton.INSTALLED, reason="needs triton")
def test_candidates_that_spill_or_do_not_compile_are_none():
    spec = OPS[0]
    with autotune.asking() as asked:
        check.launches(spec, spec.bench[0], torch.bfloat16)
    (key,) = (key for key in asked if key.startswith("adaln_modulate_bwd"))
    plain = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", f"import sys{CANDIDATES}", key]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[True, False, False]\n", done.stdout + done.stderr


@WITHOUT_GPU
def test_without_a_gpu_the_command_says_so(capsys, tmp_path):
    assert main(["tune", "--cache", str(tmp_path / "tuned.json")]) == 2
    assert "PyTorch sees none here" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_command_writes_each_choice_and_goes_on_where_it_stopped(capsys, tmp_path, monkeypatch, device):
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(
        "ditfast.kernels.__main__.tune", lambda specs, dtype, sizes, known: tuned(device, known=known, sizes=sizes)
    )
    assert main(["tune", "--op", SPEC.name, "--cache", str(path), "--seconds", "0"]) == 0
    assert "out of time" in capsys.readouterr().out and len(autotune.read(path)) == 1
    assert main(["tune", "--op", SPEC.name, "--cache", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "unpatchify_bwd" in printed and "unpatchify_fwd" not in printed and len(autotune.read(path)) == 2
    assert all(choice.config == (64, 4) for choice in autotune.read(path))


@pytest.mark.parametrize("arguments", (["--op", "nope"], ["--sizes", "B"], ["--sizes", "B=0"], ["--dtype", "int8"]))
def test_the_command_refuses_what_it_does_not_know(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", *arguments])
    assert arguments[1] in capsys.readouterr().err


def together(config):
    """All tile sizes doubled, and all halved; the warps mean nothing in the interpreter."""
    *sizes, warps = config
    return [(*(size * 2 for size in sizes), warps), (*(max(1, size // 2) for size in sizes), warps)]


@pytest.mark.parametrize("others", (together, pytest.param(neighbours, marks=pytest.mark.full)))
@pytest.mark.parametrize("spec", KERNELS)
def test_every_launcher_is_right_under_other_configs_than_the_pinned_ones(spec, others, device, generator):
    inputs = spec.make_inputs(spec.cases[0], torch.bfloat16, device, generator)
    truth = parity.truth(spec, inputs, generator)
    with autotune.asking() as asked:
        assert all(verdict.ok for verdict in truth.judge("triton"))
    assert asked
    for key, pinned in asked.items():
        for config in others(pinned):
            with autotune.trying(key, config):
                assert all(verdict.ok for verdict in truth.judge("triton")), (key, config)
