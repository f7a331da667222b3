"""Glob patterns of names in a network, such as `body.*`.

A pattern fits a name where it fits it as a whole or that of a module that holds it: `body.conv1` fits
`body.conv1.weight`.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from distill.errors import InputError
from distill.registry import nearest


def as_patterns(layers: Sequence[str]) -> tuple[str, ...]:
    """Patterns of names as a tuple, which can be a key.

    Raises:
        InputError: one text, whose letters would be taken for patterns, or other things than texts.
    """
    if isinstance(layers, list | tuple) and all(isinstance(each, str) for each in layers):
        return tuple(layers)
    raise InputError(
        "layers are patterns of names",
        where="layers",
        found=repr(layers),
        allowed='a list or tuple of texts, such as ("body.*",)',
        fix=f"write ({layers!r},)" if isinstance(layers, str) else None,
    )


def matching(
    names: Sequence[str], patterns: Sequence[str], *, refused: Callable[[str, Sequence[str]], InputError]
) -> list[str]:
    """The names that patterns select, in their own order.

    Args:
        names: in the network's order.
        patterns: globs.
        refused: (pattern, names) -> the error for a pattern that fits none of them.
    """
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = [
            name for name in names if any(fnmatch.fnmatchcase(each, pattern) for each in _holders(name))
        ]
        if not fitting:
            raise refused(pattern, names)
        chosen.update(fitting)
    return [name for name in names if name in chosen]


def nearest_pattern(pattern: str, names: Sequence[str]) -> str | None:
    """The name, or that of a module that holds one, which somebody may have meant."""
    return nearest(pattern, list(dict.fromkeys(each for name in names for each in _holders(name))))


def _holders(name: str) -> list[str]:
    """A name and those of the modules that hold it: a.b.weight, a.b, a."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
