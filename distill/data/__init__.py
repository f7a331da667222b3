"""Where real data come from, one file a source.

`open_source(config, seed=..., progress=...)` reads the data; `plan(config)` tells what it can without reading
them."""

from __future__ import annotations

from dataclasses import replace

from distill.contracts import Progress, Source
from distill.data.base import Data, DataConfig, Plan
from distill.errors import InputError
from distill.registry import DATA, lookup

__all__ = ["Data", "DataConfig", "Plan", "config_class", "open_source", "plan", "with_target"]


def open_source(config: DataConfig, *, seed: int, progress: Progress) -> Source:
    """Read the data that a recipe's `data` names. Errors: see `Data.open`."""
    return _data(config).open(seed=seed, progress=progress)


def with_target(source: Source, target: Source) -> Source:
    """The source with the data that a selector wants to resemble.

    Raises:
        InputError: images of another shape: one network takes both.
    """
    if target.image_shape != source.image_shape:
        raise InputError(
            "the images of the target have another shape than the data's",
            where="target",
            found=f"{target.image_shape} (Ch, H, W)",
            allowed=str(source.image_shape),
            fix="give both the same resize and channels",
        )
    return replace(source, target=target)


def plan(config: DataConfig) -> Plan:
    """What a cheap look tells: classes, image shape, numbers of images; at most one image is decoded."""
    return _data(config).plan()


def config_class(name: str) -> type[DataConfig]:
    """The configuration of a data name; InputError for an unknown one."""
    cls: type[Data] = lookup(name, DATA, what="data").load()
    return cls.Config


def _data(config: DataConfig) -> Data:
    cls: type[Data] = lookup(config.name, DATA, what="data").load()
    return cls(config)
