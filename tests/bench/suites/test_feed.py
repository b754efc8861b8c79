"""The suite `feed`: a trainer fed from disk, whose workers end with it."""

import multiprocessing
import time
from dataclasses import replace

import pytest
import torch

from bench.contest import Settings
from bench.rows import DITFAST
from bench.suites import SMALL, Options, feed
from bench.suites.feed import FAST_DIT, NO_WORKERS, RESIDENT, contests
from ditfast.train import Trainer

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, rounds=3, seconds=0.05)
(JOB,) = contests(Options(CPU, SMALL))


def test_rows_of_the_small_suite(monkeypatch):
    read = feed.FeatureFolder.__getitem__
    monkeypatch.setattr(feed.FeatureFolder, "__getitem__", lambda self, i: (time.sleep(0.01), read(self, i))[1])
    rows = {row.provider: row for row in JOB.measure(SETTINGS)}
    assert {name: row.why_not for name, row in rows.items()} == dict.fromkeys((DITFAST, NO_WORKERS, FAST_DIT, RESIDENT))
    for row in rows.values():
        assert row.extra["images_per_s"] == pytest.approx(1e3 * JOB.batch * JOB.steps / row.ms)
        assert 0 <= row.extra["data_wait"] < 1
    # Four images of 10 ms each step, which nothing hides where the process reads them itself.
    assert rows[NO_WORKERS].extra["data_wait"] * rows[NO_WORKERS].ms > 0.9 * 40 * JOB.steps
    assert rows[RESIDENT].extra["data_wait"] < 0.5 * rows[NO_WORKERS].extra["data_wait"]
    assert multiprocessing.active_children() == []


def test_labels_of_other_images_are_refused(monkeypatch):
    read = feed._Files.__getitem__
    monkeypatch.setattr(feed._Files, "__getitem__", lambda self, i: (read(self, i)[0], read(self, i - 1)[1]))
    rows = {row.provider: row for row in replace(JOB, workers=0).measure(SETTINGS)}
    assert "the files have" in rows[FAST_DIT].extra["refused"] and rows[DITFAST].ms


def test_a_wrong_step_is_refused_whoever_feeds_it(monkeypatch):
    update = Trainer._update

    def twice(trainer):
        for p in trainer.optimizer.parameters.values():
            p.grad *= 2
        return update(trainer)

    monkeypatch.setattr(Trainer, "_update", twice)
    rows = replace(JOB, workers=0).measure(SETTINGS)
    assert len(rows) == 4 and all("the error of" in row.extra["refused"] for row in rows)
