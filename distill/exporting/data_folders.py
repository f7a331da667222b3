"""The folders that the data and the target of a set are read from: an export into them would change the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from distill.contracts import DistilledSet
from distill.data.base import Data, DataConfig
from distill.errors import DamagedDataError, InputError
from distill.progress import NullProgress
from distill.registry import DATA, lookup
from distill.set_recipe import read_provenance, recipe_of_set
from distill.training.config import Strict


def refuse_among_data(
    out: Path, distilled: DistilledSet, path: Path, overrides: Sequence[str], *, without: Sequence[str]
) -> None:
    """Raise InputError where what is written to `out` may be read as data by the next run.

    Args:
        out: what is to be written, there or not; links on the way to it are followed.
        distilled: the set.
        path: of the set.
        overrides: `data.key=value` changes to the set's recipe.
        without: sections of the recipe that the set may leave incomplete.
    """
    place = out.resolve()
    for folder in _folders(distilled, path, overrides, without):
        where = _relation(place, folder.resolve())
        if where is not None:
            raise InputError(
                "the data of the set's recipe are read from there, and what is exported may be taken for some of them",
                where=str(out),
                found=f"{where} {folder}",
                fix="name a place outside of the data with --out",
            )


def _relation(place: Path, folder: Path) -> str | None:
    if place == folder:
        return "the folder"
    if folder in place.parents:
        return "a place in"
    return "a folder above" if place in folder.parents else None


def _folders(
    distilled: DistilledSet, path: Path, overrides: Sequence[str], without: Sequence[str]
) -> Iterator[Path]:
    """As far as the caller or a recipe beside the set says where they are.

    What cannot be followed is no error here: it is told where the data are asked for, and --pixels asks for none.
    """
    configs: tuple[Strict | None, ...] = ()
    with suppress(InputError, DamagedDataError):
        made = read_provenance(distilled, where=str(path))
        loaded, _ = recipe_of_set(path, made, overrides, progress=NullProgress(), without=without)
        configs = (loaded.recipe.data, loaded.recipe.target)
    for config in configs:
        if isinstance(config, DataConfig):
            source: type[Data] = lookup(config.name, DATA, what="data").load()
            with suppress(OSError):
                yield from source(config).folders()
