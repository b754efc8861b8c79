"""Whatever goes wrong gets a clear error or a clean stop, and the last good checkpoint stays usable."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast import checkpoint, cli
from ditfast.checkpoint import CheckpointError
from ditfast.config import ConfigError, save_config
from ditfast.data import DataError
from ditfast.stopping import Interrupted, stop_requests
from ditfast.train import Trainer, TrainingError, train


@pytest.fixture
def begun(tiny_run):
    """begun(overrides) -> the configuration of a run of 8 steps of which 3 are done and saved."""

    def make(overrides=None, name="run"):
        train(tiny_run(name, {"train.steps": 3} | (overrides or {})))
        return tiny_run(name, overrides)

    return make


def assert_usable(config, step=3):
    """The last good checkpoint is that of `step`, and the run goes on from it to its end."""
    assert checkpoint.load(config.out).step == step
    train(config)
    assert checkpoint.load(config.out).step == config.train.steps


def features(root, count=40, spoil=None):
    """A feature folder of 4-channel latents; `spoil` is called with the array and label of sample 30."""
    generator = np.random.default_rng(0)
    for folder in ("x_features", "x_labels"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        x, y = generator.standard_normal((1, 4, 8, 8)).astype(np.float32), np.array([i % 3])
        if spoil and i == 30:
            x, y = spoil(x, y)
        np.save(root / "x_features" / f"{i}.npy", x)
        np.save(root / "x_labels" / f"{i}.npy", y)
    return {"data.kind": "features", "data.path": str(root), "model.num_classes": 3}


SPOILED = {
    "nan": (lambda x, y: (np.full_like(x, np.nan), y), r"30\.npy holds NaN or infinity"),
    "label": (lambda x, y: (x, y + 9), r"30\.npy has label 9, expected 0\.\.2"),
    "shape": (lambda x, y: (x[..., :4], y), r"30\.npy has float32 \(1, 4, 8, 4\), expected float32 \(1, 4, 8, 8\)"),
    "dtype": (lambda x, y: (x.astype(int), y), r"30\.npy has int64"),
}  # fmt: skip


class TestData:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("kind", SPOILED)
    def test_a_bad_sample_is_named(self, kind, workers, tiny_run, tmp_path):
        spoil, message = SPOILED[kind]
        options = features(tmp_path / "data", spoil=spoil) | {
            "data.workers": workers, "train.batch_size": 4, "train.steps": 20, "train.save_every": 1,
        }  # fmt: skip
        config = tiny_run(overrides=options)
        with pytest.raises(DataError, match=message) as caught:
            train(config)
        assert "Traceback" not in str(caught.value)
        good = checkpoint.load(config.out).step
        assert 0 < good < 10, "the bad sample is not in the first batch, and each epoch has it once"
        shutil.rmtree(tmp_path / "data")
        features(tmp_path / "data")
        assert_usable(config, good)

    def test_a_truncated_image(self, tiny_run, tmp_path, capsys):
        (tmp_path / "data").mkdir()
        for i in range(16):
            Image.fromarray(np.full((8, 8), i, np.uint8)).save(tmp_path / "data" / f"{i:02}.png")
        content = (tmp_path / "data" / "07.png").read_bytes()
        (tmp_path / "data" / "07.png").write_bytes(content[: len(content) // 2])
        options = {
            "data.kind": "folder",
            "data.path": str(tmp_path / "data"),
            "data.image_size": 8,
            "model.in_channels": 1,
        }
        with pytest.raises(DataError, match=r"cannot use .*07\.png \(sample 7\)"):
            train(tiny_run(overrides=options))

    @pytest.mark.parametrize("options, message", [
        ({"model.num_classes": 9}, "model.num_classes is 9, but the data has 10 classes; raise it or leave it out"),
        ({"model.input_size": (16, 16)}, r"model.input_size is \(16, 16\), but the data has \(8, 8\)"),
        ({"model.in_channels": 3}, "channels 3, it has 1: that is model.in_channels, given or of the preset"),
        ({"data.kind": "digit"}, "did you mean 'digits'"),
        ({"data.kind": "folder"}, "dataset 'folder' needs path"),
        ({"data.kind": "folder", "data.path": "/nowhere", "data.image_size": 8}, "/nowhere is missing"),
        ({"data.path": "/nowhere"}, "'digits' takes no path '/nowhere'"),
        ({"data.flip": True}, "'digits' takes no flip True.*: that is data.flip,"),
    ])  # fmt: skip
    def test_data_that_does_not_fit(self, options, message, tiny_run):
        with pytest.raises(ValueError, match=message):
            train(tiny_run(overrides=options))


class TestConfiguration:
    @pytest.mark.parametrize("options, message", [
        ({"train.batch_size": 9, "train.accumulate": 2}, "train.batch_size 9 must be a multiple of 2 = processes x"),
        ({"train.precision": "bf61"}, "precision must be one of fp32, .* Did you mean 'bf16'"),
        ({"device": "cuda:7"}, "device 'cuda:7' was asked for, but"),
        ({"device": "tpu"}, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ({"model.patch_size": 3}, r"input_size \(8, 8\) must be divisible by patch_size 3"),
        ({"model.num_heads": 3}, "hidden_size 32 must be divisible by num_heads 3"),
        ({"diffusion.noise_schedule": "cosine"}, "cosine"),
        ({"diffusion.timestep_sampler": "unifrom"}, "unifrom"),
        ({"train.init_from": "/nowhere.pt"}, "/nowhere.pt is missing"),
    ])  # fmt: skip
    def test_is_refused(self, options, message, tiny_run):
        with pytest.raises(ValueError, match=message):
            train(tiny_run(overrides=options))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self, tiny_run):
        with pytest.raises(ValueError, match="sees no CUDA device; use device=cpu, or install a CUDA build"):
            train(tiny_run(overrides={"device": "cuda"}))

    def test_one_gpu_for_two_processes(self, tiny_run, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="'cuda:0' is one GPU for 2 processes; use device=cuda"):
            train(tiny_run(overrides={"device": "cuda:0"}))

    @pytest.mark.parametrize("options, message", [
        ({"model.hidden_size": 16}, "belongs to another run .model.hidden_size: 32 there, 16 here"),
        ({"model.block": "adaln"}, "model.block: adaln_zero there, adaln here"),
        ({"optim.ema_rates": [0.5]}, r"optim.ema_rates: \[0.9\] there, \[0.5\] here"),
        ({"diffusion.timestep_sampler": "loss-second-moment"}, "timestep_sampler: uniform there, loss-second-moment"),
    ])  # fmt: skip
    def test_of_another_run(self, options, message, begun, tiny_run):
        config = begun()
        before = (Path(config.out) / "config.yaml").read_text()
        with pytest.raises(ValueError, match=message):
            train(tiny_run(overrides=options))
        assert (Path(config.out) / "config.yaml").read_text() == before
        assert_usable(config)

    @pytest.mark.parametrize("out", ["file", "file/below", "/proc/none"])
    def test_a_place_that_cannot_be_written(self, out, tiny_run, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="cannot write to out=.*choose another directory"):
            train(tiny_run(overrides={"out": str(tmp_path / out)}))

    def test_the_command_exits_with_2(self, tiny_run, tmp_path, capsys):
        save_config(tiny_run(overrides={"model.patch_size": 3}), tmp_path / "c.yaml")
        assert cli.main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
        assert "ditfast: error: input_size (8, 8) must be divisible by patch_size 3" in capsys.readouterr().err


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


class TestCheckpoints:
    def test_a_truncated_one_is_passed_over(self, begun, tiny_run, caplog):
        config = begun({"train.save_every": 1})
        truncate(Path(config.out) / "step-00000003" / "model.safetensors")
        with caplog.at_level("INFO", "ditfast"):
            train(config)
        assert "damaged checkpoint passed over" in caplog.text and "model.safetensors has" in caplog.text
        assert f"resuming {config.out}/step-00000002 at step 2" in caplog.text
        assert checkpoint.load(config.out).step == 8

    def test_all_broken(self, begun):
        config = begun({"train.save_every": 1})
        for path in Path(config.out).glob("step-*"):
            truncate(path / "optimizer.safetensors")
        with pytest.raises(CheckpointError, match="no usable checkpoint in .*step-00000003.*step-00000001"):
            train(config)

    def test_the_command_exits_with_1(self, begun, tmp_path, capsys):
        config = begun()
        truncate(Path(config.out) / "step-00000003" / "manifest.json")
        save_config(config, tmp_path / "c.yaml")
        assert cli.main(["train", "--config", str(tmp_path / "c.yaml")]) == 1
        assert "ditfast: error: no usable checkpoint" in capsys.readouterr().err


class TestDisk:
    def test_full_while_saving(self, begun, monkeypatch):
        config, fsync = begun(), os.fsync

        def full(descriptor):
            if "step-" in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            with pytest.raises(
                CheckpointError, match=r"No space left on device.* last good checkpoint is .*step-00000003"
            ):
                train(config)
        assert_usable(config)

    def test_full_while_logging(self, begun, monkeypatch):
        config = begun()

        def full(self, record):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patched:
            patched.setattr("ditfast.logs.Recorder.write", full)
            with pytest.raises(
                TrainingError, match="stopped after step 4: .*No space left.* last checkpoint is .*00003"
            ):
                train(config)
        assert_usable(config)

    @pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
    def test_a_really_full_disk(self, tiny_run, tmp_path):
        """A small tmpfs is filled up in the middle of a run, and made larger afterwards."""
        disk = tmp_path / "disk"
        disk.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        try:
            config = tiny_run(overrides={"out": str(disk / "run"), "train.steps": 30, "train.keep": 99})
            with pytest.raises((CheckpointError, TrainingError), match=r"No space left.*checkpoint is .*step-000000"):
                train(config)
            good = checkpoint.load(config.out).step
            assert good % 3 == 0 and good < 30
            subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
            assert_usable(config, good)
        finally:
            subprocess.run(["umount", disk], check=True)


class TestGradients:
    @pytest.mark.parametrize("precision", ["fp32", "bf16-fast"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_non_finite_one_is_not_applied(self, precision, value, begun, monkeypatch):
        config = begun({"train.precision": precision})
        original, runs = Trainer._update, []

        def spoil(self):
            if self.step_done == 5:
                runs.append(
                    (self, {g: {n: t.clone() for n, t in named.items()} for g, named in state_of(self).items()})
                )
                self.optimizer.parameters["blocks.1.mlp.fc1.bias"].grad[0] = value
            return original(self)

        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_update", spoil)
            with pytest.raises(TrainingError, match="gradient at step 6 is not finite, so it was not applied; the last "
                               "checkpoint is .*step-00000003"):  # fmt: skip
                train(config)
        trainer, before = runs[0]
        after = state_of(trainer)
        assert all(torch.equal(after[g][n], t) for g, named in before.items() for n, t in named.items())
        assert_usable(config)

    def test_before_the_first_checkpoint(self, tiny_run, monkeypatch):
        monkeypatch.setattr("ditfast.optimizer.AdamWEMA.gradient_norm", lambda self, scale: torch.tensor(torch.nan))
        with pytest.raises(TrainingError, match="gradient at step 1 is not finite.*there is no checkpoint yet"):
            train(tiny_run())


def state_of(trainer):
    return trainer.optimizer.state_tensors()


class TestInterruption:
    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_in_mid_step(self, signum, tiny_run, monkeypatch):
        """The step is finished, saved, and the run stops; signal handlers are what they were."""
        original, handlers = Trainer._update, [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]

        def interrupted(self):
            if self.step_done == 4:
                os.kill(os.getpid(), signum)
            return original(self)

        config = tiny_run()
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "_update", interrupted)
            with pytest.raises(Interrupted, match=f"stopped on {signum.name} after step 5; the same command continues"):
                train(config)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert_usable(config, step=5)

    def test_in_the_last_step(self, tiny_run, monkeypatch):
        original = Trainer._update
        monkeypatch.setattr(Trainer, "_update", lambda self: [os.kill(os.getpid(), signal.SIGINT), original(self)][1])
        train(tiny_run(overrides={"train.steps": 1}))
        assert checkpoint.load(tiny_run().out).step == 1

    def test_twice_stops_at_once(self, begun, monkeypatch):
        config = begun()

        def impatient(self):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second Ctrl-C was ignored")

        with monkeypatch.context() as patched:
            patched.setattr("ditfast.stopping.INSIST_AFTER", -1.0)
            patched.setattr(Trainer, "_update", impatient)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        assert_usable(config)

    def test_the_same_ctrl_c_twice_is_one(self):
        """torchrun forwards to its processes the Ctrl-C that the terminal may have sent them already."""
        with stop_requests() as requests:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
        assert requests == ["SIGINT"] * 3

    def test_of_the_command(self, tiny_run, tmp_path):
        config = tiny_run(overrides={"train.steps": 100_000, "train.save_every": 5, "data.workers": 1})
        save_config(config, tmp_path / "c.yaml")
        command = [sys.executable, "-m", "ditfast.cli", "train", "--config", str(tmp_path / "c.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment)
        try:
            deadline = time.monotonic() + 60
            while checkpoint.latest(config.out) is None and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loader's worker too
            errors = process.communicate(timeout=60)[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 130 and "Traceback" not in errors, errors
        step = checkpoint.load(config.out).step
        assert f"ditfast: stopped on SIGINT after step {step}; the same command continues from there" in errors
        assert_usable(tiny_run(overrides={"train.steps": step + 2}), step)

    def test_at_once_by_the_command(self, begun, tmp_path, monkeypatch, capsys):
        def interrupt(config):
            raise KeyboardInterrupt

        monkeypatch.setattr("ditfast.train.train", interrupt)
        assert cli.main(["train"]) == 130
        assert "ditfast: interrupted" in capsys.readouterr().err
