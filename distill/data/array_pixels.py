"""From arrays of any layout, bytes or floats, to uint8 (N, Ch, H, W) and int64 labels.

Float images are in units of pixel value / 255: pixel = round(255 * value), value in [0, 1].
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from distill.data.decode import allocate
from distill.data.stored import Stored
from distill.errors import DamagedDataError, InputError

Layout = Literal["nhw", "nhwc", "nchw"]


def layout_of(stored: Stored, asked: Layout | None) -> Layout:
    """The order of the dimensions: as asked, else told by which is 1 or 3, the number of channels."""
    dimensions = len(stored.shape)
    if asked is not None:
        if dimensions != len(asked):
            raise InputError(
                "the layout does not fit", where=stored.where, found=f"{asked} for shape {stored.shape}"
            )
        return asked
    if dimensions == 3:
        return "nhw"
    if dimensions != 4:
        raise InputError(
            "these are not images",
            where=stored.where,
            found=f"shape {stored.shape}",
            allowed="(N, H, W), (N, H, W, Ch) or (N, Ch, H, W)",
        )
    first, last = stored.shape[1] in (1, 3), stored.shape[3] in (1, 3)
    if first == last:
        raise InputError(
            "it cannot be told which dimension is the channels",
            where=stored.where,
            found=f"shape {stored.shape}",
            fix="set data.layout to nhwc or nchw",
        )
    return "nchw" if first else "nhwc"


def shape_of(stored: Stored, asked: Layout | None) -> tuple[int, int, int]:
    """(Ch, H, W) of the images."""
    sizes = dict(zip(layout_of(stored, asked), stored.shape, strict=True))
    return sizes.get("c", 1), sizes["h"], sizes["w"]


def read_pixels(stored: Stored, *, layout: Layout | None) -> Tensor:
    """All images, uint8 (N, Ch, H, W).

    Raises:
        InputError: another dtype, floats outside [0, 1], an unclear layout.
        DamagedDataError: NaN or infinite pixels, with their number and the first image that has one.
    """
    if stored.dtype != np.uint8 and stored.dtype.kind != "f":
        raise InputError(
            "images of this type are not accepted",
            where=stored.where,
            found=str(stored.dtype),
            allowed="uint8 in 0..255, or floats in [0, 1]",
            fix="convert them, for example with x.astype('uint8')",
        )
    order = layout_of(stored, layout)
    images = allocate(stored.shape[0], shape_of(stored, layout))
    damage = _NonFinite(stored.where)
    for block, values in stored.blocks():
        if stored.dtype.kind == "f":
            values = _quantised(values, damage, block, stored.where)
        images[block] = _channels_first(values, order)
    damage.check()
    return torch.from_numpy(images)


def _channels_first(values: np.ndarray, order: Layout) -> np.ndarray:
    if order == "nhw":
        return values[:, None]
    return values.transpose(0, 3, 1, 2) if order == "nhwc" else values


class _NonFinite:
    """Counts NaN and infinite pixels over all blocks."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.count = 0
        self.first: int | None = None

    def see(self, wrong: np.ndarray, start: int) -> None:
        """wrong: bool (n, ...), rows `start` and following."""
        count = int(wrong.sum())
        if count and self.first is None:
            self.first = start + int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))[0])
        self.count += count

    def check(self) -> None:
        if self.count:
            raise DamagedDataError(
                f"{self.count} pixels are NaN or infinite",
                where=self.where,
                found=f"the first in image {self.first}",
            )


def _quantised(values: np.ndarray, damage: _NonFinite, block: slice, where: str) -> np.ndarray:
    """uint8 of floats in [0, 1]; non-finite values are recorded and become 0."""
    wrong = ~np.isfinite(values)
    damage.see(wrong, block.start)
    values = np.where(wrong, 0, values).astype(np.float64)
    low, high = values.min(initial=0.0), values.max(initial=0.0)
    if low < 0 or high > 1:
        raise InputError(
            "float images must lie in [0, 1]",
            where=where,
            found=f"values from {low:g} to {high:g} in images {block.start} to {block.stop - 1}",
            fix="divide by 255, or save 0..255 as uint8; undo any normalisation",
        )
    return np.floor(values * 255 + 0.5).astype(np.uint8)


def read_labels(stored: Stored, *, count: int) -> Tensor:
    """Labels of `count` images, int64 (N,); a column (N, 1) serves too. A wrong length is damage."""
    if stored.dtype.kind not in "iu" or len(stored.shape) not in (1, 2) or stored.shape[1:] not in ((), (1,)):
        raise InputError(
            "labels must be class numbers",
            where=stored.where,
            found=f"{stored.dtype} of shape {stored.shape}",
            allowed="integers of shape (N,)",
        )
    if stored.shape[0] != count:
        raise DamagedDataError(
            "images and labels differ in number",
            where=stored.where,
            found=f"{stored.shape[0]} labels for {count} images",
        )
    parts = [values.reshape(-1).astype(np.int64) for _, values in stored.blocks()]
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.empty(0, dtype=torch.int64)
