"""The one place where images become pixels: encoded files, tar members and arrays into one uint8 tensor.

What an image becomes, in this order:

1. the first frame, turned upright by its EXIF orientation;
2. 8 bits a channel: 16-bit grey is scaled by 255 / 65535, palettes become RGB, CMYK and other colour spaces
   become RGB, transparency is composited on white; 32-bit float pixels are a bad image;
3. grey or RGB as `PixelFormat.channels` asks, grey by ITU-R 601 (Pillow's `L`);
4. scaled to cover `PixelFormat.size` and cropped at the centre, so that nothing is stretched; bilinear with
   antialiasing. Large JPEGs are decoded at a reduced scale, at least twice the wanted size, which saves most
   of their time and moves pixels by a level or two.

Only the formats below are tried: Pillow's others include some that start foreign programs.
"""

from __future__ import annotations

import os
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from distill.contracts import Progress
from distill.errors import DamagedDataError, InputError, MemoryExhaustedError

FORMATS = ("JPEG", "PNG", "PPM", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES = 256 * 2**20
LISTED = 10

_BATCH_ITEMS = 64
_BATCH_BYTES = 16 * 2**20

Channels = Literal["grayscale", "rgb"]


@dataclass(frozen=True)
class Item:
    """One image still to be read.

    Args:
        name: file or member, as messages show it.
        payload: encoded bytes, a file, or uint8 pixels (Ch, H, W).
        file: the image's own file name, without folders; empty for pixels.
    """

    name: str
    payload: bytes | Path | np.ndarray
    file: str = ""


@dataclass(frozen=True)
class PixelFormat:
    """What every image is brought to; None keeps what the file has.

    Args:
        channels: grey or RGB.
        size: (H, W) in pixels.
    """

    channels: Channels | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Decoded:
    """Images in the order of their items, without the bad ones.

    Args:
        images: uint8 (N, Ch, H, W).
        kept: int64 (N,), each image's position among the items.
        bad: the first bad items, `name: reason`.
    """

    images: Tensor
    kept: Tensor
    bad: tuple[str, ...] = ()


def decode_images(
    items: Iterable[Item],
    *,
    count: int,
    pixel_format: PixelFormat,
    bad_images: float,
    progress: Progress,
    title: str,
    threads: int | None = None,
) -> Decoded:
    """Decode `count` items in parallel into one preallocated tensor.

    The items are consumed as they are needed: at most 2 batches a thread (64 items or 16 MiB each) are alive.
    The result does not depend on the number of threads.

    Args:
        items: `count` of them.
        bad_images: share of `count` that may be undecodable; those are listed in a warning and left out.
        title: names the work in progress and messages, such as "decode train".
        threads: None is one a processor, at most 16.

    Raises:
        DamagedDataError: as soon as more images are bad than allowed; or there are fewer items than `count`.
        InputError: the images differ in size or channels, and `pixel_format` does not bring them to one.
        MemoryExhaustedError: the tensor does not fit.
    """
    table = _Table(count=count, allowed=int(bad_images * count), title=title)
    with progress.task(title, total=count, unit="image") as task:
        for batch in _in_parallel(_batches(items), pixel_format, threads or _processors()):
            for item, outcome in batch:
                table.add(item.name, outcome)
            task.advance(len(batch))
    return table.finish(progress)


def decode_each(
    items: Iterable[Item], *, pixel_format: PixelFormat
) -> Iterator[tuple[Item, np.ndarray | str]]:
    """Each item with its pixels, uint8 (Ch, H, W), or the reason why it has none; in order, decoded in parallel.

    The items are consumed as they are needed, as by `decode_images`.
    """
    for batch in _in_parallel(_batches(items), pixel_format, _processors()):
        yield from batch


def pixels_of(image: Image.Image, pixel_format: PixelFormat) -> np.ndarray:
    """Bring one opened image to the format; uint8 (Ch, H, W). Raises what Pillow raises on a bad image."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the {limit} that Pillow allows")
    if pixel_format.size is not None:
        side = 2 * max(pixel_format.size)  # the orientation is not known yet, hence one side for both
        image.draft(None, (side, side))
    ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bits(image)
    if pixel_format.channels is not None:
        image = image.convert("L" if pixel_format.channels == "grayscale" else "RGB")
    pixels = np.asarray(_fit(image, pixel_format.size))
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def image_shape(item: Item, pixel_format: PixelFormat) -> tuple[int, int, int] | None:
    """(Ch, H, W) of one item in the format, None where it cannot be decoded; for plans."""
    outcome = _decode(item, pixel_format)
    return None if isinstance(outcome, str) else (outcome.shape[0], outcome.shape[1], outcome.shape[2])


@dataclass
class _Table:
    """The rows decoded so far; the first good image decides the shape of all."""

    count: int
    allowed: int
    title: str
    rows: np.ndarray | None = None  # (count, Ch, H, W)
    first: str = ""
    kept: array[int] = field(default_factory=lambda: array("q"))
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    seen: int = 0

    def add(self, name: str, outcome: np.ndarray | str) -> None:
        position, self.seen = self.seen, self.seen + 1
        if self.seen > self.count:
            raise self._changed()
        if isinstance(outcome, str):
            self._add_bad(f"{name}: {outcome}")
            return
        if self.rows is None:
            self.rows, self.first = allocate(self.count, outcome.shape), name
        elif outcome.shape != self.rows.shape[1:]:
            raise _shapes_differ(self.first, self.rows.shape[1:], name, outcome.shape)
        self.rows[len(self.kept)] = outcome
        self.kept.append(position)

    def _changed(self) -> DamagedDataError:
        return DamagedDataError(
            f"{self.title}: the data changed while they were read",
            found=f"{self.seen} images",
            allowed=f"{self.count} images, as counted before",
        )

    def _add_bad(self, text: str) -> None:
        self.bad_count += 1
        if len(self.bad) < LISTED:
            self.bad.append(text)
        if self.bad_count > self.allowed:
            raise DamagedDataError(
                f"{self.title}: {self.bad_count} of the first {self.seen} images cannot be decoded",
                found="; ".join(self.bad),
                allowed=f"{self.allowed} of {self.count} (data.bad_images)",
                fix="repair or remove these files, or raise data.bad_images",
            )

    def finish(self, progress: Progress) -> Decoded:
        if self.seen != self.count:
            raise self._changed()
        if self.bad_count:
            listed = "\n  ".join(self.bad)
            progress.warn(
                f"{self.title}: {self.bad_count} of {self.count} images cannot be decoded and are left out:"
                f"\n  {listed}",
                bad=self.bad_count,
                count=self.count,
            )
        if self.rows is None:
            raise DamagedDataError(
                f"{self.title}: no image could be decoded", found="; ".join(self.bad) or None
            )
        images = torch.from_numpy(self.rows[: len(self.kept)])
        kept = torch.frombuffer(self.kept, dtype=torch.int64)  # there is a first image, so it is not empty
        return Decoded(images, kept, tuple(self.bad))


def allocate(count: int, shape: tuple[int, ...]) -> np.ndarray:
    try:
        return np.empty((count, *shape), dtype=np.uint8)
    except MemoryError:
        raise MemoryExhaustedError(
            f"{count} images of {'x'.join(map(str, shape))} bytes do not fit in memory",
            fix="set data.resize to a smaller side, or data.cap to fewer images a class",
        ) from None


def _shapes_differ(first: str, a: tuple[int, ...], name: str, b: tuple[int, ...]) -> InputError:
    if a[1:] != b[1:]:
        return InputError(
            "the images differ in size",
            found=f"{first} is {a[1]} x {a[2]}, {name} is {b[1]} x {b[2]} (height x width)",
            fix=f"set data.resize, for example data.resize={min(*a[1:], *b[1:])}",
        )
    return InputError(
        "the images differ in their number of channels",
        found=f"{first} has {a[0]}, {name} has {b[0]}",
        fix="set data.channels to rgb or grayscale",
    )


def _processors() -> int:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, 16)


def _batches(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Groups large enough to outweigh the cost of a task, small enough to bound what is alive."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += _alive_bytes(item.payload)
        if len(batch) >= _BATCH_ITEMS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _alive_bytes(payload: bytes | Path | np.ndarray) -> int:
    if isinstance(payload, bytes):
        return len(payload)
    return payload.nbytes if isinstance(payload, np.ndarray) else 0


_Outcomes = list[tuple[Item, "np.ndarray | str"]]


def _in_parallel(
    batches: Iterator[list[Item]], pixel_format: PixelFormat, threads: int
) -> Iterator[_Outcomes]:
    """Decode batches by threads (Pillow releases the interpreter lock); results come in order."""
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[_Outcomes]] = deque(
            pool.submit(_decode_batch, batch, pixel_format) for batch in islice(batches, 2 * threads)
        )
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(_decode_batch, batch, pixel_format) for batch in islice(batches, 1))


def _decode_batch(batch: list[Item], pixel_format: PixelFormat) -> _Outcomes:
    return [(item, _decode(item, pixel_format)) for item in batch]


def _decode(item: Item, pixel_format: PixelFormat) -> np.ndarray | str:
    """The item's pixels, uint8 (Ch, H, W), or the reason why there are none."""
    try:
        if isinstance(item.payload, np.ndarray):
            return _array_pixels(item.payload, pixel_format)
        with Image.open(BytesIO(_encoded(item.payload)), formats=FORMATS) as image:
            return pixels_of(image, pixel_format)
    except MemoryError:
        raise MemoryExhaustedError(
            f"{item.name} does not fit in memory", fix="scale the image down, or remove it"
        ) from None
    except Exception as error:  # Pillow's readers raise nearly every type on damaged files
        return _reason(error)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image in one of the formats {', '.join(FORMATS)}"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _encoded(payload: bytes | Path) -> bytes:
    if isinstance(payload, bytes):
        return payload
    size = payload.stat().st_size
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size} bytes, more than the {MAX_FILE_BYTES} allowed")
    return payload.read_bytes()


def _array_pixels(pixels: np.ndarray, pixel_format: PixelFormat) -> np.ndarray:
    """Grey and RGB follow the rules of files; other numbers of channels are resized plane by plane."""
    if len(pixels) == 1:
        return pixels_of(Image.fromarray(pixels[0]), pixel_format)
    if len(pixels) == 3:
        return pixels_of(Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), pixel_format)
    return np.stack([np.asarray(_fit(Image.fromarray(plane), pixel_format.size)) for plane in pixels])


def _eight_bits(image: Image.Image) -> Image.Image:
    """The same picture as `L` or `RGB`."""
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("32-bit float pixels")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("32-bit integer pixels")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _fit(image: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    """Scaled to cover (H, W), cropped at the centre."""
    if size is None or (image.height, image.width) == size:
        return image
    return ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BILINEAR)
