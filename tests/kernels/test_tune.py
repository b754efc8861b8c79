"""The search for faster configs, what `tune` measures, and its command."""

import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ditfast.build import build_diffusion, predictor
from ditfast.config import PRECISIONS, DiffusionConfig, OptimConfig
from ditfast.kernels import OPS, _triton, autotune, check, parity
from ditfast.kernels.__main__ import main
from ditfast.kernels._op import Op, _graded
from ditfast.kernels.tune import MARGIN, DeviceTimer, asks, fastest, neighbours, resize, tune
from ditfast.layers import DiT
from ditfast.optimizer import AdamWEMA

ROOT = Path(__file__).parents[2]
KERNELS = [pytest.param(spec, id=spec.name) for spec in OPS if "triton" in spec.op.backends]
SPEC = next(spec for spec in OPS if spec.name == "unpatchify")


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
    (here, _), (there, _) = tuned(device), tuned(device, sizes={"B": batch + 1})
    assert there.key == here.key.replace(f"({batch}x", f"({batch + 1}x") != here.key


@pytest.mark.parametrize("name", ("b", "Bogus"))
def test_a_size_that_no_case_has_is_refused_with_those_there_are(name, tmp_path, capsys):
    arguments = ["tune", "--op", "unpatchify", "q_sample", "--cache", str(tmp_path / "tuned.json"), "--sizes"]
    assert main([*arguments, f"{name}=5"]) == 2
    assert f"no case has the size '{name}', expected some of B, C, E, H, T, W" in capsys.readouterr().err


def test_the_command_of_the_readme_reaches_every_op(caplog):
    """At the sizes that the README names every op is asked in all its cases, and none is left out."""
    (line,) = [
        line for line in (ROOT / "README.md").read_text().splitlines() if "ditfast.kernels tune" in line and "#" in line
    ]
    sizes = dict(size.split("=") for size in line.split("#")[0].split("--sizes")[1].split())
    given = {name: int(size) for name, size in sizes.items()}
    ops = [param.values[0] for param in KERNELS]
    known = keys_at(ops, given)
    with caplog.at_level(logging.WARNING, "ditfast.kernels"):
        assert list(tune(ops, sizes=given, known=known, measure=fewest_elements)) == []
    assert not caplog.records
    assert any(key.startswith("unpatchify_fwd(32x1024x32") for key in known)
    assert any(key.startswith("patchify_fwd(32x4x64x64") for key in known)


def keys_at(specs, sizes, dtype=torch.bfloat16):
    """What `tune` measures at these sizes."""
    cases = [
        (spec, (spec.resize or resize)(case, {k: v for k, v in sizes.items() if k in case.sizes}))
        for spec in specs
        for case in spec.bench
    ]
    return {key for spec, case in cases for key in asks(spec, case, dtype)}


@pytest.mark.parametrize("name", ("unpatchify", "patchify"))
def test_tokens_that_are_no_square_leave_a_case_out_and_go_on(name, caplog):
    specs = [next(spec for spec in OPS if spec.name == op) for op in (name, "q_sample")]
    asked = keys_at(specs[1:], {"B": 2, "C": 3})
    sizes, measured = {"B": 2, "T": 1000, "C": 3}, []

    def measure(runs):
        measured.extend(run.key for run in runs)
        return [1.0 for _ in runs]

    small = [specs[0], replace(specs[1], bench=[replace(c, sizes={**c.sizes, "H": 4, "W": 4}) for c in specs[1].bench])]
    choices = list(tune(small, sizes=sizes, device="cpu", measure=measure, compiles=lambda *_: False))
    assert f"{name}, DiT-XL/2: left out, 1000 tokens are no square image" in caplog.text
    assert asked and {choice.op for choice in choices} == {"q_sample"} and measured


def on_a_gpu(op, asked, device, dtype, inputs=()):
    """Op.choose where all is on a GPU."""
    derived = not _graded(op._underived(inputs))
    return (
        "triton"
        if asked == "auto" and op.kernels and derived and not op.auto
        else CHOOSE(op, asked, device, dtype, inputs)
    )


CHOOSE = Op.choose


@pytest.mark.parametrize("precision", ("bf16", "bf16-fast", "fp32", "fp16"))
def test_what_tune_measures_is_what_a_training_step_asks_for(precision, monkeypatch):
    monkeypatch.setattr(Op, "choose", on_a_gpu)
    policy = PRECISIONS[precision]
    with torch.device("meta"):
        model = DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=1152, depth=2, num_heads=16, num_classes=10)
    model = model.to_empty(device="cpu").to(policy.params)
    optimizer = AdamWEMA(model, OptimConfig(), policy)
    predict = predictor(model, policy, torch.device("cpu"))
    x, label = torch.zeros(2, 4, 8, 8), torch.zeros(2, dtype=torch.long)
    with _triton.recording(), autotune.asking() as asked:
        process = build_diffusion(DiffusionConfig(), learn_sigma=True)
        process.training_losses(predict, x, label, {"y": label}, noise=x)["loss"].mean().backward()
        optimizer.update(optimizer.gradient_norm())
    called = [spec for spec in OPS if any(key.startswith(spec.name) for key in asked)]
    sizes = {"B": 2, "T": 16, "H": 8, "W": 8, "D": 1152, "N": 20}
    assert len(asked) >= 12 and asked.keys() <= keys_at(called, sizes, policy.compute)


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


@pytest.mark.parametrize("arguments", (["check", "--json"], ["traffic", "--json"], ["tune", "--cache"]))
def test_a_file_that_cannot_be_written_is_found_before_the_work(arguments, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for work in ("check.check", "traffic.traffic", "tune"):
        monkeypatch.setattr(f"ditfast.kernels.__main__.{work}", lambda *_: pytest.fail("begun"))
    assert main([*arguments, str(tmp_path / "file" / "x.json")]) == 2
    assert "x.json" in capsys.readouterr().err or arguments[0] == "tune"


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


def test_the_timer_flushes_as_long_as_the_host_takes(monkeypatch):
    """On a stand-in for CUDA, whose device needs 2 ms for a flush and 5 ms for the run."""
    device = SimpleNamespace(ms=0.0)

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.ms

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    class Buffer:
        def zero_(self):
            device.ms += 2

    def run():
        device.ms += 5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Buffer())
    timer = DeviceTimer()
    flushes = []
    for hide in (0, 1e-3, 9e-3):
        before = device.ms
        assert timer(run, hide) == 5
        flushes.append((device.ms - before - 5) / 2)
    assert flushes == [1, 1, 5]
