"""Training checkpoints: written whole or not at all, every byte hashed, no pickle.

A checkpoint is a directory `step-00001000` of one safetensors file per group of tensors, `state.json` for the rest, and
`manifest.json` with the sizes, hashes, shapes and dtypes of all of them and its own digest. It is written under another
name, synced and renamed, so a directory without a sound manifest does not count as a checkpoint. Loading hashes every
file before it uses any.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

log = logging.getLogger("ditfast")

Put = Callable[[bytes | memoryview], None]

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read; the message says which, why, and what is still good."""


@dataclass(frozen=True)
class Checkpoint:
    """What `save` was given: tensors by group and name, JSON state, and where it came from."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def save(
    directory: str | Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    *,
    keep: int | None = 3,
    world_size: int = 1,
) -> Path:
    """Write checkpoint `step` into `directory`, then remove older ones than the last `keep` (None: remove none).

    tensors: group -> name -> tensor on any device, of any strides, shared or not; names, values, shapes and dtypes come
    back as given, strides do not. state: what JSON holds (keys come back as strings, tuples as lists).
    Returns the checkpoint's directory. Only one process of a run may call this.
    Raises ValueError for arguments that cannot be stored, CheckpointError when the disk refuses; earlier checkpoints
    stay as they are.
    """
    directory = Path(directory)
    text, needed = _validated(step, tensors, state, keep)
    target = directory / f"step-{step:08d}"
    temporary = target.with_name(target.name + ".tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _clean(directory)
        temporary.mkdir()
        files = {STATE: _write(temporary / STATE, lambda put: put(text))}
        for group, named in tensors.items():
            files[f"{group}.safetensors"] = _write(temporary / f"{group}.safetensors", partial(_put_tensors, named))
        manifest = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size,
            "files": files,
            "tensors": _described(tensors),
        }
        _write(temporary / MANIFEST, lambda put: put(_sealed(manifest)))
        _sync(temporary)
        _publish(temporary, target)
    except OSError as error:
        raise CheckpointError(_refusal(target, temporary, error, needed)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if keep is not None:
        _prune(directory, step, keep)
    return target


def load(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """The newest sound checkpoint of a directory, or exactly the given `step-...` directory, its tensors on `device`.

    Every file is verified first. In a directory, a damaged checkpoint is passed over, and a warning in the log says
    what is wrong with it. Raises CheckpointError when none is sound, with the reason for each.
    """
    path = Path(path)
    candidates = [path] if _NAME.fullmatch(path.name) else _candidates(path)
    faults = []
    for candidate in candidates:
        try:
            checkpoint = _load(candidate, device)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            log.warning("damaged checkpoint passed over: %s; falling back to %s", fault, candidate)
        return checkpoint
    raise CheckpointError(f"no usable checkpoint in {path}: " + ("; ".join(faults) or "there is none"))


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint of `directory` by name, not verified; None when there is nothing to resume."""
    return next(iter(_candidates(Path(directory))), None)


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of one checkpoint directory, all of its files hashed; CheckpointError names the first fault."""
    path = Path(path)
    manifest = _manifest(path)
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']}, this ditfast reads {FORMAT}; update ditfast")
    files = manifest["files"]
    present = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")} - {MANIFEST}
    if present != set(files):
        name = min(present ^ set(files))
        raise CheckpointError(f"{path / name} is " + ("missing" if name in files else "not part of the checkpoint"))
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise CheckpointError(f"{path / name} has {size} bytes, expected {expected['bytes']}")
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise CheckpointError(f"{path / name} is damaged: its sha256 is not the manifest's")
        except OSError as error:
            raise CheckpointError(f"cannot read {path / name}: {error}") from error
    return manifest


def _load(path: Path, device: str | torch.device) -> Checkpoint:
    manifest = verify(path)
    try:
        tensors = {group: load_file(path / f"{group}.safetensors", device=str(device)) for group in manifest["tensors"]}
        state = json.loads((path / STATE).read_bytes())
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return Checkpoint(manifest["step"], tensors, state, path)


def _candidates(directory: Path) -> list[Path]:
    """Checkpoint directories by name, newest first; of one step the finished one before the one it was replacing."""
    found = [entry for entry in _entries(directory) if _NAME.fullmatch(entry.name) and entry.is_dir()]
    return sorted(found, key=lambda entry: (-_step(entry), entry.suffix))


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _validated(
    step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int | None
) -> tuple[bytes, int]:
    """The state as JSON, and the bytes that the checkpoint will take; ValueError for what cannot be stored."""
    if step < 0 or (keep is not None and keep < 1):
        raise ValueError(
            f"step {step}, keep {keep}: expected a step of 0 or more, and to keep 1 or more (None for all)"
        )
    for group, named in tensors.items():
        if not _GROUP.fullmatch(group):
            raise ValueError(f"group name {group!r} cannot be a file name; use letters, digits, '.', '_' and '-'")
        for name, tensor in named.items():
            kept = tensor.dtype in _DTYPES and tensor.layout == torch.strided and not tensor.is_meta
            if not kept or name == "__metadata__":
                what = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
                raise ValueError(f"tensor {name!r} of group {group!r} cannot be stored: {what}")
    try:
        text = json.dumps(dict(state), indent=1).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state is not JSON: {error}") from error
    return text, len(text) + sum(tensor.nbytes for named in tensors.values() for tensor in named.values())


def _described(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        group: {name: {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape)} for name, tensor in named.items()}
        for group, named in tensors.items()
    }


def _put_tensors(named: Mapping[str, Tensor], put: Put) -> None:
    """The safetensors format (header's length, header, data in its order), one tensor in host memory at a time.

    The library's own writer would hold a copy of all tensors, refuse shared ones and hide why a write failed.
    """
    header, end = {}, 0
    # Widest elements first keeps every tensor aligned to its own element size.
    ordered = sorted(named.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    put(len(text).to_bytes(8, "little"))
    put(text)
    for _, tensor in ordered:
        put(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _write(path: Path, fill: Callable[[Put], object]) -> dict[str, Any]:
    """Write and sync one file; its size and the hash of what was meant to be in it."""
    digest, size = hashlib.sha256(), 0

    def put(data: bytes | memoryview) -> None:
        nonlocal size
        file.write(data)
        digest.update(data)
        size += len(data)

    with path.open("xb") as file:
        fill(put)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    """The manifest's text with its own digest; one manifest has one text, so any other byte shows."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    body["sha256"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps(body, sort_keys=True, indent=1).encode()


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of one checkpoint directory, its own digest and its step checked, the other files not."""
    try:
        text = (path / MANIFEST).read_bytes()
        manifest = json.loads(text)
        sound = text == _sealed(manifest)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is no checkpoint: {MANIFEST} is missing") from error
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {error}") from error
    if not sound:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it does not match its own digest")
    if _NAME.fullmatch(path.name) and manifest["step"] != _step(path):
        raise CheckpointError(f"{path} holds step {manifest['step']}; it was renamed")
    return manifest


def _publish(temporary: Path, target: Path) -> None:
    """Give a finished checkpoint its name; a former one of the same step stays loadable as `.old` until then."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    _sync(target.parent)
    if old.exists():
        _remove(old)


def _clean(directory: Path) -> None:
    """Remove or repair what killed saves left behind."""
    for entry in _entries(directory):
        name = entry.name.removesuffix(".tmp")
        if name != entry.name and _NAME.fullmatch(name):
            _delete(entry)
        elif _NAME.fullmatch(entry.name) and entry.suffix == ".old":
            if entry.with_suffix("").exists():
                _remove(entry)
            else:
                os.rename(entry, entry.with_suffix(""))


def _prune(directory: Path, step: int, keep: int) -> None:
    """Remove checkpoints older than the last `keep` sound ones up to `step`.

    Later ones are not judged: after falling back from damaged checkpoints these lie ahead, and counting them would
    remove the good one just saved.
    """
    kept = 0
    for path in _candidates(directory):
        if _step(path) > step:
            continue
        if kept < keep:
            kept += _is_sound(path, _manifest)
            continue
        try:
            _remove(path)
        except OSError as error:
            log.warning("cannot remove an old checkpoint: %s", error)


def _is_sound(path: Path, check: Callable[[Path], object]) -> bool:
    try:
        check(path)
    except CheckpointError:
        return False
    return True


def _remove(path: Path) -> None:
    """Remove a checkpoint directory; killed half-way it is a `.tmp`, never half a checkpoint."""
    doomed = path.with_name(path.name + ".tmp")
    os.rename(path, doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Remove whatever has this name: a stray file must not make every later save fail."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refusal(target: Path, temporary: Path, error: OSError, needed: int) -> str:
    """Why `target` could not be written, and which checkpoint is still good. Frees the half-written one first."""
    shutil.rmtree(temporary, ignore_errors=True)
    place = next(parent for parent in (target.parent, *target.parent.parents) if parent.is_dir())
    advice = "Choose another directory; "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(place).free
        advice = (
            f"it needs {needed:,} bytes, {free:,} are free in {place}. Free some space or choose another directory; "
        )
    good = next((path for path in _candidates(target.parent) if _is_sound(path, verify)), None)
    return f"cannot write checkpoint {target}: {error}; {advice}" + (
        f"the last good checkpoint is {good}" if good else "there is no earlier checkpoint"
    )
