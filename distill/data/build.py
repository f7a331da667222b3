"""From what a source found to a `Source`: choose rows, decode them, cut splits, tell what was left out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from distill.contracts import Progress, Source
from distill.data.decode import Decoded, Item, PixelFormat, decode_images
from distill.data.rows import (
    MAX_CLASSES,
    check_labels,
    check_no_class_empty,
    class_numbers,
    drawn_per_class,
    empty_classes,
    entries,
    renumbering,
    share_per_class,
    take_out,
)
from distill.data.statistics import channel_statistics, split_of
from distill.errors import InputError
from distill.randomness import derive_seed

# The test cut never follows the recipe's seed: every run of a source is tested on the same images.
_TEST_SEED = derive_seed(0, "data", "test")


@dataclass(frozen=True)
class Reading:
    """How images are read, whatever the source."""

    pixel_format: PixelFormat
    bad_images: float
    progress: Progress


class Rows(ABC):
    """Labelled images that are not decoded yet.

    Args:
        labels: int64 (N,).
        where: names the data in messages.
        streamed: whether images can be read in ascending order only.
        folder: what the files' paths are told relative to; None where the user named none.
    """

    labels: Tensor
    where: str
    streamed: bool = False
    folder: Path | None = None

    @abstractmethod
    def originals(self, rows: Tensor) -> Iterator[Item]:
        """The images of these rows, int64 (n,), as they were found; ascending rows where images are streamed."""

    @abstractmethod
    def take(self, rows: Tensor, *, reading: Reading, title: str) -> Decoded:
        """Decode these rows, int64 (n,) ascending; `kept` counts positions in `rows`."""


@dataclass(frozen=True)
class EncodedRows(Rows):
    """Rows whose images are files or members of archives.

    Args:
        items: yields the images of the rows asked for, int64 (n,) ascending, in that order; where they are not
            streamed, of any rows.
    """

    labels: Tensor
    where: str
    items: Callable[[Tensor], Iterator[Item]]
    streamed: bool = False
    folder: Path | None = None

    def originals(self, rows: Tensor) -> Iterator[Item]:
        return self.items(rows)

    def take(self, rows: Tensor, *, reading: Reading, title: str) -> Decoded:
        return decode_images(
            self.items(rows),
            count=len(rows),
            pixel_format=reading.pixel_format,
            bad_images=reading.bad_images,
            progress=reading.progress,
            title=title,
        )


@dataclass(frozen=True)
class PixelRows(Rows):
    """Rows whose images are pixels already.

    Args:
        images: uint8 (N, Ch, H, W), handed over: it may be overwritten once taken.
    """

    labels: Tensor
    where: str
    images: Tensor

    def originals(self, rows: Tensor) -> Iterator[Item]:
        return (Item(f"{self.where}, row {row}", self.images[row].numpy()) for row in entries(rows))

    def take(self, rows: Tensor, *, reading: Reading, title: str) -> Decoded:
        if self._as_asked(reading.pixel_format):
            images = self.images if len(rows) == len(self.images) else self.images[rows]
            return Decoded(images, torch.arange(len(rows)))
        return decode_images(
            self.originals(rows),
            count=len(rows),
            pixel_format=reading.pixel_format,
            bad_images=0,
            progress=reading.progress,
            title=title,
        )

    def _as_asked(self, asked: PixelFormat) -> bool:
        channels, height, width = self.images.shape[1:]
        if asked.channels is not None and channels not in (1, 3):
            raise InputError(
                f"images of {channels} channels cannot become {asked.channels}",
                where="data.channels",
                found=asked.channels,
                allowed="null for images of this kind",
            )
        same_channels = asked.channels is None or channels == (1 if asked.channels == "grayscale" else 3)
        return same_channels and asked.size in (None, (height, width))


@dataclass(frozen=True)
class Found:
    """What a source holds, before anything is left out.

    Args:
        train: the training rows.
        test: the test rows; a share of the training rows to cut off instead, in (0, 1).
        classes: class names; None where labels are all that is known, then names are the numbers as text.
        notes: what a reader must know about how the data were found.
    """

    train: Rows
    test: Rows | float
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Part:
    """Decoded images uint8 (N, Ch, H, W), their new labels and rows int64 (N,), and what was left out on the way."""

    images: Tensor
    labels: Tensor
    rows: Tensor
    notes: tuple[str, ...]


def build_source(
    name: str,
    found: Found,
    *,
    pixel_format: PixelFormat,
    wanted: Sequence[str | int] | None,
    cap: int | None,
    valid: float,
    bad_images: float,
    seed: int,
    progress: Progress,
) -> Source:
    """Read the rows that the options leave and cut the splits; see `base.DataConfig` and `base.Data.open`."""
    names = class_names(found)
    numbers = class_numbers(wanted, names)
    table = renumbering(numbers, classes=len(names))
    classes = tuple(names[number] for number in numbers)
    reading = Reading(pixel_format, bad_images, progress)

    train_rows, test_rows, cut_notes = _train_and_test(found, classes=len(names))
    labels = table[found.train.labels[train_rows]]
    used = labels >= 0
    if cap is not None:
        used &= _capped(labels, used, cap, classes=len(classes), seed=seed)
    check_no_class_empty(labels[used], classes, where=found.train.where, fix=_FIX_EMPTY)

    test_from = found.test if isinstance(found.test, Rows) else found.train
    in_test = table[test_from.labels[test_rows]] >= 0
    test = _read(test_from, test_rows, in_test, table, reading=reading, split="test")
    train = _read(found.train, train_rows, used, table, reading=reading, split="training")
    _check_same_shape(train.images, test.images, where=found.train.where)
    check_no_class_empty(train.labels, classes, where=found.train.where, fix=_FIX_EMPTY)

    notes = [*found.notes, *cut_notes, *train.notes, *test.notes, *_untested(test.labels, classes)]
    taken = _valid_cut(train.labels, classes, valid, seed=seed, where=found.train.where)
    images, valid_images = take_out(train.images, taken)
    mean, std = channel_statistics(images)
    for note in notes:
        progress.note(note)
    source = Source(
        name=name,
        classes=classes,
        train=split_of(images, train.labels[~taken], train.rows[~taken]),
        valid=split_of(valid_images, train.labels[taken], train.rows[taken]),
        mean=mean,
        std=std,
        notes=tuple(notes),
        held_out=split_of(test.images, test.labels, test.rows),
    )
    progress.note(_summary(source))
    return source


def images_found(notes: Sequence[str]) -> int | None:
    """How many training images the data held before anything was left out, where the notes of a source tell."""
    counts = (_COUNTED.match(note) for note in notes)
    return next((int(count[1]) for count in counts if count), None)


# The notes of `_train_and_test` and `_read`.
_COUNTED = re.compile(r"\d+ of (\d{1,18}) (?:images are the test split|training images used)")
_FIX_EMPTY = "add images, or leave the class out with data.classes; labels count from 0"


def _summary(source: Source) -> str:
    shape = " x ".join(map(str, source.image_shape))
    return (
        f"{source.name}: {len(source.classes)} classes of {shape} images; "
        f"{len(source.train)} train, {len(source.valid)} valid, {len(source.test)} test"
    )


def class_names(found: Found) -> tuple[str, ...]:
    """The names of the classes by number.

    Raises:
        InputError: there is no image.
        DamagedDataError: labels out of range.
    """
    if not len(found.train.labels):
        raise InputError("there is no training image", where=found.train.where)
    if found.classes is not None:
        count = len(found.classes)
    else:
        count = min(max(int(found.train.labels.max()) + 1, 1), MAX_CLASSES)
    check_labels(found.train.labels, classes=count, where=found.train.where)
    if isinstance(found.test, Rows):
        if not len(found.test.labels):
            raise InputError("there is no test image", where=found.test.where)
        check_labels(found.test.labels, classes=count, where=found.test.where)
    return found.classes if found.classes is not None else tuple(map(str, range(count)))


def _train_and_test(found: Found, *, classes: int) -> tuple[Tensor, Tensor, list[str]]:
    """Row numbers of both parts, ascending, and what to tell where the test part had to be cut off."""
    labels = found.train.labels
    if isinstance(found.test, Rows):
        return torch.arange(len(labels)), torch.arange(len(found.test.labels)), []
    drawn = drawn_per_class(labels, share_per_class(labels, found.test, classes=classes), seed=_TEST_SEED)
    note = f"{int(drawn.sum())} of {len(labels)} images are the test split, the same for every seed"
    return torch.nonzero(~drawn).flatten(), torch.nonzero(drawn).flatten(), [note]


def _capped(labels: Tensor, used: Tensor, cap: int, *, classes: int, seed: int) -> Tensor:
    """bool (N,): at most `cap` used rows of each class, drawn by the seed."""
    group = torch.where(used, labels, classes)  # rows of other classes are a group of their own
    counts = torch.full((classes + 1,), cap, dtype=torch.int64)
    return drawn_per_class(group, counts, seed=derive_seed(seed, "data", "cap"))


def _read(rows: Rows, part: Tensor, used: Tensor, table: Tensor, *, reading: Reading, split: str) -> _Part:
    """Decode the used rows of a part; tell how many of the part they are."""
    chosen = part[used]
    if not len(chosen):
        raise InputError(
            f"no {split} image is left", where=rows.where, fix="use more classes, or a larger test share"
        )
    decoded = rows.take(chosen, reading=reading, title=f"decode {split}")
    kept = chosen[decoded.kept]
    labels = table[rows.labels[kept]]
    bad = len(chosen) - len(labels)
    notes = []
    if len(labels) < len(part):
        undecodable = f", {bad} cannot be decoded" if bad else ""
        notes.append(f"{len(labels)} of {len(part)} {split} images used{undecodable}")
    return _Part(decoded.images, labels, kept, tuple(notes))


def _check_same_shape(train: Tensor, test: Tensor, *, where: str) -> None:
    if train.shape[1:] != test.shape[1:]:
        raise InputError(
            "training and test images differ",
            where=where,
            found=f"training {tuple(train.shape[1:])}, test {tuple(test.shape[1:])} (Ch, H, W)",
            fix="set data.resize and data.channels",
        )


def _untested(labels: Tensor, classes: Sequence[str]) -> list[str]:
    empty = empty_classes(labels, classes)
    return (
        [f"no test image of {len(empty)} of {len(classes)} classes: {', '.join(empty[:10])}"] if empty else []
    )


def _valid_cut(labels: Tensor, classes: Sequence[str], share: float, *, seed: int, where: str) -> Tensor:
    """bool (N,): the rows of the validation split."""
    counts = share_per_class(labels, share, classes=len(classes))
    taken = drawn_per_class(labels, counts, seed=derive_seed(seed, "data", "valid"))
    check_no_class_empty(labels[~taken], classes, where=where, fix="lower data.valid, or add images")
    return taken
