"""The jobs of every scale: each once, of sizes that there are, in fields that a report sorts by."""

import importlib
from functools import cache

import pytest
import torch

from bench.suites import CPU, GPU, SMALL, SUITES, Options
from bench.training import model_config
from ditfast.hardware import DTYPES
from ditfast.layers import FAMILIES

sizes_of = cache(model_config)  # to parse a preset takes a tenth of a second

SCALES = pytest.mark.parametrize("scale", [SMALL, CPU, GPU], ids=lambda scale: scale.name)


@SCALES
@pytest.mark.parametrize("suite", ["model", "sample", "memory"])
def test_every_family_has_a_row(suite, scale):
    jobs = importlib.import_module(SUITES[suite]).contests(Options(torch.device("cpu"), scale))
    networks = {job.model.removeprefix("tiny").strip().partition("-")[0] or "DiT" for job in jobs}
    assert networks == set(FAMILIES)


@SCALES
@pytest.mark.parametrize("suite", ["model", "feed", "sample", "memory", "scale"])
def test_jobs_are_there_once(suite, scale):
    device = torch.device("cuda" if scale is GPU else "cpu")
    jobs = list(importlib.import_module(SUITES[suite]).contests(Options(device, scale)))
    found = [job.job for job in jobs]
    assert len(set(found)) == len(found) > 0
    for job, (named, name, dtype, shape) in zip(jobs, found, strict=True):
        assert named == suite and dtype in DTYPES and f"{job.pixels} px" in shape
        assert name.startswith(job.model) and (" fast" in name) == job.precision.endswith("-fast")
        latent = 16 if "LightningDiT" in job.model else 8
        assert sizes_of(job.model, job.pixels).input_size[0] * latent == job.pixels
