"""Where real data come from, one file a source.

`open_source(config, seed=..., progress=...)` reads the data; `plan(config)` tells what it can without reading
them."""

from __future__ import annotations

from distill.contracts import Progress, Source
from distill.data.base import Data, DataConfig, Plan
from distill.registry import DATA, lookup

__all__ = ["Data", "DataConfig", "Plan", "config_class", "open_source", "plan"]


def open_source(config: DataConfig, *, seed: int, progress: Progress) -> Source:
    """Read the data that a recipe's `data` names. Errors: see `Data.open`."""
    return _data(config).open(seed=seed, progress=progress)


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
