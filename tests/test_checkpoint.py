"""Checkpoints come back as saved; kills, full disks and flipped bits never cost the last good one."""

import errno
import itertools
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch

from ditfast import checkpoint
from ditfast.checkpoint import CheckpointError, latest, load, save, verify

# The children save and nothing else; no lock of the parent's threads is needed there.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

STATE = {"lr": 0.1 + 0.2, "data": {"epoch": 3}, "losses": [1.5, None], "name": "ä"}


def content(step, size=50):
    """Tensors that tell which save they are from."""
    generator = torch.Generator().manual_seed(step)
    weights = {name: torch.randn(size, 7, generator=generator) for name in ("a.weight", "b.weight")}
    return {
        "model": weights,
        "ema-0.9999": {name: -w for name, w in weights.items()},
        "rng": {"cpu": torch.get_rng_state()},
    }


def assert_is(loaded, step, size=50):
    assert loaded.step == step and loaded.state["step"] == step
    expected = content(step, size)
    for group in ("model", "ema-0.9999"):
        assert loaded.tensors[group].keys() == expected[group].keys()
        assert all(torch.equal(loaded.tensors[group][name], value) for name, value in expected[group].items())


def put(directory, step, size=50, **options):
    return save(directory, step, content(step, size), {"step": step}, **options)


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


class TestRoundTrip:
    def test_values_state_and_layout(self, tmp_path):
        path = save(tmp_path / "new" / "run", 1000, content(1000), STATE | {"step": 1000}, world_size=2)
        assert path == tmp_path / "new" / "run" / "step-00001000"
        assert names(path) == [
            "ema-0.9999.safetensors", "manifest.json", "model.safetensors", "rng.safetensors", "state.json"
        ]  # fmt: skip
        loaded = load(tmp_path / "new" / "run")
        assert_is(loaded, 1000)
        assert loaded.state == STATE | {"step": 1000} and loaded.path == path
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["world_size"] == 2
        assert manifest["tensors"]["model"]["a.weight"] == {"dtype": "F32", "shape": [50, 7]}

    def test_loaded_tensors_outlive_and_do_not_change_the_files(self, tmp_path):
        path = put(tmp_path, 1)
        tensors = load(tmp_path).tensors["model"]
        tensors["a.weight"].zero_()
        verify(path)
        shutil.rmtree(path)
        assert torch.equal(tensors["b.weight"], content(1)["model"]["b.weight"])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tensors": {"../x": {}}}, r"group name '\.\./x'"),
            ({"tensors": {"g": {"w": torch.zeros(1, dtype=torch.complex128)}}}, "'w' of group 'g' .*complex128"),
            ({"tensors": {"g": {"w": torch.zeros(2, 2).to_sparse()}}}, "torch.sparse_coo"),
            ({"tensors": {"g": {"w": torch.zeros(2, device="meta")}}}, "'w' of group 'g' cannot be stored: .*on meta"),
            ({"tensors": {"g": {"__metadata__": torch.zeros(1)}}}, "'__metadata__'"),
            ({"state": {"x": torch.zeros(1)}}, "not JSON: .*Tensor"),
            ({"step": -1}, "step -1"),
            ({"keep": 0}, "keep 0"),
        ],
    )
    def test_bad_arguments_write_nothing(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            save(tmp_path, **{"step": 1, "tensors": {}, "state": {}} | arguments)
        assert names(tmp_path) == []


class TestKeeping:
    def test_last_k_are_kept(self, tmp_path):
        for step in (5, 10, 15, 20):
            put(tmp_path, step, keep=2)
        assert names(tmp_path) == ["step-00000015", "step-00000020"]

    def test_none_keeps_all(self, tmp_path):
        for step in range(5):
            put(tmp_path, step, keep=None)
        assert len(names(tmp_path)) == 5

    def test_damaged_ones_do_not_count(self, tmp_path):
        put(tmp_path, 1)
        (put(tmp_path, 2) / "manifest.json").write_text("{}")
        put(tmp_path, 3, keep=2)
        assert {"step-00000001", "step-00000003"} <= set(names(tmp_path))

    def test_a_damaged_later_one_does_not_push_out_the_one_just_saved(self, tmp_path):
        put(tmp_path, 1)
        truncate(put(tmp_path, 9) / "model.safetensors")
        assert_is(load(tmp_path), 1)
        put(tmp_path, 2, keep=1)
        assert_is(load(tmp_path), 2)

    def test_same_step_again_replaces_it(self, tmp_path):
        put(tmp_path, 1)
        save(tmp_path, 1, {"model": {}}, {"second": True})
        assert load(tmp_path).state == {"second": True}
        assert names(tmp_path) == ["step-00000001"]

    @pytest.mark.parametrize("stray", ["step-00000001.tmp", "step-00000002", "step-00000001.old"])
    @pytest.mark.parametrize("link", [False, True])
    def test_a_stray_file_is_no_obstacle(self, tmp_path, stray, link):
        put(tmp_path, 1)
        (tmp_path / stray).symlink_to("step-00000001") if link else (tmp_path / stray).touch()
        put(tmp_path, 2)
        assert names(tmp_path) == ["step-00000001", "step-00000002"]
        assert_is(load(tmp_path / "step-00000001"), 1)
        assert_is(load(tmp_path), 2)

    def test_steps_sort_as_numbers(self, tmp_path):
        put(tmp_path, 99_999_999)
        put(tmp_path, 100_000_000)
        assert latest(tmp_path) == tmp_path / "step-100000000"
        assert_is(load(tmp_path), 100_000_000)

    def test_latest_of_nothing(self, tmp_path):
        (tmp_path / "step-00000001.tmp").mkdir()
        (tmp_path / "logs").mkdir()
        assert latest(tmp_path) is None and latest(tmp_path / "nowhere") is None
        with pytest.raises(CheckpointError, match="there is none"):
            load(tmp_path)


def flip(path, position, bit):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def swap(directory):
    a, b = directory / "model.safetensors", directory / "ema-0.9999.safetensors"
    a.rename(directory / "x"), b.rename(a), (directory / "x").rename(b)


DAMAGE = {
    "truncated shard": (lambda d: truncate(d / "model.safetensors"), "model.safetensors has .* bytes, expected"),
    "truncated state": (lambda d: truncate(d / "state.json"), "state.json has"),
    "truncated manifest": (lambda d: truncate(d / "manifest.json"), "manifest.json is damaged"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text(""), "manifest.json is damaged"),
    "manifest of a list": (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    "missing shard": (lambda d: (d / "rng.safetensors").unlink(), "rng.safetensors is missing"),
    "missing state": (lambda d: (d / "state.json").unlink(), "state.json is missing"),
    "missing manifest": (lambda d: (d / "manifest.json").unlink(), "manifest.json is missing"),
    "swapped shards": (swap, "is damaged: its sha256"),
    "shard of another step": (
        lambda d: shutil.copy(d.parent / "step-00000001" / "model.safetensors", d),
        "model.safetensors is damaged: its sha256",
    ),
    "whole directory of another step": (
        lambda d: (shutil.rmtree(d), shutil.copytree(d.parent / "step-00000001", d)),
        "holds step 1; it was renamed",
    ),
    "extra shard": (lambda d: (d / "opt.safetensors").touch(), "opt.safetensors is not part of the checkpoint"),
    "shard is a folder": (
        lambda d: ((d / "rng.safetensors").unlink(), (d / "rng.safetensors").mkdir()),
        "rng.safetensors",
    ),
}


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGE)
    def test_falls_back_and_says_so(self, tmp_path, caplog, damage):
        put(tmp_path, 1)
        path = put(tmp_path, 2)
        inflict, message = DAMAGE[damage]
        inflict(path)
        with pytest.raises(CheckpointError, match=message):
            load(path)
        with caplog.at_level(logging.WARNING, logger="ditfast"):
            assert_is(load(tmp_path), 1)
        assert "damaged checkpoint passed over" in caplog.text
        assert "step-00000002" in caplog.text and "falling back to" in caplog.text

    def test_a_sound_checkpoint_is_loaded_in_silence(self, tmp_path, caplog):
        put(tmp_path, 1)
        load(tmp_path)
        assert caplog.text == ""

    @pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors", "rng.safetensors"])
    def test_every_flipped_bit_is_caught(self, tmp_path, name):
        """All bytes of small files, 300 of the large ones, one random bit in each."""
        path = put(tmp_path, 1, size=4)
        file, chance = path / name, random.Random(0)
        size = file.stat().st_size
        positions = range(size) if size < 3000 else sorted(chance.sample(range(size), 300))
        for position in positions:
            bit = chance.randrange(8)
            flip(file, position, bit)
            with pytest.raises(CheckpointError):
                verify(path)
            flip(file, position, bit)
        assert_is(load(tmp_path), 1, size=4)

    def test_none_sound_lists_every_reason(self, tmp_path):
        truncate(put(tmp_path, 1) / "state.json")
        (put(tmp_path, 2) / "manifest.json").unlink()
        with pytest.raises(CheckpointError, match=r"step-00000002 is no checkpoint.*; .*step-00000001/state.json has"):
            load(tmp_path)

    def test_a_newer_format_asks_for_a_newer_ditfast(self, tmp_path, monkeypatch):
        path = put(tmp_path, 1)
        monkeypatch.setattr(checkpoint, "FORMAT", 0)
        with pytest.raises(CheckpointError, match="has format 1, this ditfast reads 0; update ditfast"):
            load(path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


class TestFullDisk:
    def test_on_a_real_file_system(self, small_disk):
        put(small_disk, 1, size=10_000)  # 1.1 MB
        with pytest.raises(
            CheckpointError,
            match=r"step-00000002: .*No space left.*needs 1,1\d\d,\d{3} bytes.*are free.*Free some space",
        ) as caught:
            put(small_disk, 2, size=10_000)
        assert f"the last good checkpoint is {small_disk / 'step-00000001'}" in str(caught.value)
        assert names(small_disk) == ["step-00000001"]
        assert_is(load(small_disk), 1, size=10_000)
        put(small_disk, 3, size=5_000)

    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("call", range(7))
    def test_at_every_sync(self, tmp_path, monkeypatch, call, first):
        """With one checkpoint before or none, the n-th fsync (5 files, directory, parent) finds no space."""
        if not first:
            put(tmp_path, 1)
        calls, real = itertools.count(), os.fsync

        def fsync(descriptor):
            if next(calls) == call:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        good = "there is no earlier checkpoint" if first else "the last good checkpoint is .*step-00000001"
        if call == 6:  # the checkpoint was already renamed: it is complete, only its name may not be durable yet
            good = "the last good checkpoint is .*step-00000002"
        with pytest.raises(CheckpointError, match=good):
            put(tmp_path, 2)
        assert not any(name.endswith(".tmp") for name in names(tmp_path))
        monkeypatch.undo()
        put(tmp_path, 3)
        assert_is(load(tmp_path), 3)

    def test_a_directory_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointError, match=r"Not a directory.*; Choose another directory") as caught:
            put(tmp_path / "file" / "run", 1)
        assert "Free some space" not in str(caught.value)

    def test_an_interrupt_leaves_no_half_checkpoint(self, tmp_path, monkeypatch):
        put(tmp_path, 1)

        def fsync(_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(KeyboardInterrupt):
            put(tmp_path, 2)
        assert names(tmp_path) == ["step-00000001"]


def in_child(function):
    """Run `function` in a forked process and wait for its end; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    process.join(30)
    return process.exitcode


def save_and_die(directory, step, call):
    """Save, but be killed before the `call`-th system call that makes anything durable or visible."""
    calls = itertools.count()

    def deadly(real):
        def wrapped(*args, **kwargs):
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return wrapped

    os.fsync, os.rename, os.rmdir = deadly(os.fsync), deadly(os.rename), deadly(os.rmdir)
    os.unlink, os.mkdir = deadly(os.unlink), deadly(os.mkdir)
    put(directory, step, keep=1)


class TestKill:
    @pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
    def test_at_every_system_call(self, tmp_path, step):
        """kill -9 before each mkdir, fsync, rename, unlink and rmdir of a save that replaces or prunes step 1."""
        for call in range(100):
            directory = tmp_path / str(call)
            put(directory, 1)
            code = in_child(lambda directory=directory, call=call: save_and_die(directory, step, call))
            assert_is(load(directory), latest_step := load(directory).step)
            assert latest_step in (1, step)
            if code == 0:
                break
            assert code == -signal.SIGKILL
            put(directory, 3, keep=1)
            assert names(directory) == ["step-00000003"], f"left behind after a kill at call {call}"
            shutil.rmtree(directory)
        assert 8 < call < 100

    def test_at_random_moments(self, tmp_path):
        """kill -9 while files of 5 MB are written in a loop."""
        size, chance, unfinished = 180_000, random.Random(0), 0

        def save_for_ever():
            torch.set_num_threads(1)  # a forked child has none of its parent's threads
            for step in itertools.count(1):
                put(tmp_path, step, size, keep=2)

        put(tmp_path, 0, size)
        for kills in range(40):  # on a busy machine many come before the child has begun
            if kills >= 6 and unfinished:
                break
            process = multiprocessing.get_context("fork").Process(target=save_for_ever)
            process.start()
            time.sleep(chance.uniform(0.02, 0.3))
            process.kill()
            process.join(30)
            unfinished += any(name.endswith(".tmp") for name in names(tmp_path))
            loaded = load(tmp_path)
            assert_is(loaded, loaded.step, size)
        assert unfinished, "no kill hit a save"
