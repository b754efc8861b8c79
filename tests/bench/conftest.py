"""Shared by the tests of the benches."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def ceilings_of_their_own(tmp_path_factory):
    """What tests measure of this machine's limits, beside other processes, is nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
