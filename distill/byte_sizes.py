"""Numbers of bytes as people write them: 500000, `500 MB`, `2 GiB`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from distill.errors import InputError
from distill.recipe_problems import refuse

_PREFIXES = "kmgt"
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate(_PREFIXES, start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate(_PREFIXES, start=1)},
}
# Both cases are spelt out: patterns of JSON schemas have no flags.
_PATTERN = rf"\s*([0-9]+(?:\.[0-9]+)?)\s*((?:[{_PREFIXES}{_PREFIXES.upper()}][iI]?)?[bB])?\s*"
_FORM = "a number and a unit: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
_ALLOWED = f"a number of bytes >= 0, or {_FORM}"


def parse_bytes(text: str) -> int:
    """The number of bytes that `text` means.

    Raises:
        InputError: it is no such number.
    """
    match = re.fullmatch(_PATTERN, text)
    if match is None:
        raise InputError("not a number of bytes", found=text, allowed=_ALLOWED)
    return round(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _read(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_bytes(value)
    except InputError as error:
        refuse(error, value)


@dataclass(frozen=True)
class AsBytes:
    """Marks an int field of a configuration as a number of bytes: text is read, and the schema tells its form.

    Args:
        at_least: bytes.
    """

    at_least: int = 0

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_read, core_schema.int_schema(ge=self.at_least))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "integer", "minimum": self.at_least},
                {"type": "string", "pattern": f"^{_PATTERN}$", "description": _FORM},
            ]
        }


ByteSize = Annotated[int, AsBytes()]
"""A field of a configuration that holds a number of bytes."""
