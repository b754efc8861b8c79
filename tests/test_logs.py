"""What a run reports: the fields of a record, the bins of the losses, TensorBoard, rates, and the log after a crash."""

import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch

from ditfast import logs
from ditfast.config import PRECISIONS
from ditfast.logs import LossWindow, Meter, Recorder, summary
from ditfast.train import train


def itself(tensor):
    return tensor


class TestLossWindow:
    def test_means_and_bins_by_hand(self):
        window = LossWindow(20, torch.device("cpu"))
        window.add(torch.tensor([0, 1, 2]), torch.ones(3), {n: torch.tensor([1.0, 3.0, 8.0]) for n in ("loss", "mse")})
        window.add(torch.tensor([1, 19]), torch.ones(2), {n: torch.tensor([5.0, 33.0]) for n in ("loss", "mse")})
        read = window.read(itself)
        assert read == {"loss": 10.0, "mse": 10.0, "loss_bins": [3.0, 8.0, *[None] * 7, 33.0]}

    def test_bins_are_equal_slices_of_any_chain(self):
        window = LossWindow(1000, torch.device("cpu"))
        t = torch.arange(1000)
        window.add(t, torch.ones(1000), {"loss": (t // 100).float()})
        assert window.read(itself)["loss_bins"] == list(range(10))

    def test_importance_weights_undo_the_sampling(self):
        """Twice as often drawn, half the weight: the mean is that over uniform timesteps, a bin stays a plain mean."""
        window = LossWindow(10, torch.device("cpu"))
        loss = {"loss": torch.tensor([6.0, 6.0, 3.0])}
        window.add(torch.tensor([0, 0, 9]), torch.tensor([0.75, 0.75, 1.5]), loss)
        read = window.read(itself)
        assert read["loss"] == pytest.approx(4.5) and (read["loss_bins"][0], read["loss_bins"][9]) == (6.0, 3.0)

    def test_reading_starts_anew(self):
        window = LossWindow(10, torch.device("cpu"))
        window.add(torch.tensor([3]), torch.ones(1), {"loss": torch.tensor([7.0])})
        window.read(itself)
        window.add(torch.tensor([4]), torch.ones(1), {"loss": torch.tensor([2.0])})
        assert window.read(itself)["loss"] == 2.0

    def test_means_are_over_all_processes(self):
        ours, theirs = (LossWindow(10, torch.device("cpu")) for _ in range(2))
        ours.add(torch.tensor([0]), torch.ones(1), {"loss": torch.tensor([1.0])})
        theirs.add(torch.tensor([0, 9, 9]), torch.ones(3), {"loss": torch.tensor([3.0, 5.0, 7.0])})
        read = ours.read(lambda sums: sums + theirs.sums)
        assert read["loss"] == 4.0 and read["loss_bins"] == [2.0, *[None] * 8, 6.0]

    def test_gathered_sums_are_counted_once(self):
        windows = [LossWindow(10, torch.device("cpu")) for _ in range(2)]
        for window, value in zip(windows, (1.0, 3.0), strict=True):
            window.add(torch.tensor([0]), torch.ones(1), {"loss": torch.tensor([value])})
        total = windows[0].sums + windows[1].sums
        for rank, window in enumerate(windows):
            assert torch.equal(window.gather(lambda _: total.clone(), rank == 0), total)
        assert windows[0].read(lambda sums: sums + windows[1].sums)["loss"] == 2.0

    def test_overflow_is_no_number(self):
        window = LossWindow(10, torch.device("cpu"))
        window.add(torch.tensor([0, 9]), torch.ones(2), {"loss": torch.tensor([float("inf"), 1.0])})
        read = window.read(itself)
        assert read["loss"] is None and read["loss_bins"][0] is None and read["loss_bins"][9] == 1.0
        assert "overflow" in summary(read | {"images_per_s": 1.0, "peak_bytes": 0, "data_wait": 0.0})


class TestMeter:
    @pytest.fixture
    def clock(self, monkeypatch):
        """now[0] is the time."""
        now = [100.0]
        monkeypatch.setattr(logs.time, "perf_counter", lambda: now[0])
        return now

    def test_rates(self, clock):
        meter = Meter()
        meter.steps, meter.waited, clock[0] = 4, 0.5, 102.0
        rates = meter.read(images_per_step=10, flops_per_image=1000, peak=1e5)
        assert rates == {"images_per_s": 20.0, "step_ms": 500.0, "data_wait": 0.25, "mfu": 0.2}

    def test_no_mfu_without_a_peak(self, clock):
        meter = Meter()
        meter.steps, clock[0] = 1, 101.0
        assert "mfu" not in meter.read(1, 1, None)

    def test_pauses_and_former_windows_do_not_count(self, clock):
        meter = Meter()
        meter.steps, clock[0] = 1, 101.0
        meter.read(1, 1, None)
        meter.steps, clock[0] = 1, 102.0
        with meter.paused():
            clock[0] = 150.0
        assert meter.read(8, 1, None)["images_per_s"] == 8.0


def test_no_peak_is_claimed_for_a_cpu():
    assert logs.peak_flops(torch.device("cpu"), PRECISIONS["bf16"]) is None


@pytest.mark.parametrize(("precision", "peak"), [("fp32", None), ("tf32", 494e12), ("bf16", 989e12)])
def test_peaks_are_those_of_tensor_cores(precision, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert logs.peak_flops(torch.device("cuda"), PRECISIONS[precision]) == peak


class TestRun:
    def test_fields_of_a_record(self, tiny_run):
        config = tiny_run(overrides={"train.steps": 5, "optim.warmup_steps": 4, "optim.lr": 4e-3})
        train(config)
        strict = partial(json.loads, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
        records = [strict(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records] == [2, 4, 5]
        assert [r["lr"] for r in records] == pytest.approx([2e-3, 4e-3, 4e-3])
        for record in records:
            assert record.keys() == {
                "step", "loss", "mse", "vb", "loss_bins", "grad_norm", "lr", "images_per_s", "step_ms", "data_wait",
                "peak_bytes",
            }  # fmt: skip
            assert record["loss"] == pytest.approx(record["mse"] + record["vb"])
            assert len(record["loss_bins"]) == 10 and record["grad_norm"] > 0
            assert record["images_per_s"] == pytest.approx(16e3 / record["step_ms"])
            assert 0 <= record["data_wait"] <= 1 and record["peak_bytes"] > 2**20

    def test_bins_agree_with_the_mean(self, tiny_run, monkeypatch):
        counts = []
        original = LossWindow.add

        def spy(self, t, weights, terms):
            counts.append(torch.bincount(t * 10 // 1000, minlength=10))
            original(self, t, weights, terms)

        monkeypatch.setattr(LossWindow, "add", spy)
        config = tiny_run(overrides={"train.steps": 2})
        train(config)
        record = json.loads((Path(config.out) / "log.jsonl").read_text())
        total = sum((b or 0) * int(n) for b, n in zip(record["loss_bins"], sum(counts), strict=True))
        assert total / 32 == pytest.approx(record["loss"])

    def test_loss_scale_is_reported(self, tiny_run):
        config = tiny_run(overrides={"train.steps": 2, "train.precision": "fp16"})
        train(config)
        assert json.loads((Path(config.out) / "log.jsonl").read_text())["loss_scale"] == 65536.0

    def test_tensorboard_has_the_records_and_the_grids(self, tiny_run):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        config = tiny_run(overrides={"train.steps": 4, "train.tensorboard": True, "train.sample_every": 4})
        train(config)
        records = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
        events = EventAccumulator(str(Path(config.out) / "tensorboard")).Reload()
        assert {"loss", "mse", "vb", "lr", "grad_norm", "images_per_s"} <= set(events.Tags()["scalars"])
        assert [(e.step, e.value) for e in events.Scalars("loss")] == [
            (r["step"], pytest.approx(r["loss"])) for r in records
        ]
        bins = [i for i, value in enumerate(records[0]["loss_bins"]) if value is not None]
        assert events.Scalars(f"loss_bins/{bins[0]}")[0].value == pytest.approx(records[0]["loss_bins"][bins[0]])
        assert [image.step for image in events.Images("samples")] == [4]

    def test_the_log_says_where_it_stands(self, tiny_run, caplog):
        config = tiny_run(overrides={"train.steps": 3})
        with caplog.at_level(logging.INFO, "ditfast"):
            train(config)
        assert "step 2 of 3: loss" in caplog.text and "saved" in caplog.text
        assert "fp32 on 1 x cpu; kernels: reference for adaln_modulate" in caplog.messages[0]


class TestRecorder:
    def records(self, directory, steps, start=0, enabled=True):
        recorder = Recorder(directory, 10, start, enabled=enabled, tensorboard=False)
        for step in steps:
            recorder.advance(step)
            recorder.write(
                {"step": step, "loss": 0.5, "images_per_s": 1.0, "peak_bytes": 0, "data_wait": 0.0, "mfu": 0.4}
            )
        recorder.close()

    def test_steps_after_the_checkpoint_are_dropped(self, tmp_path):
        self.records(tmp_path, [1, 2, 3, 4])
        self.records(tmp_path, [3, 4, 5], start=2)
        steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("tail", ['{"step": 3, "lo', '{"step": 3}', "garbage\n", "[3]\n", '{"loss": 1}\n'])
    def test_half_a_line_of_a_killed_run_is_dropped(self, tail, tmp_path):
        self.records(tmp_path, [1, 2])
        with (tmp_path / "log.jsonl").open("a") as file:
            file.write(tail)
        self.records(tmp_path, [3], start=3)
        steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert steps == [1, 2, 3]

    def test_other_processes_write_nothing(self, tmp_path):
        self.records(tmp_path / "none", [1], enabled=False)
        assert not (tmp_path / "none").exists()

    def test_mfu_is_shown_where_known(self):
        record = {"loss": 0.5, "images_per_s": 1.0, "peak_bytes": 2**30, "data_wait": 0.25, "mfu": 0.4}
        assert summary(record) == "loss 0.5000 1.0 img/s MFU 40.0% 1.00 GiB data wait 25%"


@pytest.mark.parametrize("rank, level", [("0", logging.INFO), ("1", logging.WARNING)])
def test_only_the_main_process_talks(rank, level, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    logs.setup_logging()
    assert logs.log.level == level
