"""Pictures of a set: grids of its images as PNG bytes."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

GAP = 2  # transparent pixels between images of a grid


def grid_png(images: np.ndarray, labels: np.ndarray, *, columns: int, scale: int = 1) -> bytes:
    """One row a class, in the order of class numbers, each with the first `columns` images of its class.

    Each pixel becomes a square of `scale` pixels, never a blur. Gaps, and places that a class cannot fill,
    are transparent, so that the picture suits a light and a dark page. The same input gives the same bytes.

    Args:
        images: uint8 (N, H, W, Ch). Ch = 3 is shown as RGB; else the first channel as grey.
        labels: int (N,).
        columns: images a row, at most.
        scale: pixels a side that each pixel becomes.

    Returns:
        A PNG file.

    Raises:
        ValueError: other shapes or dtypes, no images, `columns` or `scale` below 1.
    """
    _check(images, labels, columns=columns, scale=scale)
    shown = images if images.shape[3] == 3 else images[..., :1]
    shown = shown.repeat(scale, axis=1).repeat(scale, axis=2)  # (N, H, W, 3 or 1)
    rows = [np.flatnonzero(labels == label)[:columns] for label in np.unique(labels)]
    _, height, width, channels = shown.shape
    widest = max(len(row) for row in rows)
    canvas = np.zeros(
        (len(rows) * (height + GAP) - GAP, widest * (width + GAP) - GAP, channels + 1), dtype=np.uint8
    )  # the last channel is alpha
    for r, row in enumerate(rows):
        for c, index in enumerate(row):
            top, left = r * (height + GAP), c * (width + GAP)
            canvas[top : top + height, left : left + width, :-1] = shown[index]
            canvas[top : top + height, left : left + width, -1] = 255
    return _png(canvas)


def thumbnails(images: np.ndarray, *, longest: int) -> np.ndarray:
    """Images whose longer side is at most `longest` pixels, by averaging; smaller ones stay as they are.

    Args:
        images: uint8 (N, H, W, Ch).

    Returns:
        uint8 (N, H', W', Ch), the aspect ratio kept within a pixel.
    """
    height, width = images.shape[1:3]
    if max(height, width) <= longest:
        return images
    ratio = longest / max(height, width)
    shape = max(1, round(width * ratio)), max(1, round(height * ratio))  # Pillow wants (W, H)
    small = [
        [
            np.asarray(Image.fromarray(image[..., k]).resize(shape, Image.Resampling.BOX))
            for k in range(image.shape[2])
        ]
        for image in images
    ]
    return np.asarray(small, dtype=np.uint8).transpose(0, 2, 3, 1)


def fitting_scale(height: int, width: int, *, goal: int) -> int:
    """The largest integer scale at which the longer side stays within `goal` pixels; at least 1."""
    return max(1, goal // max(height, width))


def _check(images: np.ndarray, labels: np.ndarray, *, columns: int, scale: int) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or 0 in images.shape:
        raise ValueError(f"images must be uint8 (N, H, W, Ch), not {images.dtype} {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be ({len(images)},), not {labels.shape}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, not {columns} and {scale}")


def _png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 2 or 4), grey or RGB with alpha, as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return out.getvalue()
