"""Datasets by name, as a run's configuration gives them."""

import difflib
from collections.abc import Callable
from pathlib import Path

from ditfast.data.cifar10 import CIFAR10
from ditfast.data.common import DataError, Dataset
from ditfast.data.digits import Digits
from ditfast.data.features import FeatureFolder
from ditfast.data.folder import ImageFolder

# kind -> (constructor, its keyword arguments among those of build_dataset)
DATASETS: dict[str, tuple[Callable[..., Dataset], tuple[str, ...]]] = {
    "digits": (Digits, ("split",)),
    "folder": (ImageFolder, ("path", "image_size", "channels", "flip")),
    "cifar10": (CIFAR10, ("path", "split", "flip")),
    "features": (FeatureFolder, ("path", "num_classes")),
}
REQUIRED = ("path", "image_size")


def build_dataset(
    kind: str,
    path: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    *,
    channels: int | None = None,
    num_classes: int | None = None,
    split: str | None = None,
    flip: bool | None = None,
) -> Dataset:
    """The dataset `kind` of `DATASETS`. None means the dataset's own default.

    What a dataset fixes by itself (the size of digits, say) may be given too and is checked.
    Raises DataError for an unknown kind, a missing or superfluous argument, and data of another size, channels or
    number of classes.
    """
    if kind not in DATASETS:
        near = difflib.get_close_matches(kind, DATASETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"dataset {kind!r} is unknown, choose one of {', '.join(DATASETS)}{hint}")
    make, accepted = DATASETS[kind]
    size = (image_size, image_size) if isinstance(image_size, int) else image_size and tuple(image_size)
    given = {
        "path": path,
        "image_size": size,
        "channels": channels,
        "num_classes": num_classes,
        "split": split,
        "flip": flip,
    }
    given = {name: value for name, value in given.items() if value is not None}
    for name in REQUIRED:
        if name in accepted and name not in given:
            raise DataError(f"dataset {kind!r} needs {name}: give data.{name}")
    dataset = make(**{name: value for name, value in given.items() if name in accepted})
    for name, value in given.items():
        own = getattr(dataset, name, None)
        if name not in accepted and own != value:
            option = {"channels": "model.in_channels", "num_classes": "model.num_classes"}.get(name, f"data.{name}")
            found = f", it has {own!r}" if own is not None else ""
            raise DataError(
                f"dataset {kind!r} takes no {name} {value!r}{found}: that is {option}, given or of the preset"
            )
    return dataset
