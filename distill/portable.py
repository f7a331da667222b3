"""A recipe without what belongs to one machine: what of it goes into a set."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.machine_paths import MachinePath, path_mark
from distill.recipe import Recipe, Step, as_dict
from distill.recipe_problems import key_path
from distill.training.config import Strict
from distill.yaml_lines import KeyPath


@dataclass(frozen=True)
class PathPlace:
    """A key of a recipe that may hold paths.

    Args:
        path: where it stands in the recipe as plain data.
        value: one path, a list of them, a mapping of names to either, or None.
        mark: of its field.
        sha256: what the recipe says of the file's content, None where it says nothing.
    """

    path: KeyPath
    value: Any
    mark: MachinePath
    sha256: str | None


def path_places(recipe: Recipe) -> Iterator[PathPlace]:
    """Every key of the recipe that may hold paths, set or not."""
    return _below(recipe, ())


def _below(value: Any, path: KeyPath) -> Iterator[PathPlace]:
    if isinstance(value, Step):  # written `method: options`
        yield from _below(value.config, (*path, value.method))
    elif isinstance(value, Strict):
        for name, field in type(value).model_fields.items():
            held, mark = getattr(value, name), path_mark(field)
            if mark is None:
                yield from _below(held, (*path, name))
            elif held is None or isinstance(
                held, str | list | tuple | dict
            ):  # a number in its place is no path
                told = None if mark.sha256 is None else getattr(value, mark.sha256)
                yield PathPlace((*path, name), held, mark, told)
    elif isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _below(item, (*path, key))


def without_paths(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data, without paths, cache and engine: equal wherever the files lay and the work was done.

    Where a result depends on the content of a file, its sha256 stands for its path.

    Raises:
        InputError: such a file cannot be read.
    """
    plain = as_dict(recipe)
    del plain["cache"], plain["engine"]
    for place in path_places(recipe):
        if place.path[0] == "cache":
            continue
        holder = at(plain, place.path[:-1])
        del holder[place.path[-1]]
        if place.mark.sha256 is not None and place.value is not None and place.sha256 is None:
            holder[place.mark.sha256] = _sha256(Path(place.value), where=key_path(place.path))
    return plain


def plain_without_paths(config: Strict) -> dict[str, Any]:
    """A configuration as plain data, without paths; the sha256 of a file stands for its path, as in a recipe."""
    plain = config.model_dump(mode="json")
    for place in _below(config, ()):
        holder = at(plain, place.path[:-1])
        del holder[place.path[-1]]
        if place.mark.sha256 is not None and place.value is not None and place.sha256 is None:
            holder[place.mark.sha256] = _sha256(Path(place.value), where=key_path(place.path))
    return plain


def at(plain: Any, path: KeyPath) -> Any:
    """What stands at a key path of plain data."""
    for part in path:
        plain = plain[part]
    return plain


def refuse_absent_files(recipe: Recipe, *, sections: Container[str] = tuple(Recipe.model_fields)) -> None:
    """Raise InputError where a recipe says what a file holds and not where it is, as one taken from a set does."""
    for place in path_places(recipe):
        if place.path[0] in sections and place.value is None and place.sha256 is not None:
            where = key_path(place.path)
            raise InputError(
                "the file is not named",
                where=where,
                found=f"sha256 {place.sha256}",
                fix=f"name the file of this sha256: {where}=FILE",
            )


def _sha256(path: Path, *, where: str) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            "the file cannot be read", where=where, found=f"{path}: {error.strerror}", fix="correct the path"
        ) from error
