"""Marks the fields of configurations that hold paths of one machine, so that no set carries one away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class MachinePath:
    """Stands in the `Annotated` of a field, or of its items, that is a path or a pattern of paths.

    Args:
        sha256: name of the field beside it that says what the file holds. A recipe without paths keeps that instead,
            for a result that depends on the file's content.
    """

    sha256: str | None = None


def path_mark(field: FieldInfo) -> MachinePath | None:
    """The mark of a field of a configuration, or of what it may hold; None for a field that holds no paths."""
    own = (mark for mark in field.metadata if isinstance(mark, MachinePath))
    return next(own, None) or next(_marks(field.annotation), None)


def _marks(annotation: Any) -> Iterator[MachinePath]:
    for part in get_args(annotation):
        if isinstance(part, MachinePath):
            yield part
        else:
            yield from _marks(part)
