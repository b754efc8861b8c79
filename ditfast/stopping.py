"""Stopping between steps: signals are collected, and the loop acts on them when its state is whole."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INSIST_AFTER = 1.0  # seconds; torchrun forwards a Ctrl-C that a process may already have from the terminal


class Interrupted(Exception):
    """A signal asked the run to stop; it did, after a complete step and a checkpoint."""


@contextmanager
def stop_requests() -> Iterator[list[str]]:
    """Collects SIGINT and SIGTERM by name instead of dying in mid step; a later SIGINT raises KeyboardInterrupt."""
    received: list[str] = []
    first = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
            # Not the log: the signal may have come while the main thread was writing to it.
            os.write(2, b"\nfinishing the step, then saving (Ctrl-C again to stop at once)\n")
        elif number == signal.SIGINT and time.monotonic() - first > INSIST_AFTER:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
