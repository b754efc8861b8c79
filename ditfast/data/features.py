"""Offline VAE latents in fast-DiT's layout: one .npy pair per image."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditfast.data.common import DataError, existing_folder


class FeatureFolder:
    """Latents as fast-DiT's extraction writes them, already scaled (Stable Diffusion's VAE: by 0.18215).

    path: folder of two folders, `<name>_features` with {i}.npy float32 (1, C, H, W) and `<name>_labels` with {i}.npy
    int64 (1,)
    (for instance imagenet256_features and imagenet256_labels; plain `features` and `labels` also do).
    num_classes: classes of the labels, which only reading every file could tell.
    The first pair gives `channels` and `image_size`. Raises DataError for files without a partner; on reading, for a
    broken file, another shape, non-finite values or a label outside 0 .. num_classes - 1.
    """

    flip = False

    def __init__(self, path: str | Path, num_classes: int = 1000) -> None:
        self.features, self.label_files = _pair_of_folders(existing_folder(path, "features"))
        names, labels = (sorted(_npy_names(folder), key=_by_number) for folder in (self.features, self.label_files))
        if names != labels:
            lone = min(set(names) ^ set(labels), key=_by_number)
            there, absent = (self.features, self.label_files) if lone in names else (self.label_files, self.features)
            raise DataError(f"features: {there / lone} has no partner {absent / lone}")
        if not names:
            raise DataError(f"features: {self.features} has no .npy file")
        self.names, self.num_classes = names, num_classes
        first = _read(self.features / names[0])
        if first.ndim not in (3, 4) or (first.ndim == 4 and first.shape[0] != 1):
            raise DataError(f"features: {self.features / names[0]} has shape {first.shape}, expected (1, C, H, W)")
        self.channels, height, width = first.shape[-3:]
        self.image_size = (height, width)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        feature_file, label_file = self.features / self.names[index], self.label_files / self.names[index]
        feature, label = _read(feature_file), _read(label_file)
        shape = (self.channels, *self.image_size)
        if feature.shape not in (shape, (1, *shape)) or feature.dtype.kind != "f":
            raise DataError(
                f"features: {feature_file} has {feature.dtype} {feature.shape}, expected float32 "
                f"{(1, *shape)} as in the first file"
            )
        if label.size != 1 or label.dtype.kind not in "iu":
            raise DataError(f"features: {label_file} has {label.dtype} {label.shape}, expected int64 (1,)")
        value = int(label.reshape(()))
        if not 0 <= value < self.num_classes:
            raise DataError(f"features: {label_file} has label {value}, expected 0..{self.num_classes - 1}")
        if not np.isfinite(feature).all():
            raise DataError(f"features: {feature_file} holds NaN or infinity")
        return torch.from_numpy(feature.reshape(shape).astype(np.float32)), value


def _pair_of_folders(root: Path) -> tuple[Path, Path]:
    """The only pair of a features and a labels folder below `root`, or at `root` by plain name."""
    candidates = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name.endswith("features")]
    pairs = [(folder, root / (folder.name.removesuffix("features") + "labels")) for folder in candidates]
    pairs = [(features, labels) for features, labels in pairs if labels.is_dir()]
    if len(pairs) != 1:
        found = ", ".join(folder.name for folder in sorted(root.iterdir())[:6]) or "nothing"
        raise DataError(
            f"features: {root} has {len(pairs)} pairs of folders <name>_features and <name>_labels, expected one; "
            f"found {found}"
        )
    return pairs[0]


def _npy_names(folder: Path) -> list[str]:
    return [entry.name for entry in os.scandir(folder) if entry.name.endswith(".npy")]


def _by_number(name: str) -> tuple[int, str]:
    """Sort key that puts 2.npy before 10.npy."""
    stem = name.removesuffix(".npy")
    return (int(stem) if stem.isdecimal() else -1, name)


def _read(file: Path) -> np.ndarray:
    try:
        with file.open("rb") as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    except Exception as error:  # damaged bytes make the reader fail in any way
        raise DataError(f"features: cannot read {file}: {error}") from error
