"""Where real data come from, one file a source.

`open_source(config, seed=..., progress=...)` reads the data; `plan(config)` tells what it can without reading
them."""

from __future__ import annotations

from dataclasses import replace

from distill.contracts import Progress, Source
from distill.data.base import Data, DataConfig, Plan
from distill.data.valid import ValidConfig, ValidTarget
from distill.errors import DistillError, InputError
from distill.registry import DATA, lookup
from distill.training.config import Strict

__all__ = ["Data", "DataConfig", "Plan", "config_class", "open_source", "open_target", "plan", "with_target"]


def open_source(config: DataConfig, *, seed: int, progress: Progress) -> Source:
    """Read the data that a recipe's `data` names. Errors: see `Data.open`."""
    return _data(config).open(seed=seed, progress=progress)


def open_target(config: Strict, source: Source, *, seed: int, progress: Progress) -> Source:
    """The data that a recipe's `target` names, beside the source. Errors: see `Data.open`."""
    if isinstance(config, ValidConfig):
        return ValidTarget(config).of(source, seed=seed)
    assert isinstance(config, DataConfig), "a name in distill.registry.TARGETS"
    try:
        return open_source(config, seed=seed, progress=progress)
    except DistillError as error:
        if error.where is not None and error.where.startswith(
            "data."
        ):  # sources know themselves by that name
            error.where = f"target.{error.where.removeprefix('data.')}"
        raise


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
