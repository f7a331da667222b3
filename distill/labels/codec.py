"""What a codec of soft labels is, and the table of those there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError


class Codec(ABC):
    """A way to store logits. A subclass sets `name` and is marked `@register`; that is all it takes.

    Every array begins with the dimensions (V, N), so that rows are decoded without the others.
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    # Or probabilities, which losses of logits cannot use.
    holds_logits: ClassVar[bool] = True
    # Whether what is kept is right at the labels' own temperature only.
    belongs_to_temperature: ClassVar[bool] = False
    # Whether what is kept is of the classes of the two images of a mixed view, which must then be told.
    of_pairs: ClassVar[bool] = False

    @abstractmethod
    def encode(
        self, logits: Tensor, attributes: Mapping[str, Any], pairs: Tensor | None
    ) -> dict[str, np.ndarray]:
        """Arrays that hold `logits`, float (V, N, C) and finite, on any device; `pairs` are int64 (V, N, 2)."""

    @abstractmethod
    def decode(self, soft: SoftLabels, pairs: Tensor | None) -> Tensor:
        """float32 logits (V, N, C), on the CPU; `pairs` as they were encoded with."""

    @abstractmethod
    def shapes(
        self, soft: SoftLabels, *, images: int, classes: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        """dtype and dimensions behind V of every array that stored labels of this kind have."""

    def check(self, soft: SoftLabels, *, images: int, classes: int) -> None:
        """Raise DamagedDataError where the arrays do not hold logits (V, `images`, `classes`)."""
        wanted = self.shapes(soft, images=images, classes=classes)
        if set(soft.arrays) != set(wanted):
            raise DamagedDataError(
                f"soft labels of codec {self.name!r} have the wrong arrays",
                found=", ".join(sorted(soft.arrays)) or "none",
                allowed=", ".join(sorted(wanted)),
            )
        views = {len(array) for array in soft.arrays.values() if array.ndim}
        for name, (dtype, shape) in wanted.items():
            array = soft.arrays[name]
            if array.dtype != np.dtype(dtype) or array.shape[1:] != shape or array.ndim != len(shape) + 1:
                inside = ", ".join(map(str, shape))
                raise DamagedDataError(
                    "soft labels do not match the images and classes",
                    found=f"{name}: {array.dtype} {array.shape}",
                    allowed=f"{np.dtype(dtype)} (V, {inside})",
                )
        if len(views) != 1 or 0 in views:
            raise DamagedDataError("soft labels are empty, or their arrays are of different length")
        self.check_values(soft, classes=classes)

    def check_values(self, soft: SoftLabels, *, classes: int) -> None:
        """Raise DamagedDataError for NaN, infinite numbers, and classes that are none."""
        for name, array in soft.arrays.items():
            if array.dtype.kind == "f" and not _all_finite(array):
                raise DamagedDataError(
                    "soft labels are empty, NaN or infinite", found=name, allowed="finite numbers"
                )


CODECS: dict[str, Codec] = {}


def register(codec: type[Codec]) -> type[Codec]:
    """Class decorator: adds the codec to `CODECS` under its name."""
    assert codec.name not in CODECS, f"two codecs named {codec.name}"
    CODECS[codec.name] = codec()
    return codec


def index_dtype(classes: int) -> np.dtype[Any]:
    """The smallest unsigned integers that number C classes."""
    return np.dtype("u1") if classes <= 1 << 8 else np.dtype("u2") if classes <= 1 << 16 else np.dtype("u4")


def _all_finite(array: np.ndarray) -> bool:
    """Whether no number of an array that may be mapped and large is NaN or infinite."""
    return all(bool(np.isfinite(part).all()) for part in array)
