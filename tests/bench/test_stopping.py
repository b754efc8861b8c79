"""Ctrl-C and SIGTERM end a measurement in the same way."""

import signal

import pytest

from bench.stopping import terminated_as_interrupted

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def handlers():
    """Those of before, whatever a test does."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@BOTH
def test_a_signal_interrupts_and_is_as_before_afterwards(number):
    heard = []
    signal.signal(number, lambda *_: heard.append(number))
    with pytest.raises(KeyboardInterrupt), terminated_as_interrupted():
        signal.raise_signal(number)
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    signal.raise_signal(number)
    assert heard == [number]


@BOTH
def test_what_is_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with terminated_as_interrupted():
        signal.raise_signal(number)
