"""A folder of image files, one sub-folder per class."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditfast.data.common import DataError, existing_folder

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageFolder:
    """Images under `path`, resized to cover `image_size`, centre-cropped and mapped to [-1, 1].

    path: sub-folders are the classes, in sorted order (`classes` has their names); a folder of images alone is one
    class.
    image_size: (height, width), or one number for a square. channels: 3 (RGB) or 1 (grey). flip: ask the loader for
    random mirroring.
    Raises DataError for a folder without images, a class without images, images beside class folders; on reading, for a
    broken file.
    """

    def __init__(
        self, path: str | Path, image_size: int | tuple[int, int], channels: int = 3, flip: bool = False
    ) -> None:
        if channels not in (1, 3):
            raise DataError(f"folder: channels is {channels}, expected 3 (RGB) or 1 (grey)")
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        root = existing_folder(path, "folder")
        entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
        folders = [entry for entry in entries if entry.is_dir()]
        loose = [str(entry) for entry in entries if _is_image(entry.name)]
        if folders and loose:
            raise DataError(
                f"folder: {root} has both class folders ({folders[0].name}, ...) and images "
                f"({Path(loose[0]).name}, ...); keep one kind"
            )
        by_class = [_images_below(folder) for folder in folders] if folders else [loose]
        for folder, files in zip(folders or [root], by_class, strict=True):
            if not files:
                raise DataError(f"folder: {folder} has no image; known suffixes: {' '.join(SUFFIXES)}")
        self.classes = [folder.name for folder in folders] or [root.name]
        self.files = [file for files in by_class for file in files]
        self.labels = np.repeat(np.arange(len(by_class)), [len(files) for files in by_class])
        self.channels, self.image_size, self.num_classes, self.flip = channels, (height, width), len(by_class), flip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file = self.files[index]
        try:
            with Image.open(file) as image:
                if image.mode.startswith(("I", "F")):
                    raise DataError(f"it has mode {image.mode}, more than 8 bits a channel; convert it to 8 bits first")
                pixels = np.asarray(cover(image.convert("RGB" if self.channels == 3 else "L"), self.image_size))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"folder: cannot use {file} (sample {index}): {error}") from error
        x = torch.from_numpy(pixels.reshape(*self.image_size, self.channels).transpose(2, 0, 1).astype(np.float32))
        return x / 127.5 - 1, int(self.labels[index])


def cover(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image` scaled until it just covers size (height, width), then centre-cropped.

    Halving by area while twice too large, then bicubic, as ADM (Dhariwal and Nichol 2021) and DiT prepare their
    training images.
    """
    height, width = size
    while min(image.width / width, image.height / height) >= 2:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _images_below(folder: Path) -> list[str]:
    """Image files anywhere below `folder`, sorted."""
    return sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names if _is_image(name))
