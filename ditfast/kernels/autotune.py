"""Configs of the kernels: the pinned ones of the code, unless `use_tuned` was called for those measured on this GPU.

A launcher asks `pick` for its config, a tuple of whole numbers, the warps last. Nothing is measured while a model runs:
`python -m ditfast.kernels tune` measures (tune.py) and writes a file, and only a program that calls `use_tuned` reads
one. A choice holds for the shapes and dtypes that it was measured with, and for this GPU, this Triton and this source.
Other tiles add up in another order, so outputs under measured configs may differ from those under the pinned ones in
the last bits; equal choices give equal bits.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import _triton
from ._source import source_hash

Config = tuple[int, ...]

CACHE = Path.home() / ".cache" / "ditfast" / "tuned.json"
VERSION = 1
MAX_WARPS = 32
MAX_SIZE = 2**20
log = logging.getLogger("ditfast.kernels")

_choices: dict[str, Config] = {}
_measured: set[str] | None = None  # of the file in use, pinned ones too; None where no file is
_missed: set[str] = set()
_asked: dict[str, Config] | None = None


@dataclass(frozen=True)
class Choice:
    """The fastest config of one kernel for one set of shapes and dtypes, beside the pinned one.

    key as `pick` makes it; source the hash of the op's source; gpu, capability and triton where it was measured; times
    in milliseconds of the whole stage, forward or backward, that launches the kernel.
    """

    op: str
    key: str
    source: str
    gpu: str
    capability: str
    triton: str
    pinned: Config
    config: Config
    pinned_ms: float
    ms: float

    def __str__(self) -> str:
        if self.config == self.pinned:
            return f"{self.key}: {self.pinned} stays, {self.ms:.4f} ms"
        return f"{self.key}: {self.pinned} -> {self.config}, {self.pinned_ms:.4f} -> {self.ms:.4f} ms"


def pick(kernel: str, pinned: Config, *facts: Any) -> Config:
    """The config of a launch: `pinned`, or what was measured for this kernel and these tensors, sizes and dtypes."""
    if not _choices and _asked is None and _measured is None:
        return pinned
    key = f"{kernel}({', '.join(map(_name, facts))})"
    if _asked is not None:
        _asked[key] = pinned
    elif _measured is not None and key not in _measured | _missed:
        _missed.add(key)
        log.warning(
            "no measured config of %s: it stays at %s; `python -m ditfast.kernels tune` takes --sizes", key, pinned
        )
    return _choices.get(key, pinned)


def _name(fact: Any) -> str:
    if isinstance(fact, torch.Tensor):
        return f"{_name(fact.shape)} {_name(fact.dtype)}"
    if isinstance(fact, torch.Size):
        return "x".join(map(str, fact))
    return str(fact).removeprefix("torch.")


@contextmanager
def asking() -> Iterator[dict[str, Config]]:
    """Collect the keys that `pick` is asked for inside, with the pinned config of each."""
    global _asked
    outer, _asked = _asked, {}
    try:
        yield _asked
    finally:
        _asked = outer


@contextmanager
def trying(key: str, config: Config) -> Iterator[None]:
    """Let `pick` give this config inside."""
    global _choices
    outer, _choices = _choices, _choices | {key: config}
    try:
        yield
    finally:
        _choices = outer


def use_tuned(path: str | Path | None = None) -> dict[str, Config]:
    """Use the measured configs in a file (CACHE by default) from now on in this process; returns those not pinned.

    In a torch.distributed group every process calls this, and all take what process 0 reads. Each choice that differs
    from the pinned config is logged; choices for another GPU, Triton or source are left out, with a warning, and so is
    said once of each launch that the file has no choice for. ValueError where the file is not there or is damaged.
    """
    global _choices, _measured
    file = Path(path or CACHE).expanduser()
    found = _from_rank_0(lambda: _fitting(file))
    choices = [choice for choice in found if choice.config != choice.pinned]
    for choice in choices:
        log.info("measured config of %s", choice)
    _choices, _measured = {choice.key: choice.config for choice in choices}, {choice.key for choice in found}
    _missed.clear()
    return dict(_choices)


def use_pinned() -> None:
    """Go back to the pinned configs."""
    global _choices, _measured
    _choices, _measured = {}, None


@contextmanager
def using_tuned(path: str | Path) -> Iterator[None]:
    """`use_tuned` for the block, and then what was in use before."""
    global _choices, _measured
    before = _choices, _measured
    use_tuned(path)
    try:
        yield
    finally:
        _choices, _measured = before


def tuned_in_use() -> dict[str, Config]:
    """The measured configs in use that are not the pinned ones, by key."""
    return dict(_choices)


def known(path: Path) -> set[str]:
    """The keys for which a file, where there is one, holds a choice of this machine and source."""
    here, hashes = machine(), hashes_of_ops()
    found = read(path) if path.exists() else []
    return {c.key for c in found if _at(c) == here and c.source == hashes.get(c.op)}


def _from_rank_0(load: Callable[[], list[Choice]]) -> list[Choice]:
    """What `load` gives in process 0, or its error, in all: the others would wait for one that has left."""
    if not (dist.is_available() and dist.is_initialized()):
        return load()
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [load()]
        except ValueError as error:
            found = [ValueError(str(error))]
        except Exception as error:
            found = [RuntimeError(f"measured configs: {error!r}")]  # Not every error can be sent.
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _fitting(path: Path) -> list[Choice]:
    """The choices in the file that hold here and now."""
    found, here = read(path), machine()
    if elsewhere := {_at(choice) for choice in found if _at(choice) != here}:
        machines = "; ".join(", ".join(one) for one in sorted(elsewhere))
        log.warning("%s: left out what was measured on %s; this is %s", path, machines, ", ".join(here))
    found, hashes = [choice for choice in found if _at(choice) == here], hashes_of_ops()
    if changed := {choice.op for choice in found if choice.source != hashes.get(choice.op)}:
        log.warning("%s: left out %s, whose source has changed since", path, ", ".join(sorted(changed)))
    fitting = [choice for choice in found if choice.op not in changed]
    if not fitting:
        log.warning("%s has no choice for this GPU, Triton and source: all configs are the pinned ones", path)
    return fitting


def _at(choice: Choice) -> tuple[str, str, str]:
    return choice.gpu, choice.capability, choice.triton


def machine() -> tuple[str, str, str]:
    """What a choice depends on beside the source: the current GPU's name, its capability, Triton's version."""
    if not torch.cuda.is_available():
        return "no GPU", "none", _triton.VERSION
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}", _triton.VERSION


def hashes_of_ops() -> dict[str, str]:
    """The hash of each op's source by the op's name."""
    from . import OPS

    return {spec.name: source_hash(spec.source) for spec in OPS}


def read(path: Path) -> list[Choice]:
    """Every choice in a file; ValueError names a file that is not there, or what is wrong in it."""
    remedy = f"measure anew with `python -m ditfast.kernels tune --cache {path}`"
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"there are no measured configs at {path}: {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read measured configs from {path}: {error}; delete it and {remedy}") from error
    try:
        if tree["version"] != VERSION:
            raise ValueError(f"version is {tree['version']!r}, expected {VERSION}")
        return [_choice(entry) for entry in tree["choices"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold measured configs: {error!r}; delete it and {remedy}") from error


def _choice(entry: dict[str, Any]) -> Choice:
    """A Choice from its JSON; KeyError, TypeError or ValueError where it is none."""
    values = {field.name: entry[field.name] for field in fields(Choice)}
    for field in fields(Choice):
        value, expected = values[field.name], ""
        if field.type is str:
            expected = "" if isinstance(value, str) else "text"
        elif field.type is float:
            expected = "" if type(value) in (int, float) and 0 < value < math.inf else "milliseconds"
        elif not (isinstance(value, list) and value and all(type(n) is int and 0 < n <= MAX_SIZE for n in value)):
            expected = f"whole numbers from 1 to {MAX_SIZE}"
        if expected:
            raise ValueError(f"{field.name} is {value!r:.80}, expected {expected}")
    pinned, config = values["pinned"], values["config"]
    if len(config) != len(pinned) or config[-1] > MAX_WARPS or any(map(_is_astray, config, pinned)):
        raise ValueError(
            f"config is {config}, expected one like {pinned}: its numbers or powers of two, at most {MAX_WARPS} warps"
        )
    return Choice(**values | {"pinned": tuple(pinned), "config": tuple(config)})


def _is_astray(number: int, pinned: int) -> bool:
    """Whether a number is neither a power of two nor the pinned one, halved or doubled."""
    return number // (number & -number) not in (1, pinned // (pinned & -pinned))


def write(path: Path, choices: Sequence[Choice]) -> None:
    """Add choices to a file, in place of those of the same key and machine; the file is whole at any moment.

    A lock beside it, `path`.lock, lets processes that write at once take turns.
    """
    import fcntl  # Here, since not every system that can import the package has it.

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = {(c.key, _at(c)): c for c in (*(read(path) if path.exists() else ()), *choices)}
        entries = [asdict(choice) for _, choice in sorted(kept.items())]
        try:
            beside.write_text(json.dumps({"version": VERSION, "choices": entries}, indent=1) + "\n")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
