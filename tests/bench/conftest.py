"""Shared by the tests of the benches."""

import pytest
import torch

from bench.contest import Settings


@pytest.fixture(autouse=True, scope="session")
def ceilings_of_their_own(tmp_path_factory):
    """What tests measure of this machine's limits, beside other processes, is nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_thread():
    """Threads of tests beside other processes wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def measured():
    """measured(job) -> its rows on a CPU by provider, of a few short samples."""
    settings = Settings(torch.device("cpu"), rounds=3, seconds=0.05)
    return lambda job: {row.provider: row for row in job.measure(settings)}
