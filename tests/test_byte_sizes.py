"""Numbers of bytes as people write them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from distill.byte_sizes import ByteSize, parse_bytes
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


@pytest.mark.parametrize("value", [-1, 1.5, None, True])
def test_other_values(value: object) -> None:
    with pytest.raises(ValidationError):
        Holder(size=value)  # type: ignore[arg-type]
