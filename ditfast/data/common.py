"""What every dataset offers, and the error for data that cannot be used."""

from pathlib import Path
from typing import Protocol

from torch import Tensor


class DataError(ValueError):
    """Data that cannot be used; the message names the file or the sample, what was found and what was expected."""


class Dataset(Protocol):
    """Items (float32 (C, H, W), int label) by index, the same each time: any process may read any of them.

    `image_size` is (height, width). `flip` asks the `Loader` to mirror samples left to right at random; the dataset
    itself never does.
    """

    channels: int
    image_size: tuple[int, int]
    num_classes: int
    flip: bool

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


def existing_folder(path: str | Path, what: str) -> Path:
    """The folder `path`, or a DataError that says which data was looked for there."""
    path = Path(path).expanduser()
    if not path.is_dir():
        raise DataError(f"{what}: {path} is {'not a folder' if path.exists() else 'missing'}")
    return path
