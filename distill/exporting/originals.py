"""The originals of a set's images: found again in the data by their rows, and compared with the set.

Files are listed and labels read, nothing is decoded to find an image. Then each original is decoded as the run did it:
its class and every pixel must be the set's, or the data are not those that the set was made from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.contracts import DistilledSet
from distill.data.build import Rows, class_names
from distill.data.decode import Item, PixelFormat, decode_each
from distill.data.rows import entries
from distill.errors import InputError
from distill.exporting.changed import Compared, fewer_or_more
from distill.exporting.pictures import Picture, png, suffix_of
from distill.exporting.spool import Spool


@dataclass(frozen=True)
class Originals:
    """Where the originals of a set are.

    Args:
        distilled: the set; its selection has rows.
        data: where they are looked for.
    """

    distilled: DistilledSet
    data: Compared

    @property
    def rows(self) -> Rows:
        """The training images of the data, as found."""
        return self.data.found.train

    def files(self) -> Iterator[Item]:
        """The files chosen, unread, in the order of the set; none where images are members of archives or pixels."""
        if self.rows.streamed:
            return
        for item in self.rows.originals(torch.from_numpy(_numbers(self.distilled))):
            if isinstance(item.payload, Path):
                yield item

    def pictures(self, *, spool: Path, payloads: bool = True) -> Iterator[Picture]:
        """Each original, once compared, in the order of the set.

        Args:
            spool: a folder for what comes out of a stream in another order.
            payloads: whether their bytes are asked for, besides names and paths.

        Raises:
            InputError: an original is not the set's image.
        """
        count = len(self.distilled)
        if not self.rows.streamed:
            for number, item in self._compared(torch.arange(count)):
                yield self._picture(number, item)
            return
        ascending = torch.from_numpy(np.argsort(_numbers(self.distilled), kind="stable"))
        with Spool(spool, count) as kept:
            for number, item in self._compared(ascending):
                kept.put(number, _record(self._picture(number, item), payload=payloads))
            for number in range(count):
                yield _from_record(number, kept.get(number))

    def _compared(self, order: Tensor) -> Iterator[tuple[int, Item]]:
        """The images at these positions of the set, int64 (N,), with their originals."""
        rows = torch.from_numpy(_numbers(self.distilled))[order]
        numbers = entries(order)
        pixel_format = self.data.config.pixel_format
        for item, outcome in decode_each(self.rows.originals(rows), pixel_format=pixel_format):
            number = next(numbers)
            self._compare(number, item, outcome)
            yield number, item
        if next(numbers, None) is not None:
            raise self.data.refusal(
                self.rows.where, found="fewer images than before", allowed="all of the set's"
            )

    def _compare(self, number: int, item: Item, outcome: np.ndarray | str) -> None:
        if isinstance(outcome, str):
            raise self.data.refusal(item.name, found=outcome, allowed="an image that can be decoded")
        own = self.distilled.images[number].numpy()
        if outcome.shape != own.shape:
            raise self.data.refusal(item.name, found=f"{outcome.shape} (Ch, H, W)", allowed=str(own.shape))
        if not np.array_equal(outcome, own):
            apart = np.abs(outcome.astype(np.int16) - own)
            raise self.data.refusal(
                item.name,
                found=f"{np.count_nonzero(apart)} of {own.size} values differ, by up to {apart.max()} of 255",
                allowed=f"the pixels of image {number} of the set",
            )

    def _picture(self, number: int, item: Item) -> Picture:
        if isinstance(item.payload, np.ndarray):
            return Picture(number, png(item.payload), ".png")
        return Picture(
            number, item.payload, suffix_of(item.file), item.file, _path(item.name, self.rows.folder)
        )


def check_comparable(distilled: DistilledSet, pixel_format: PixelFormat) -> None:
    """Raise InputError where no original could have the pixels of the set; nothing is read.

    A recipe from a stranger may ask for 4096 x 4096 pixels: no original is blown up to find that they differ.
    """
    if distilled.images.dtype != torch.uint8:
        raise InputError(
            "the images of the set were computed, and have no originals to compare them with",
            found="float16 pixels",
            allowed="uint8 pixels",
            fix="write the set's own images with --pixels",
        )
    height, width = distilled.images.shape[2:]
    if pixel_format.size not in (None, (height, width)):
        raise InputError(
            "the recipe brings originals to another size than the images of the set have",
            where="data.resize",
            found=" x ".join(map(str, pixel_format.size or ())),
            allowed=f"{height} x {width} (height x width)",
            fix="name the size by which the set was made, or write the set's own images with --pixels",
        )


def originals_in(data: Compared, distilled: DistilledSet) -> Originals:
    """The set's originals among the data that were found; their labels are compared with the set's.

    Args:
        data: those found.
        distilled: its selection has rows.

    Raises:
        InputError: the data are not those of the set.
        DamagedDataError: labels out of range.
    """
    train = data.found.train
    names = class_names(data.found)
    rows = _numbers(distilled)
    if rows.max() >= len(train.labels):
        raise fewer_or_more(
            train.where, fewer=True, found=f"{len(train.labels)} images", allowed=f"more than {rows.max()}"
        )
    theirs = train.labels[torch.from_numpy(rows)]
    for number, (there, here) in enumerate(zip(entries(theirs), entries(distilled.labels), strict=True)):
        if names[there] != distilled.classes[here]:
            raise data.refusal(
                f"{train.where}, row {rows[number]}",
                found=f"class {names[there]!r}",
                allowed=f"class {distilled.classes[here]!r}, as image {number} of the set",
            )
    return Originals(distilled, data)


def _numbers(distilled: DistilledSet) -> np.ndarray:
    """int64 (N,): the rows of the set's images."""
    assert distilled.selection is not None and distilled.selection.rows is not None, "refused before"
    return distilled.selection.rows


def _path(name: str, folder: Path | None) -> str:
    below = name if folder is None else name.removeprefix(f"{folder}{os.sep}")
    return below.replace(os.sep, "/")


def _record(picture: Picture, *, payload: bool) -> bytes:
    facts = json.dumps([picture.suffix, picture.file, picture.path]).encode()
    return facts + b"\n" + (picture.encoded() if payload else b"")


def _from_record(number: int, record: bytes) -> Picture:
    facts, _, payload = record.partition(b"\n")
    suffix, file, path = json.loads(facts)
    return Picture(number, payload, suffix, file, path)
