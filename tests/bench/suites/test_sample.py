"""The suite `sample`: its rows, and samples that are not the reference's are refused."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from bench.rows import COMPILE, DITFAST, EAGER
from bench.suites import SMALL, Options, sample
from bench.suites.sample import SamplingJob, contests
from ditfast import cuda_graph
from ditfast.cuda_graph import WARMUP

CPU = torch.device("cpu")
JOB = SamplingJob("tiny", 64, 1, 1, "ddim", 4, "fp32", CPU, compile=False)


@pytest.mark.parametrize("job", list(contests(Options(CPU, SMALL))), ids=lambda job: f"{job.model} {job.sampler}")
def test_rows_of_the_small_suite(measured, job):
    rows = measured(job)
    assert list(rows) == [DITFAST, EAGER]
    for row in rows.values():
        assert row.why_not is None and row.name == f"{job.model} {job.sampler}-5"
        assert row.extra["ms_per_image"] == pytest.approx(row.ms / (job.batch * job.batches))
        assert (row.extra["sampler"], row.extra["steps"], row.extra["batch"]) == (job.sampler, 5, job.batch)


SAMPLINGS = pytest.mark.parametrize(("model", "sampler"), [
    ("tiny", "ddim"), ("tiny", "ddpm"), ("tiny SiT-S/2", "ode"), ("tiny SiT-S/2", "sde"),
    ("tiny LightningDiT-XL/1", "ode"), ("LargeDiT-tiny/2", "ddim"),
])  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16-fast", pytest.param("bf16", marks=pytest.mark.full)])
@SAMPLINGS
def test_every_sampling_passes_in_low_precision(measured, model, sampler, precision):
    rows = measured(replace(JOB, model=model, sampler=sampler, precision=precision))
    assert {provider: row.why_not for provider, row in rows.items()} == dict.fromkeys(rows)


@SAMPLINGS
def test_wrong_samples_are_refused(measured, model, sampler, monkeypatch):
    draw = sample.draw
    monkeypatch.setattr(sample, "draw", lambda *args: draw(*args) * 1.00001)
    rows = measured(replace(JOB, model=model, sampler=sampler))
    assert rows[DITFAST].ms is None and "the error of samples" in rows[DITFAST].extra["refused"]
    assert rows[EAGER].ms


@pytest.mark.parametrize(("model", "sampler", "wrong"), [
    ("tiny SiT-S/2", "ode", {"timestep_shift": 0.9}), ("tiny SiT-S/2", "sde", {"diffusion_norm": 0.999}),
    ("tiny SiT-S/2", "sde", {"last_step": "Euler"}), ("tiny SiT-S/2", "sde", {"last_step_size": 0.0401}),
    ("tiny LightningDiT-XL/1", "ode", {"timestep_shift": 1.0}), ("tiny LightningDiT-XL/1", "ode", {"method": "heun"}),
])  # fmt: skip
def test_another_path_is_refused(model, sampler, wrong):
    samplers = sample.Samplers(replace(JOB, model=model, sampler=sampler))
    samplers.truth()
    samplers.config = replace(samplers.config, sample=replace(samplers.config.sample, **wrong))
    assert "the error of samples" in samplers.check(DITFAST)


def test_another_guidance_is_refused(monkeypatch):
    monkeypatch.setattr(sample, "GUIDANCE", 4.0)
    samplers = sample.Samplers(JOB)
    samplers.config = replace(samplers.config, sample=replace(samplers.config.sample, guidance_channels=None))
    assert "the error of samples" in samplers.check(DITFAST)


class Stale:
    """In place of a CUDA graph: after the recording its replays read the inputs of then."""

    def __init__(self, fn, *_, **__):
        self.fn, self.calls, self.recorded = fn, Counter(), {}

    def __call__(self, *inputs, **form):
        key = (len(inputs), *form.items())
        self.calls[key] += 1
        if self.calls[key] > WARMUP:
            inputs = self.recorded.setdefault(key, [v.clone() for v in inputs])
        return self.fn(*inputs, **form)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_replays_that_do_not_read_their_inputs_are_refused(sampler, monkeypatch):
    monkeypatch.setattr(cuda_graph, "CudaGraph", Stale)
    monkeypatch.setattr("ditfast.sample.check_cuda_graph", lambda *_, **__: None)
    samplers = sample.Samplers(replace(JOB, sampler=sampler))
    options = replace(samplers.config.sample, steps=sample.CHECKED_STEPS, cuda_graph=True)
    drawn = sample.draw(samplers.network, replace(samplers.config, sample=options), samplers.labels)
    assert "the error of samples" in (samplers.truth().judge({"samples": drawn}) or "")


@pytest.mark.full
def test_torch_compile_samples(measured):
    rows = measured(replace(JOB, compile=True))
    assert rows[COMPILE].why_not is None and rows[DITFAST].ratio_to_compile > 0
