"""SIGTERM as Ctrl-C: whoever is stopped, as by `timeout`, takes its temporary files and processes with it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt inside, as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # A DataLoader whose workers are stopped as well would raise from it, in place of what is raised here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
