"""The recipe by which a set is evaluated: its own, with what the caller wants else.

A set may come from a stranger. What its provenance says is checked, and paths in it are not followed: where data and
weights lie is said by the caller, or by a recipe.yaml beside the set that is the set's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distill.contracts import DistilledSet, DocumentSet, Progress
from distill.errors import DamagedDataError, InputError, RecipeErrors
from distill.portable import at, path_places, without_paths
from distill.recipe import LoadedRecipe, load_recipe, read_recipe
from distill.recipe_problems import MISSING, key_path
from distill.training.config import TrainConfig
from distill.yaml_lines import MAX_DEPTH

_NOT_READ = ("steps", "cache")


@dataclass(frozen=True)
class Made:
    """What a set says of how it was made.

    Args:
        recipe: as plain data, None where it says nothing.
        train_fingerprint: of the training data, None likewise.
        train_images: how many the recipe left of the data, None likewise.
        notes: of the source.
    """

    recipe: dict[str, Any] | None
    train_fingerprint: str | None
    train_images: int | None = None
    notes: tuple[str, ...] = ()


def read_provenance(distilled: DistilledSet | DocumentSet, *, where: str) -> Made:
    """The part of a set's provenance that is read; DamagedDataError where it has another form.

    Args:
        distilled: the set.
        where: its path, for messages.
    """
    recipe = distilled.provenance.get("recipe")
    source = distilled.provenance.get("source", {})
    told = source if isinstance(source, dict) else {}
    fingerprint, images, notes = (told.get(key) for key in ("train_fingerprint", "train_images", "notes"))
    for name, value, kind, allowed in (
        ("recipe", recipe, dict, "a mapping"),
        ("source", source, dict, "a mapping"),
        ("source.train_fingerprint", fingerprint, str, "text"),
        ("source.train_images", images, int, "a whole number"),
        ("source.notes", notes, list, "a list"),
    ):
        if value is not None and not isinstance(value, kind):
            raise _damaged(name, where, found=type(value).__name__, allowed=allowed)
    if _deeper(recipe, MAX_DEPTH):
        raise _damaged("recipe", where, found="a recipe nested without end", allowed=f"{MAX_DEPTH} levels")
    return Made(recipe, fingerprint, images, tuple(note for note in notes or () if isinstance(note, str)))


def _damaged(name: str, where: str, *, found: str, allowed: str) -> DamagedDataError:
    return DamagedDataError(
        "the provenance does not hold what belongs there",
        where=f"{where}, provenance: {name}",
        found=found,
        allowed=allowed,
    )


def _deeper(value: Any, limit: int) -> bool:
    """Whether lists and mappings are nested deeper than `limit`; told without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(value, dict | list) for value in level)


def recipe_of_set(
    path: Path, made: Made, overrides: Sequence[str], *, progress: Progress, without: Sequence[str] = ()
) -> tuple[LoadedRecipe, LoadedRecipe]:
    """The recipe of a set with the caller's overrides, and the same without those of `train`.

    recipe.yaml beside the set is preferred where it is the set's own: it still knows the folders of the data, which
    the set leaves out.

    Args:
        path: of the set.
        made: what the set says.
        overrides: `key=value` arguments.
        progress: is told of files and paths that are not used.
        without: sections that the caller does not read; what the set says there may be incomplete.

    Raises:
        InputError: the set does not name its recipe, or a mistake in it or in the overrides.
    """
    if made.recipe is None:
        raise InputError("the set does not say which recipe made it", where=str(path))
    _refuse_unread(overrides)
    elsewhere = [argument for argument in overrides if _section(argument) != "train"]
    beside = path.parent / "recipe.yaml"
    if beside.exists():
        if _is_own(beside, made.recipe):
            return load_recipe(str(beside), overrides), load_recipe(str(beside), elsewhere)
        progress.note(f"{beside} is not the set's own recipe, and is not used")
    read = {key: value for key, value in made.recipe.items() if key not in without}
    with _missing_by_arguments():
        told = _unfollowed(read, overrides, path, progress)
        return read_recipe(told, overrides, source=str(path)), read_recipe(told, elsewhere, source=str(path))


@contextmanager
def _missing_by_arguments() -> Iterator[None]:
    """What a recipe in a set lacks can be given by arguments alone: nobody adds a line to a set."""
    try:
        yield
    except RecipeErrors as errors:
        for problem in errors.problems:
            key = (problem.where or "").rpartition(": ")[2]
            if problem.what == MISSING and _section(key) not in _NOT_READ:
                value = key.rpartition(".")[2].upper()
                problem.fix = f"give {key}={value} on the command line; a set does not keep where files lie"
        raise


def _section(argument: str) -> str:
    return argument.partition("=")[0].split(".")[0]


def _refuse_unread(overrides: Sequence[str]) -> None:
    """Steps are over and done with: an argument about them would change what the report says, and nothing else."""
    for argument in overrides:
        if _section(argument) in _NOT_READ:
            raise InputError(
                "an evaluation does not read this part of the recipe",
                where=argument,
                allowed="seed, precision, data, train and evaluate",
                fix="name another cache in the environment variable DISTILL_CACHE; for the rest, make another set with "
                "distill run",
            )


def _is_own(beside: Path, embedded: Mapping[str, Any]) -> bool:
    try:
        return without_paths(load_recipe(str(beside)).recipe) == embedded
    except InputError:
        return False  # something else of that name


def _unfollowed(
    recipe: dict[str, Any], overrides: Sequence[str], path: Path, progress: Progress
) -> dict[str, Any]:
    """The recipe in a set without its cache and the paths in it; those that an argument names are the caller's."""
    told = deepcopy({key: value for key, value in recipe.items() if key != "cache"})
    loaded = read_recipe(told, overrides, source=str(path))
    for place in path_places(loaded.recipe):
        if place.value is not None and place.path[0] != "cache" and not loaded.by_argument(*place.path):
            del at(told, place.path[:-1])[place.path[-1]]
            progress.note(f"the path in the set's recipe is not followed: {key_path(place.path)}")
    return told


def overridden_train(train: TrainConfig, changed: LoadedRecipe, plain: LoadedRecipe) -> TrainConfig:
    """The training that a set is meant for, with what the caller wants else.

    Only what was named changes: a method may have set the rest, such as the temperature of the labels.

    Args:
        train: the set's.
        changed, plain: its recipe with the overrides, and without those of `train`.
    """
    wanted, before = changed.recipe.train, plain.recipe.train
    named = [
        name
        for name in TrainConfig.model_fields
        if changed.by_argument("train", name) or getattr(wanted, name) != getattr(before, name)
    ]
    try:
        return TrainConfig.model_validate(
            train.model_dump() | {name: getattr(wanted, name) for name in named}
        )
    except ValidationError as error:
        raise InputError(
            "the change does not fit the training that the set is meant for",
            where="train",
            found=error.errors()[0]["msg"],
            fix="name the options that belong together, see `distill inspect` for the set's own",
        ) from error
