"""Images on their way out of a set: encoded bytes, or the file that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from distill.contracts import DistilledSet, Progress
from distill.errors import InputError


@dataclass(frozen=True)
class Picture:
    """One image to be written.

    Args:
        number: its position in the set.
        payload: encoded bytes, or the file that holds them.
        suffix: of its kind of file, such as `.png`.
        file: its own file name, without folders; empty where it has none.
        path: where it lies in the data, `/` between folders; a member of a shard is SHARD:MEMBER. None where the data
            are no files.
    """

    number: int
    payload: bytes | Path
    suffix: str
    file: str = ""
    path: str | None = None

    def encoded(self) -> bytes:
        """The bytes of the file; InputError where it cannot be read any more."""
        if isinstance(self.payload, bytes):
            return self.payload
        try:
            return self.payload.read_bytes()
        except OSError as error:
            raise InputError(
                "the original cannot be read", where=str(self.payload), found=error.strerror
            ) from error


def suffix_of(file: str) -> str:
    """What a file name ends in, from its last dot on; empty where there is none."""
    return "".join(file.rpartition(".")[1:]) if "." in file else ""


def pixels(distilled: DistilledSet, progress: Progress) -> Iterator[Picture]:
    """The images that the set holds, as PNG.

    float16 pixels, in units of pixel value / 255, are rounded to 8 bits and clamped to 0..255, which is told.

    Raises:
        InputError: images that are neither grey nor RGB.
    """
    clamped = 0
    for number, image in enumerate(distilled.images):
        rounded, outside = _eight_bits(image)
        clamped += outside
        yield Picture(number, png(rounded.numpy()), ".png")
    if distilled.images.is_floating_point():
        progress.note(
            f"float16 pixels were rounded to 8 bits; {clamped} of {distilled.images.numel()} lay outside 0..255 and "
            "were clamped"
        )


def _eight_bits(image: Tensor) -> tuple[Tensor, int]:
    """The image as uint8, and how many of its values were clamped."""
    if not image.is_floating_point():
        return image, 0
    values = (image.float() * 255).round()
    return values.clamp(0, 255).byte(), int(((values < 0) | (values > 255)).sum())


def png(pixels: np.ndarray) -> bytes:
    """PNG of uint8 (Ch, H, W).

    Raises:
        InputError: neither 1 nor 3 channels.
    """
    channels = len(pixels)
    if channels not in (1, 3):
        raise InputError(
            "images of this kind have no file to be written to",
            found=f"{channels} channels",
            allowed="1 (grey) or 3 (RGB) channels",
            fix="use --to indices",
        )
    picture = pixels[0] if channels == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
    out = BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()
