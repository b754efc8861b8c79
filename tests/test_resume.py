"""N steps, and k steps + a crash + resume + N - k steps, end in the same bits: weights, EMAs, optimizer, data, log."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ditfast import checkpoint
from ditfast.config import ConfigError, save_config
from ditfast.kernels import autotune
from ditfast.train import Trainer, train

STEPS = 8


class Crash(BaseException):
    """Stands for a kill: nothing in the run may handle it."""


def crash_at(monkeypatch, step):
    """Makes a run die in the middle of its 0-based `step`, gradients computed and not yet applied."""
    original = Trainer._update

    def update(self):
        if self.step_done == step:
            raise Crash
        return original(self)

    monkeypatch.setattr(Trainer, "_update", update)


def crash_and_resume(monkeypatch, config, step):
    with monkeypatch.context() as patched:
        crash_at(patched, step)
        with pytest.raises(Crash):
            train(config)
    train(config)


def contents(directory):
    """Hashes of a run's last tensors by group, its scaler state, and its step."""
    loaded = checkpoint.load(directory)
    files = checkpoint.verify(loaded.path)["files"]
    hashes = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return hashes, loaded.state["scaler"], loaded.step


def records(directory, timed=("images_per_s", "step_ms", "data_wait", "peak_bytes")):
    lines = (Path(directory) / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


VARIANTS = {
    "fp32": {},
    "workers": {"data.workers": 2},
    "bf16-fast": {"train.precision": "bf16-fast"},
    "fp16": {"train.precision": "fp16"},
    "importance": {"diffusion.timestep_sampler": "loss-second-moment", "diffusion.diffusion_steps": 4},
    "accumulate-clip-warmup": {
        "train.accumulate": 2, "optim.clip_norm": 0.5, "optim.schedule": "cosine", "optim.warmup_steps": 7,
        "optim.ema_warmup": True, "optim.weight_decay": 0.1,
    },
    "bf16": {"train.precision": "bf16"},
    "fp16-fast": {"train.precision": "fp16-fast"},
    "deterministic": {"deterministic": True},
    "recompute": {"train.recompute": "block:2"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_resumed_run_ends_in_the_same_bits(variant, tiny_run, monkeypatch):
    common = {"train.steps": STEPS, "optim.ema_rates": [0.9, 0.99]} | variant
    whole, broken = tiny_run("whole", common), tiny_run("broken", common)
    train(whole)
    crash_and_resume(monkeypatch, broken, step=5)  # back to the checkpoint of step 3
    assert contents(broken.out) == contents(whole.out)
    assert records(broken.out) == records(whole.out)
    assert [r["step"] for r in records(whole.out)] == [2, 4, 6, 8]


def test_resuming_under_another_recompute_policy_ends_in_the_same_bits(tiny_run, monkeypatch):
    common = {"train.steps": STEPS, "train.precision": "bf16"}
    policies = ("none", "block", "mlp")
    whole, broken, resumed = (tiny_run("whole" if p == "none" else "broken", common | {"train.recompute": p})
                              for p in policies)  # fmt: skip
    train(whole)
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(broken)
    train(resumed)
    assert contents(resumed.out) == contents(whole.out)


def test_a_checkpoint_from_before_process_sit_goes_on_in_the_same_bits(tiny_run, monkeypatch):
    """It lacks the options that came since, and its window of losses ends with the term "vb"."""
    common = {"train.steps": STEPS}
    whole, broken = tiny_run("whole", common), tiny_run("broken", common)
    train(whole)
    with monkeypatch.context() as patched:
        crash_at(patched, 5)
        with pytest.raises(Crash):
            train(broken)
    last = checkpoint.load(broken.out)
    sums, options = last.tensors["losses"]["sums"], last.state["config"]
    assert len(sums) == 24 and sums[2] > 0
    last.tensors["losses"]["sums"] = torch.cat([sums[:3], sums[4:]])
    for name in ("process", "transport", "tuned"):
        del options[name]
    for name in ("mlp", "norm", "qk_norm", "position", "returns_sigma"):
        del options["model"][name]
    shutil.rmtree(last.path)
    checkpoint.save(broken.out, last.step, last.tensors, last.state)
    train(broken)
    assert contents(broken.out) == contents(whole.out)
    assert records(broken.out) == records(whole.out)


def test_what_is_compared_is_all_there(tiny_run):
    config = tiny_run(overrides={"train.steps": 3, "optim.ema_rates": [0.9, 0.99], "train.precision": "fp16"})
    train(config)
    loaded = checkpoint.load(config.out)
    assert set(loaded.tensors) >= {"model", "ema-0.9", "ema-0.99", "optimizer", "rng", "losses"}
    names = set(loaded.tensors["model"])
    assert set(loaded.tensors["optimizer"]) == {f"{n}:{k}" for n in names for k in ("exp_avg", "exp_avg_sq", "step")}
    assert "pos_embed" not in names and loaded.state["scaler"]["scale"] == 65536.0
    first = "x_embedder.proj.weight"
    assert not torch.equal(loaded.tensors["ema-0.9"][first], loaded.tensors["model"][first])


@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_is_repeated_or_skipped(workers, tiny_run, monkeypatch):
    seen: dict[int, list] = {}
    original = Trainer._backward

    def spy(self, x, y, t, weights, noise, drop):
        seen.setdefault(self.step_done, []).append(torch.cat([v.flatten().double() for v in (x, y, t, noise, drop)]))
        return original(self, x, y, t, weights, noise, drop)

    monkeypatch.setattr(Trainer, "_backward", spy)
    crash_and_resume(monkeypatch, tiny_run(overrides={"train.steps": 6, "data.workers": workers}), step=4)
    assert sorted(seen) == list(range(6))
    assert [len(seen[step]) for step in range(6)] == [1, 1, 1, 2, 2, 1]
    for step in (3, 4):
        assert torch.equal(*seen[step])
    distinct = {tuple(parts[0].tolist()) for parts in seen.values()}
    assert len(distinct) == 6


@pytest.mark.parametrize("trial", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, 9))])
def test_sigkill_at_a_random_moment(trial, tiny_run, tmp_path):
    overrides = {"train.steps": 40, "train.save_every": 2, "train.keep": 2, "data.workers": 2 * (trial % 2)}
    whole, killed = tiny_run("whole", overrides), tiny_run("killed", overrides)
    train(whole)
    save_config(killed, tmp_path / "killed.yaml")
    process = subprocess.Popen(
        [sys.executable, "-m", "ditfast.cli", "train", "--config", str(tmp_path / "killed.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        deadline, reached = time.monotonic() + 120, random.Random(time.time_ns()).randrange(2, 20)
        while process.poll() is None and time.monotonic() < deadline:
            newest = checkpoint.latest(killed.out)
            if newest is not None and int(newest.name.removeprefix("step-")) >= reached:
                break
            time.sleep(0.002)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert checkpoint.load(killed.out).step < 40, "killed too late to tell"
    train(killed)
    assert contents(killed.out) == contents(whole.out)
    assert [r["step"] for r in records(killed.out)] == list(range(2, 41, 2))


def test_resuming_with_more_steps_goes_on(tiny_run):
    train(tiny_run(overrides={"train.steps": 3}))
    train(tiny_run(overrides={"train.steps": 5}))
    assert checkpoint.load(tiny_run().out).step == 5


def test_a_finished_run_is_left_alone(tiny_run, caplog):
    config = tiny_run(overrides={"train.steps": 3})
    train(config)
    before = contents(config.out)
    with caplog.at_level("INFO", "ditfast"):
        train(config)
    assert contents(config.out) == before and "nothing to do: step 3 of 3" in caplog.text


@pytest.mark.parametrize("first, second", [("fp32", "fp16"), ("fp16", "bf16-fast")])
def test_resuming_in_another_precision(first, second, tiny_run):
    train(tiny_run(overrides={"train.steps": 3, "train.precision": first}))
    train(tiny_run(overrides={"train.steps": 5, "train.precision": second}))
    assert checkpoint.load(tiny_run().out).step == 5


def test_other_options_are_said(tiny_run, caplog):
    def warnings(overrides):
        caplog.clear()
        train(tiny_run(overrides=overrides))
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    assert warnings({"train.steps": 3}) == []
    assert warnings({"train.steps": 4, "train.log_every": 1}) == []
    (said,) = warnings({"train.steps": 5, "optim.lr": 0.5, "train.batch_size": 8})
    assert "optim.lr: 0.003 there, 0.5 here" in said and "train.batch_size: 16 there, 8 here" in said


def test_measured_kernel_configs_last_as_long_as_the_run_and_a_change_is_said(tiny_run, tmp_path, caplog):
    gpu, capability, triton = autotune.machine()
    source, file = autotune.hashes_of_ops()["patchify"], tmp_path / "tuned.json"
    choice = autotune.Choice("patchify", "key", source, gpu, capability, triton, (4,), (8,), 2.0, 1.0)
    autotune.write(file, [choice])
    with caplog.at_level("INFO", "ditfast"):
        out = train(tiny_run(overrides={"train.steps": 3, "tuned": str(file)}))
    assert "measured config of key: (4,) -> (8,)" in caplog.text and "WARNING" not in caplog.text
    assert checkpoint.load(out).state["tuned"] == {"key": [8]} and autotune.tuned_in_use() == {}
    caplog.clear()
    train(tiny_run(overrides={"train.steps": 4, "tuned": str(file)}))
    assert "other measured configs" not in caplog.text
    train(tiny_run(overrides={"train.steps": 5}))
    assert "was trained with other measured configs of the kernels" in caplog.text


def test_one_process_at_a_time(tiny_run, tmp_path):
    config = tiny_run(overrides={"train.steps": 3})
    claim = (
        "import fcntl, sys\n"
        "held = open(sys.argv[1], 'a+'); fcntl.lockf(held, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    Path(config.out).mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", claim, f"{config.out}/lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another process is training in out="):
            train(config)
    finally:
        other.communicate()
    train(config)
