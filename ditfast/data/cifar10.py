"""CIFAR-10 from the files of its binary version."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ditfast.data.common import DataError, existing_folder

FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
RECORD = 1 + 3 * 32 * 32  # a label byte, then 32x32 bytes each of red, green and blue, row-major


class CIFAR10:
    """The 32x32 colour images of Krizhevsky (2009), values mapped to [-1, 1].

    path: folder of data_batch_1.bin .. data_batch_5.bin and test_batch.bin, or the folder that holds it
    (`cifar-10-batches-bin`).
    split: "train" or "test". flip: ask the loader for random mirroring.
    Raises DataError for a missing file, a file that is not a whole number of 3073-byte records, or a label above 9.
    """

    channels = 3
    image_size = (32, 32)
    num_classes = 10

    def __init__(self, path: str | Path, split: str = "train", flip: bool = False) -> None:
        if split not in FILES:
            raise DataError(f"cifar10: split {split!r} is unknown; choose one of {', '.join(FILES)}")
        folder = existing_folder(path, "cifar10")
        if (folder / "cifar-10-batches-bin").is_dir():
            folder /= "cifar-10-batches-bin"
        records = np.concatenate([_read(folder / name) for name in FILES[split]])
        self.labels = records[:, 0]
        self.pixels = records[:, 1:].reshape(-1, self.channels, *self.image_size)
        self.flip = flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.pixels[index]).float() / 127.5 - 1, int(self.labels[index])


def _read(file: Path) -> np.ndarray:
    """The records (N, 3073) uint8 of one file."""
    if not file.is_file():
        raise DataError(f"cifar10: {file} is missing; expected the binary version, cifar-10-binary.tar.gz, unpacked")
    data = np.fromfile(file, dtype=np.uint8)
    if data.size == 0 or data.size % RECORD:
        raise DataError(
            f"cifar10: {file} has {data.size} bytes, not a whole number of {RECORD}-byte records; "
            "it is truncated or not CIFAR-10"
        )
    records = data.reshape(-1, RECORD)
    wrong = np.flatnonzero(records[:, 0] >= CIFAR10.num_classes)
    if wrong.size:
        raise DataError(
            f"cifar10: {file}, record {wrong[0]} has label {records[wrong[0], 0]}, expected 0..9 "
            "(CIFAR-100 has two label bytes)"
        )
    return records
