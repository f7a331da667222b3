"""`key.sub=value` arguments: what they set in a recipe, and which part of the recipe came from which."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from distill.errors import InputError
from distill.recipe_problems import Problem
from distill.registry import nearest
from distill.yaml_lines import KeyPath, Mark, flow, parse, parse_scalar, quoted


@dataclass
class Draft:
    """A recipe on its way: plain data, and where each part of it was written.

    Args:
        value: the recipe as plain data.
        origins: the place in the file, or the argument, that wrote a key path; parts not listed belong to the
            longest listed path above them.
        resets: key paths set to null by an argument, and the argument.
        problems: with the place of each, in the order found.
    """

    value: Any
    origins: dict[KeyPath, Mark | str] = field(default_factory=dict)
    resets: list[tuple[KeyPath, str]] = field(default_factory=list)
    problems: list[tuple[Mark | str, Problem]] = field(default_factory=list)

    def origin(self, path: KeyPath) -> Mark | str:
        """Where `path`, or what holds it, was written."""
        while path and path not in self.origins:
            path = path[:-1]
        return self.origins.get(path, Mark(1, 1))

    def claim(self, path: KeyPath, argument: str) -> None:
        """Everything at and below `path` now comes from `argument`."""
        self.origins = {known: o for known, o in self.origins.items() if known[: len(path)] != path}
        self.origins[path] = argument


class _OverrideError(Exception):
    """One argument that cannot be applied."""

    def __init__(self, path: KeyPath, what: str, *, found: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.problem = Problem(path, what, found=found, fix=fix)


def apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    """Set what the arguments say, later ones over earlier; those that cannot be applied become problems."""
    draft.value = deepcopy(draft.value)
    for argument in overrides:
        try:
            path, value = _read(argument, draft.value)
            _set(draft, path, value, argument)
        except _OverrideError as error:
            draft.problems.append((argument, error.problem))


def _read(argument: str, recipe: Any) -> tuple[KeyPath, Any]:
    key, equals, text = argument.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise _OverrideError((), "not of the form key=value", fix="write for example train.epochs=100")
    if not isinstance(recipe, dict):
        raise _OverrideError((), "the recipe has no keys to override")
    return _settle(recipe, parts), _value(text)


def _value(text: str) -> Any:
    """Text that begins like a list, mapping or quotation is YAML; any other is one scalar as it stands."""
    try:
        if not text.startswith(("[", "{", '"', "'")):
            return parse_scalar(text)
        document = parse(text, source="value")
    except (InputError, ValueError) as error:
        what = error.what if isinstance(error, InputError) else str(error)
        raise _OverrideError((), what, found=quoted(text[:60])) from error
    for _, _, problem in document.problems:
        raise _OverrideError((), problem.what, found=problem.found)
    return document.value


def _settle(recipe: dict[str, Any], parts: Sequence[str]) -> KeyPath:
    """The key path that the parts mean: numbers in lists, and through the method of a step."""
    path: KeyPath = ()
    here: Any = recipe
    for number, part in enumerate(parts):
        if (
            len(path) == 2
            and path[0] == "steps"
            and isinstance(here, dict)
            and len(here) == 1
            and part not in here
        ):
            method = next(iter(here))
            path, here = (*path, method), here[method]
        last = number == len(parts) - 1
        if isinstance(here, list):
            index = _index(here, part, path, last=last)
            path, here = (*path, index), here[index] if index < len(here) else None
        elif isinstance(here, dict) or here is None:
            if part.isdecimal():
                raise _OverrideError(path, "has no items in this recipe", fix=_list_meant(recipe, path))
            path, here = (*path, part), (here or {}).get(part)
        else:
            raise _OverrideError(path, "has no keys below it", found=flow(here))
    return path


def _list_meant(recipe: dict[str, Any], path: KeyPath) -> str:
    """What to do about a number below `path`, where no list is: perhaps what stands beside it was meant."""
    if not path:
        return "begin with a key of the recipe: steps.0.ipc=10"
    here: Any = recipe
    for part in path:
        if isinstance(here, dict) and part not in here:
            close = nearest(str(part), [key for key, value in here.items() if isinstance(value, dict | list)])
            if close:
                return f"did you mean {close!r}?"
        here = None if here is None else here.get(part) if isinstance(here, dict) else here[part]
    return f"give the whole list: {'.'.join(map(str, path))}=[...]"


def _index(items: list[Any], part: str, path: KeyPath, *, last: bool) -> int:
    """The item's number; one past the end appends."""
    if part.isdecimal() and int(part[:9]) < len(items) + last:
        return int(part)
    raise _OverrideError(
        path,
        "no such item",
        found=quoted(part),
        fix=f"items are numbered 0 to {len(items) - 1}" if items else None,
    )


def _set(draft: Draft, path: KeyPath, value: Any, argument: str) -> None:
    holder, key = _holder(draft, path[:-1], argument), path[-1]
    if isinstance(holder, list):
        if value is None:
            raise _OverrideError(path, "an item of a list has no default to go back to")
        assert isinstance(key, int)
        holder[key : key + 1] = [value]
    elif value is None and not (len(path) == 3 and path[0] == "steps"):
        draft.resets.append((path, argument))
        holder.pop(key, None)
    else:
        holder[key] = value
    draft.claim(path, argument)


def _holder(draft: Draft, path: KeyPath, argument: str) -> Any:
    """The list or mapping at `path`; mappings that the recipe lacks are made."""
    here = draft.value
    for depth, part in enumerate(path, start=1):
        if (here.get(part) if isinstance(here, dict) else here[part]) is None:
            here[part] = {}
            draft.claim(path[:depth], argument)
        here = here[part]
    return here
