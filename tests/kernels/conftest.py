"""Fixtures of the kernel tests, which run on a GPU where there is one and else in Triton's interpreter."""

import importlib.util
import inspect

import pytest
import torch

from ditfast.kernels._triton import jit


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def generator(device: str) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


@pytest.fixture(autouse=True)
def nan_filled_empty(monkeypatch):
    """torch.empty holds NaN, so that an element never written shows."""
    was_on, was_warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """plant(modules, function, right, wrong, users): a bug in one jit function, where `users` and the modules call it.

    All jit functions of the modules are compiled anew, with `right` replaced by `wrong` in `function`.
    """

    def plant(modules, function, right, wrong, users=()):
        homes, kind = {module.__name__ for module in modules}, type(jit(lambda: 0))
        sources, imports = {}, {"from ditfast.kernels._triton import jit, tl"}
        for name, value in (item for module in modules for item in vars(module).items()):
            if isinstance(value, kind):
                plain = inspect.unwrap(value.fn)
                if plain.__module__ in homes:
                    sources[name] = inspect.getsource(plain)
                else:
                    imports.add(f"from {plain.__module__} import {name}")
        assert right in sources[function], f"{right!r} is no longer in {function}: bring the planted bug up to date"
        sources[function] = sources[function].replace(right, wrong)
        path = tmp_path / "mutant.py"
        path.write_text("\n\n".join([*imports, *sources.values()]))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        mutant = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(mutant)
        for user in {*modules, *users}:
            for name in sources:
                if hasattr(user, name):
                    monkeypatch.setattr(user, name, getattr(mutant, name))

    return plant
