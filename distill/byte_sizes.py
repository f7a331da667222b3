"""Numbers of bytes as people write them: 500000, `500 MB`, `2 GiB`."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from distill.errors import InputError
from distill.recipe_problems import refuse

_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_PATTERN = r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*"
_ALLOWED = "a number of bytes >= 0, or a number and a unit: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"


def parse_bytes(text: str) -> int:
    """The number of bytes that `text` means.

    Raises:
        InputError: it is no such number.
    """
    match = re.fullmatch(_PATTERN, text)
    if match is None or match[2].lower() not in _UNITS:
        raise InputError("not a number of bytes", found=text, allowed=_ALLOWED)
    return round(float(match[1]) * _UNITS[match[2].lower()])


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value)
    except InputError as error:
        refuse(error, value)


ByteSize = Annotated[
    int,
    Field(ge=0),
    BeforeValidator(_read),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9.]+ ?[kMGT]?i?B$"}]}
    ),
]
"""A field of a configuration that holds a number of bytes."""
