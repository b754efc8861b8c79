"""The handwritten digits that scikit-learn ships: 1797 real 8x8 scans of 10 classes."""

import torch
from torch import Tensor

from ditfast.data.common import DataError

# 7 is coprime to the period of 10 in which the scans list their classes, so each class keeps about one in seven (256
# scans in all).
HELDOUT_EVERY = 7


class Digits:
    """Scans of the UCI optical digits test set, values 0..16 mapped to [-1, 1].

    split: "train" (1541 scans), "heldout" (256, every seventh) or "all" (1797). Raises DataError for any other.
    Attributes: images (N, 1, 8, 8) float32, labels (N,) int64.
    """

    channels = 1
    image_size = (8, 8)
    num_classes = 10
    flip = False

    def __init__(self, split: str = "train") -> None:
        from sklearn.datasets import load_digits

        scans, labels = load_digits(return_X_y=True)
        heldout = torch.arange(len(labels)) % HELDOUT_EVERY == HELDOUT_EVERY - 1
        chosen = {"train": ~heldout, "heldout": heldout, "all": torch.ones_like(heldout)}
        if split not in chosen:
            raise DataError(f"digits: split {split!r} is unknown; choose one of {', '.join(chosen)}")
        self.images = (torch.from_numpy(scans).float() / 8 - 1).reshape(-1, 1, 8, 8)[chosen[split]]
        self.labels = torch.from_numpy(labels).long()[chosen[split]]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])
