"""Data: image and latent datasets, and the loader whose order depends on (seed, step) alone.

The place of packed latents (one memory-mapped file with both flips and the moments) and of their VAE extraction.
"""

from ditfast.data.cifar10 import CIFAR10
from ditfast.data.common import DataError, Dataset
from ditfast.data.digits import Digits
from ditfast.data.features import FeatureFolder
from ditfast.data.folder import ImageFolder
from ditfast.data.loader import Loader, epoch_order
from ditfast.data.registry import DATASETS, build_dataset

__all__ = [
    "CIFAR10",
    "DATASETS",
    "DataError",
    "Dataset",
    "Digits",
    "FeatureFolder",
    "ImageFolder",
    "Loader",
    "build_dataset",
    "epoch_order",
]
