"""A source without its pixels: the splits, labels and classes that a run would get, found without decoding.

What a method refuses for lack of images, it can then refuse in a dry run too. Undecodable images are not known
before they are decoded, so a run may have a few less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from distill.contracts import Source, Split
from distill.data.base import Data, DataConfig, Plan
from distill.data.build import Found, Reading, Rows, build_source
from distill.data.decode import Decoded, Item, PixelFormat
from distill.data.folder import Folder
from distill.data.valid import ValidConfig, ValidTarget
from distill.errors import InputError
from distill.progress import NullProgress
from distill.registry import DATA, lookup
from distill.training.config import Strict

# Most sources read their pixels with their labels; what takes longer than a few seconds is no cheap look.
MAX_READ_BYTES = 1_000_000_000


@dataclass(frozen=True)
class _Blank(Rows):
    """The labels of other rows, with one black pixel an image."""

    labels: Tensor
    where: str
    channels: int

    def originals(self, rows: Tensor) -> Iterator[Item]:
        return (Item(self.where, np.zeros((self.channels, 1, 1), dtype=np.uint8)) for _ in range(len(rows)))

    def take(self, rows: Tensor, *, reading: Reading, title: str) -> Decoded:
        blank = torch.zeros((len(rows), self.channels, 1, 1), dtype=torch.uint8)
        return Decoded(blank, torch.arange(len(rows)))


def outline(config: DataConfig, looked: Plan, *, seed: int) -> Source | None:
    """The source of `open_source` with every pixel black, statistics included; nothing is written or downloaded.

    Args:
        config: the recipe's `data`.
        looked: its `plan`.
        seed: the recipe's.

    Returns:
        None where the labels cannot be had cheaply: the data are still to be downloaded, or large.

    Raises:
        InputError, DamagedDataError: as `open_source`, for what shows without decoding.
    """
    data: type[Data] = lookup(config.name, DATA, what="data").load()
    cheap = data is Folder or (looked.image_bytes is not None and looked.image_bytes <= MAX_READ_BYTES)
    if looked.image_shape is None or not cheap:
        return None
    found = _find(data, config)
    if found is None:
        return None
    channels, height, width = looked.image_shape
    source = build_source(
        config.name,
        _blank(found, channels),
        pixel_format=PixelFormat(),
        wanted=config.classes,
        cap=config.cap,
        valid=config.valid,
        bad_images=config.bad_images,
        seed=seed,
        progress=NullProgress(),
    )
    train, valid, test = (
        _enlarged(split, height, width) for split in (source.train, source.valid, source.test)
    )
    return replace(source, train=train, valid=valid, held_out=test)


def target_outline(config: Strict, source: Source, *, seed: int) -> Source | None:
    """The target of a recipe in the same way.

    Args:
        config: the recipe's `target`.
        source: the `outline` of its data.
        seed: the recipe's.
    """
    if not isinstance(config, ValidConfig):
        assert isinstance(config, DataConfig), "a name in distill.registry.TARGETS"
        return outline(config, _plan(config), seed=seed)
    _, height, width = source.image_shape
    small = replace(source, valid=_shrunk(source.valid), held_out=_shrunk(source.test))
    target = ValidTarget(config).of(small, seed=seed)
    train, valid, test = (
        _enlarged(split, height, width) for split in (target.train, target.valid, target.test)
    )
    return replace(target, train=train, valid=valid, held_out=test)


def _plan(config: DataConfig) -> Plan:
    data: type[Data] = lookup(config.name, DATA, what="data").load()
    return data(config).plan()


def _find(data: type[Data], config: DataConfig) -> Found | None:
    """What the data hold; None where a run would download them first."""
    if not getattr(config, "download", False):
        return data(config).find(NullProgress())
    root = config.root  # type: ignore[attr-defined]
    if not root.is_dir():
        return None
    try:
        return data(config.model_copy(update={"download": False})).find(NullProgress())
    except InputError:
        return None


def _blank(found: Found, channels: int) -> Found:
    def rows(part: Rows) -> _Blank:
        return _Blank(part.labels, part.where, channels)

    return replace(
        found, train=rows(found.train), test=rows(found.test) if isinstance(found.test, Rows) else found.test
    )


def _enlarged(split: Split, height: int, width: int) -> Split:
    """The split with images (N, Ch, H, W), which take the memory of one pixel each."""
    return replace(split, images=split.images.expand(-1, -1, height, width))


def _shrunk(split: Split) -> Split:
    """The split with one pixel an image."""
    return replace(split, images=split.images[:, :, :1, :1])
