"""Samples as files: conversion to bytes, grids as PNG, arrays as .npz."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditfast.files import replacing


def to_uint8(x: Tensor) -> Tensor:
    """Images x (N, C, H, W) in [-1, 1] as bytes (N, H, W, C) uint8 on the CPU: clamp(127.5 x + 128, 0, 255), as the
    official sampler.

    Raises ValueError for another rank, or for NaN and infinity, naming the first such image.
    """
    if x.ndim != 4:
        raise ValueError(f"images have shape {tuple(x.shape)}, expected (N, C, H, W)")
    x = x.detach().to("cpu", torch.float32)
    if not x.isfinite().all():
        bad = int((~x.isfinite()).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"image {bad} of {len(x)} holds NaN or infinity; the model or the sampler diverged")
    return (127.5 * x + 128).clamp(0, 255).permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def save_grid(path: str | Path, images: Tensor | np.ndarray, columns: int, scale: int = 1, pad: int = 2) -> None:
    """Write images (N, H, W, C) uint8, C 1 or 3, as one PNG, row by row; the last row may be short.

    scale: whole-number enlargement by nearest neighbour. pad: white pixels (after scaling) around each image.
    Raises ValueError for other shapes or dtypes, no image, and columns, scale or pad out of range.
    """
    images = _checked(images)
    if columns < 1 or scale < 1 or pad < 0:
        raise ValueError(f"columns {columns}, scale {scale}, pad {pad}: expected at least 1, 1 and 0")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    rows, columns = -(-count // columns), min(columns, count)
    grid = np.full((rows * (height + pad) + pad, columns * (width + pad) + pad, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = pad + i // columns * (height + pad), pad + i % columns * (width + pad)
        grid[top : top + height, left : left + width] = image
    picture = Image.fromarray(grid if channels == 3 else grid[..., 0])
    with replacing(path) as file:
        picture.save(file, format="PNG")


def save_npz(path: str | Path, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> None:
    """Write images (N, H, W, C) uint8 as `arr_0`, which the ADM evaluator reads, and labels (N,) as int64 `labels`.

    Raises ValueError for other shapes or dtypes, or when the counts differ.
    """
    images, labels = _checked(images), np.asarray(labels)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels are {labels.dtype} {labels.shape}, expected int64 ({len(images)},), one for each image"
        )
    with replacing(path) as file:
        np.savez(file, arr_0=images, labels=labels.astype(np.int64))


def _checked(images: Tensor | np.ndarray) -> np.ndarray:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
        raise ValueError(
            f"images are {images.dtype} {images.shape}, expected uint8 (N, H, W, C) with N at least 1 and C 1 or 3"
        )
    return images
