"""The suite `model`: its rows, and providers that compute something else are refused before they are timed."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import oracles
from bench.rows import COMPILE, DITFAST, EAGER
from bench.suites import SMALL, Options, model
from bench.suites.model import GRAPH, TrainingJob, contests
from bench.timing import Timing
from bench.training import TINY, trainer_for
from ditfast import kernels
from ditfast.build import build_model
from ditfast.diffusion.transport import paths
from ditfast.distributed import World
from ditfast.layers import block, rope

CPU = torch.device("cpu")
JOB = TrainingJob("tiny", 64, 2, "fp32", CPU, compile=False)


def test_rows_of_the_small_suite(measured):
    jobs = list(contests(Options(CPU, SMALL)))
    assert len({job.job for job in jobs}) == len(jobs) == 5
    rows = measured(jobs[0])
    assert list(rows) == [DITFAST, EAGER, "fast-DiT"]
    for row in rows.values():
        assert row.why_not is None and row.ms > 0 and row.peak_bytes > 0
        extra = row.extra
        assert extra["images_per_s"] == pytest.approx(2e3 / row.ms)
        assert extra["batch"] == 2 and extra["precision"] == "fp32" and extra["network"]["hidden_size"] == 64
        weights = extra["state_bytes"] / 4 / 4  # themselves, two moments, an EMA, in fp32
        assert weights == pytest.approx(sum(p.numel() for p in build_model(TINY).parameters()), rel=0.02)
        assert extra["mfu"] is None and extra["watts"] is None and extra["joules_per_image"] is None
        assert extra["power"] == "no NVIDIA driver" or torch.cuda.is_available()
    assert rows[DITFAST].extra["recompute"] == "ops" and rows[EAGER].extra["recompute"] is None


def test_a_policy_has_a_row_and_the_graph_says_why_it_has_no_time(measured):
    rows = measured(replace(JOB, recompute="block"))
    assert rows[DITFAST].ms and rows[DITFAST].extra["recompute"] == "block"
    assert rows[GRAPH].ms is None and "needs a CUDA device" in rows[GRAPH].extra["absent"]


@pytest.mark.parametrize("precision", ["bf16", "bf16-fast", "fp16"])
def test_every_precision_passes(measured, precision):
    rows = measured(replace(JOB, precision=precision))
    assert {provider: row.why_not for provider, row in rows.items()} == dict.fromkeys(rows)
    assert {row.dtype for row in rows.values()} == {precision.removesuffix("-fast")}


OTHERS = ("tiny SiT-S/2", "tiny LightningDiT-XL/1", "LargeDiT-tiny/2")


@pytest.mark.parametrize("precision", [
    "fp32", "bf16", *(pytest.param(name, marks=pytest.mark.full) for name in ("bf16-fast", "fp16", "tf32")),
])  # fmt: skip
@pytest.mark.parametrize("name", OTHERS)
def test_every_family_passes(measured, name, precision):
    rows = measured(replace(JOB, model=name, precision=precision))
    assert {provider: row.why_not for provider, row in rows.items()} == dict.fromkeys([DITFAST, EAGER, "fast-DiT"])
    extra = rows[DITFAST].extra
    assert extra["process"] == ("ddpm" if "LargeDiT" in name else "sit") and extra["flops"] > 0


def eps_of_norms(monkeypatch):
    norm = block._add_norm_modulate
    monkeypatch.setattr(block, "_add_norm_modulate", lambda options, *xs: norm(options | {"eps": 1e-4}, *xs))


def velocity(monkeypatch):
    linear = paths.PATHS["Linear"]
    monkeypatch.setitem(paths.PATHS, "Linear", lambda t: linear(t)._replace(d_sigma=-0.999 * torch.ones_like(t)))


def angles(monkeypatch):
    monkeypatch.setattr(rope, "rope_2d", partial(rope.rope_2d, theta=9000.0))


def eps_of_qk_norm(monkeypatch):
    norm = kernels.qk_norm_rope
    monkeypatch.setattr(kernels, "qk_norm_rope", lambda *xs, **options: norm(*xs, **options | {"eps": 1e-3}))


@pytest.mark.parametrize(
    ("name", "break_it"), [("tiny", eps_of_norms), *zip(OTHERS, (velocity, angles, eps_of_qk_norm), strict=True)]
)
def test_a_wrong_ditfast_is_refused(measured, name, break_it, monkeypatch):
    break_it(monkeypatch)
    rows = measured(replace(JOB, model=name))
    assert rows[DITFAST].ms is None and "x the eager reference's" in rows[DITFAST].extra["refused"]
    assert rows[EAGER].ms


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_wrong_peer_is_refused(measured, precision, monkeypatch):
    forward = oracles._Attention.forward
    factor = 1.0001 if precision == "fp32" else 1.1
    monkeypatch.setattr(oracles._Attention, "forward", lambda self, *inputs: factor * forward(self, *inputs))
    rows = measured(replace(JOB, precision=precision))
    assert rows[EAGER].ms is None and "refused" in rows[EAGER].extra and "refused" in rows["fast-DiT"].extra
    assert rows[DITFAST].ms


class Replays:
    """In place of a CUDA graph: what was recorded, for the inputs of now, or for those of the recording."""

    stale = False

    def __init__(self, fn, *_, **__):
        self.fn, self.first = fn, None

    def __call__(self, *batch):
        self.first = self.first or batch
        return self.fn(*(self.first if self.stale else batch))


@pytest.mark.parametrize("stale", [False, True])
def test_a_replay_that_does_not_read_its_inputs_is_refused(measured, stale, monkeypatch):
    monkeypatch.setattr(model, "check_cuda_graph", lambda *_: None)
    monkeypatch.setattr(model, "CudaGraph", Replays)
    monkeypatch.setattr(Replays, "stale", stale)
    row = measured(replace(JOB, recompute="ops"))[GRAPH]
    assert ("the error of losses" in (row.why_not or "")) == stale
    assert stale or (row.ms and row.extra["cuda_graph"])


def test_power_is_of_all_images_that_ran_meanwhile(monkeypatch):
    runs, counted = [], []

    class Readings:
        absent = None

        def __init__(self, device):
            pass

        def __enter__(self):
            runs.clear()

        def __exit__(self, *_):
            pass

        def figures(self, images):
            counted.append((images, len(runs)))
            return {"joules_per_image": 12.0 / images}

    monkeypatch.setattr(model, "Sampler", Readings)
    figures = model.power_of(lambda: runs.append(1), 8, Timing((100.0,)), 2.0, CPU)
    assert counted == [(20 * 8, 20)] and figures == {"joules_per_image": 12.0 / 160}


def test_the_state_is_counted_once_per_storage():
    weights = torch.zeros(10)
    assert model.distinct_bytes([weights, weights[:5], torch.zeros(3)]) == 52


def test_the_state_of_a_run_is_weights_moments_and_ema():
    with trainer_for(TINY, 2, "bf16", World(0, 1, CPU)) as trainer:
        count = sum(p.numel() for p in trainer.optimizer.parameters.values())
        held = model.distinct_bytes(model.state_of(trainer))
        assert held == 4 * (4 * count + trainer.model.pos_embed.numel())


@pytest.mark.full
@pytest.mark.parametrize("name", ["tiny", *OTHERS])
def test_torch_compile_is_what_others_are_compared_with(measured, name):
    rows = measured(replace(JOB, model=name, compile=True))
    assert rows[COMPILE].ratio_to_compile == 1
    assert rows[DITFAST].ratio_to_compile == pytest.approx(rows[COMPILE].ms / rows[DITFAST].ms)
