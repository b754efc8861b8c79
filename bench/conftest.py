"""Options of `pytest bench/test_suites.py`."""

from typing import Any

from bench.suites import SUITES


def pytest_addoption(parser: Any) -> None:
    """Which suites, at which size, where."""
    group = parser.getgroup("bench")
    group.addoption("--suite", action="append", choices=sorted(SUITES), help="a suite, ops by default; may be repeated")
    group.addoption("--small", action="store_true", help="the smallest sizes: whether all runs, not how fast")
    group.addoption("--device", help="cuda, cuda:1, cpu; a GPU where there is one")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Adds the machine object that results files have."""
    from bench.machine import machine

    machine_info["ditfast"] = machine(config.getoption("--device"))
