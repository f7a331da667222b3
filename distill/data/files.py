"""Reading files that may be gzipped, truncated or hostile."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from distill.errors import DamagedDataError, InputError, UnsafeFileError

_GZIP_MAGIC = b"\x1f\x8b"
# A file below this size once unpacked cannot exhaust a machine, whatever it claims.
_HARMLESS_BYTES = 2**30
_MAX_RATIO = 200
# What gzip, zipfile, numpy and h5py raise on broken bytes; none of our own errors is among them.
_BROKEN = (OSError, EOFError, ValueError, RuntimeError, zlib.error, zipfile.BadZipFile)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where they are gzipped (told by content, not by name)."""
    try:
        with path.open("rb") as probe:
            gzipped = probe.read(2) == _GZIP_MAGIC
    except OSError as error:
        raise InputError("the file cannot be read", where=str(path), found=error.strerror) from error
    if gzipped:
        with gzip.open(path, "rb") as stream:
            yield cast(BinaryIO, stream)
    else:
        with path.open("rb") as plain:
            yield plain


@contextmanager
def damage_named(path: Path, *, what: str = "the file is truncated or damaged") -> Iterator[None]:
    """Turn what readers raise on broken bytes into a DamagedDataError that names the file."""
    try:
        yield
    except _BROKEN as error:
        raise DamagedDataError(what, where=str(path), found=str(error) or type(error).__name__) from error


def refuse_disproportion(declared: int, stored: int, *, where: str) -> None:
    """Raise UnsafeFileError where few bytes claim to be very many: nobody's images compress 200 to 1.

    Args:
        declared: bytes that the data would take in memory.
        stored: bytes that they take in the file.
    """
    if declared > _HARMLESS_BYTES and declared > _MAX_RATIO * stored:
        raise UnsafeFileError(
            "the data claim to be far larger than the file that holds them",
            where=where,
            found=f"{declared} bytes from {stored}",
            allowed=f"at most {_MAX_RATIO} times the stored size above {_HARMLESS_BYTES} bytes",
        )
