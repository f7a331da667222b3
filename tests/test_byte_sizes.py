"""Numbers of bytes as people write them."""

from __future__ import annotations

import re
from typing import Annotated, Any

import pytest
from pydantic import ValidationError

from distill.byte_sizes import AsBytes, ByteSize, parse_bytes
from distill.errors import InputError
from distill.training.config import Strict


class Holder(Strict):
    size: ByteSize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("0", 0), ("12", 12), ("12B", 12), ("1 kB", 1000), ("1.5 MB", 1_500_000), ("2gb", 2 * 10**9)],
        *[("1 KiB", 1024), ("64MiB", 64 << 20), ("0.5 GiB", 1 << 29), (" 1 TB ", 10**12), ("2TiB", 2 << 40)],
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected
    assert Holder(size=text).size == expected  # type: ignore[arg-type]
    assert Holder(size=expected).size == expected


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e3", "5 GX", "1 2", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="not a number of bytes"):
        parse_bytes(text)
    with pytest.raises(ValidationError):
        Holder(size=text)  # type: ignore[arg-type]


def test_the_schema_accepts_what_is_read() -> None:
    (pattern,) = [each["pattern"] for each in _schema()["size"]["anyOf"] if "pattern" in each]
    units = ["", *(a + b for a in ("k", "K", "m", "g", "T", "") for b in ("B", "b", "iB", "ib", "i"))]
    numbers = ["5", "500000", "1.5", "1.2.3", ".5", "5.", "-1", "", "1e3", "nan", "\u0663"]
    texts = [number + space + unit for number in numbers for space in ("", " ", "  ") for unit in units]
    taken = [text for text in texts if _is_read(text)]
    assert taken == [text for text in texts if re.search(pattern, text)]
    assert (
        {"5gB", "500000", "5  kB", "1.5 KiB"} <= set(taken)
        and "5 iB" not in taken
        and "1.2.3 kB" not in taken
    )


def _schema() -> dict[str, Any]:
    return AtLeast.model_json_schema()["properties"] | Holder.model_json_schema()["properties"]


def _is_read(text: str) -> bool:
    try:
        parse_bytes(text)
    except InputError:
        return False
    return True


class AtLeast(Strict):
    work: Annotated[int, AsBytes(at_least=1 << 20)] = 1 << 30


@pytest.mark.parametrize("value", [0, "1 kB", (1 << 20) - 1])
def test_a_least_size_is_kept_and_told(value: Any) -> None:
    assert AtLeast(work="1 MiB").work == 1 << 20  # type: ignore[arg-type]
    assert AtLeast().work == 1 << 30
    with pytest.raises(ValidationError, match="1048576"):
        AtLeast(work=value)
    assert _schema()["work"]["anyOf"][0] == {"type": "integer", "minimum": 1 << 20}


@pytest.mark.parametrize("value", [-1, 1.5, None, True])
def test_other_values(value: object) -> None:
    with pytest.raises(ValidationError):
        Holder(size=value)  # type: ignore[arg-type]
