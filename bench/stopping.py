"""Ctrl-C and SIGTERM alike: whoever is stopped, as by `timeout`, takes its temporary files and processes with it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt inside; one that the parent has set to be ignored stays ignored."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        # A DataLoader whose workers are stopped as well would raise from it, in place of what is raised here.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heard:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])
