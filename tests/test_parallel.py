"""Two processes under torchrun, on gloo: the numbers of one process at the same global batch, and a common end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ditfast import checkpoint
from ditfast.config import save_config
from ditfast.logs import LossWindow
from ditfast.train import train
from tests.test_sit import SIT

# fp32 sums are taken in another order: the rows of a batch in two halves. With Adam's usual eps a gradient that is zero
# but for rounding (that of k's bias) moves its weight as far as any other, so the comparison uses a larger eps.
EPS = {"optim.eps": 1e-4}
WEIGHTS = {"atol": 1e-6, "rtol": 1e-5}
LOSSES = {"rel": 1e-6}
RUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def launch(config, path, program=("-m", "ditfast.cli")):
    """Starts `ditfast train`, or a stand-in for it, with this configuration in two processes."""
    save_config(config, path)
    command = [*RUN, *program, "train", "--config", str(path)]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process, timeout=180):
    """Waits for the end and returns what was written to stderr; leaves nothing behind."""
    try:
        return process.communicate(timeout=timeout)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def losses(config):
    records = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    terms = [name for name in LossWindow.TERMS if name in records[0]]
    return [
        (r["step"], *(r[name] for name in terms), r["grad_norm"], *(b or 0.0 for b in r["loss_bins"])) for r in records
    ]


def assert_same(ours, theirs):
    assert [row[0] for row in losses(ours)] == [row[0] for row in losses(theirs)]
    for mine, other in zip(losses(ours), losses(theirs), strict=True):
        assert mine == pytest.approx(other, **LOSSES)
    mine, other = checkpoint.load(ours.out).tensors, checkpoint.load(theirs.out).tensors
    for group in ("model", "ema-0.9"):
        for name, value in mine[group].items():
            torch.testing.assert_close(
                value, other[group][name], **WEIGHTS, msg=lambda text, name=name: f"{name}: {text}"
            )


PARALLEL = {
    "plain": {},
    "accumulate": {"train.accumulate": 2, "optim.clip_norm": 0.5, "train.recompute": "block:2"},
    "mlp": {"train.recompute": "mlp"},
    "importance": {"diffusion.timestep_sampler": "loss-second-moment", "diffusion.diffusion_steps": 4},
    "bf16-fast": {"train.precision": "bf16-fast"},
    "sit": SIT | {"transport.timestep_sampler": "lognormal", "transport.cosine_loss": True, "optim.clip_norm": 0.5},
}


@pytest.mark.parametrize("options", [
    PARALLEL["accumulate"],
    PARALLEL["sit"],
    *(pytest.param(PARALLEL[name], marks=pytest.mark.full) for name in ("plain", "mlp", "importance")),
])  # fmt: skip
def test_two_processes_have_the_numbers_of_one(options, tiny_run, tmp_path):
    common = {"train.steps": 7} | EPS | options
    two, one = tiny_run("two", common | {"train.steps": 4}), tiny_run("one", common)
    errors = finish(launch(two, tmp_path / "two.yaml"))
    assert checkpoint.load(two.out).step == 4, errors
    assert json.loads((Path(two.out) / "step-00000004" / "manifest.json").read_text())["world_size"] == 2
    train(one)
    # One process takes over what two have begun, from step 3 on, which is in the middle of a window of logged losses.
    shutil.rmtree(Path(two.out) / "step-00000004")
    train(tiny_run("two", common))
    assert_same(two, one)


@pytest.mark.full
def test_fast_precision_in_two_processes_is_close(tiny_run, tmp_path):
    two, one = (tiny_run(name, PARALLEL["bf16-fast"]) for name in ("two", "one"))
    finish(launch(two, tmp_path / "two.yaml"))
    train(one)
    for mine, other in zip(losses(two), losses(one), strict=True):
        assert mine[1] == pytest.approx(other[1], rel=0.02)


@pytest.mark.parametrize("signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_two_processes_stop_together(signum, tiny_run, tmp_path):
    config = tiny_run("two", {"train.steps": 100_000, "train.save_every": 100_000, "data.workers": 1})
    process = launch(config, tmp_path / "two.yaml")
    log = Path(config.out) / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)  # to torchrun, which forwards it to the process groups of its workers
    errors = finish(process)
    step = checkpoint.load(config.out).step
    stops = [int(n) for n in re.findall(r"after step (\d+); the same command continues", errors)]
    assert stops == [step, step], errors
    assert "ditfast/train.py" not in errors, errors  # in no traceback but torchrun's own
    train(tiny_run("two", {"train.steps": step + 1}))
    assert checkpoint.load(config.out).step == step + 1


def test_a_batch_that_processes_cannot_share_is_refused_by_all(tiny_run, tmp_path):
    errors = finish(launch(tiny_run("two", {"train.batch_size": 5}), tmp_path / "two.yaml"))
    assert "train.batch_size 5 must be a multiple of 2 = processes x train.accumulate" in errors


FAILING = """
import os, sys, torch
from ditfast import cli
from ditfast.data import DataError
from ditfast.train import Trainer

def nan_gradient(self, *chunk):
    terms = backward(self, *chunk)
    if self.step_done == 4 and self.world.rank == 1:
        self.optimizer.parameters["x_embedder.proj.bias"].grad.fill_(torch.nan)
    return terms

def bad_sample(self, *chunk):
    if self.step_done == 4 and self.world.rank == 1:
        raise DataError("sample 7 is bad")
    return backward(self, *chunk)

backward, Trainer._backward = Trainer._backward, KIND
sys.exit(cli.main())
"""


@pytest.mark.full
@pytest.mark.parametrize("kind, message", [
    ("nan_gradient", "gradient at step 5 is not finite.* last checkpoint is .*step-00000003"),
    ("bad_sample", "sample 7 is bad"),
])  # fmt: skip
def test_an_error_of_one_process_ends_all(kind, message, tiny_run, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING.replace("KIND", kind))
    # Two chunks: the spoiled gradient of the first is reduced with the second.
    config = tiny_run("two", {"train.accumulate": 2})
    process = launch(config, tmp_path / "two.yaml", [str(tmp_path / "failing.py")])
    errors = finish(process, timeout=90)
    assert process.returncode != 0
    # Of an error on all, torchrun may end the other before it has said so.
    assert 1 <= len(re.findall(message, errors)) <= (2 if kind == "nan_gradient" else 1), errors
    assert checkpoint.load(config.out).step == 3
    train(config)
    assert checkpoint.load(config.out).step == 8
