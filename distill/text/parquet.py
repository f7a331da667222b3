"""Documents of parquet files, by row groups."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import DamagedDataError, InputError
from distill.text.corpus import Piece

_ROWS = 1024  # at once
_LARGEST_GROUP = 4 << 30  # bytes that a row group may become


def cut_row_groups(path: Path, piece_bytes: int) -> list[tuple[int, int]]:
    """Runs of row groups of about so many bytes: first, and one behind the last.

    Raises:
        DamagedDataError: no parquet file.
        InputError: a row group that is too large to be read.
    """
    with _opened(path) as file:
        sizes = [file.metadata.row_group(number).total_byte_size for number in range(file.num_row_groups)]
    if sizes and max(sizes) > _LARGEST_GROUP:
        raise InputError(
            "a row group is too large to be read",
            where=str(path),
            found=f"{max(sizes)} bytes",
            allowed=f"at most {_LARGEST_GROUP}",
            fix="write the file with smaller row groups",
        )
    cuts, start, total = [], 0, 0
    for number, size in enumerate(sizes):
        total += size
        if total >= piece_bytes or number + 1 == len(sizes):
            cuts.append((start, number + 1))
            start, total = number + 1, 0
    return cuts


def read_rows(piece: Piece, field: str, *, longest: int) -> Iterator[list[str | ValueError | None]]:
    """The field's text of every row of the piece's row groups; None where it is null or empty.

    Raises:
        InputError: no such column, or one that holds no text; a document that is too long; the file has changed.
        DamagedDataError: the file is broken.
    """
    piece.file.refuse_change()
    path = piece.file.path
    with _opened(path) as file:
        _refuse_column(file, field, path)
        groups = list(range(piece.start, piece.stop))
        try:
            for batch in file.iter_batches(batch_size=_ROWS, row_groups=groups, columns=[field]):
                rows = batch.column(0).to_pylist()
                if any(row is not None and len(row) > longest for row in rows):
                    raise InputError(
                        "a document is too long",
                        where=str(path),
                        allowed=f"at most {longest} bytes",
                        fix="raise document_bytes, or leave the file out",
                    )
                yield [row or None for row in rows]
        except (OSError, UnicodeDecodeError) as error:
            raise _broken(path, error) from error
    piece.file.refuse_change()


def read_records(piece: Piece, wanted: NDArray[np.int64]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of the piece with all their columns, each with its number there.

    Args:
        piece: which row groups.
        wanted: int64 (n,), ascending.

    Raises: as `read_rows`.
    """
    piece.file.refuse_change()
    path = piece.file.path
    with _opened(path) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(piece.start, piece.stop)]
        bounds = np.cumsum([0, *sizes])
        try:
            for number, (first, stop) in enumerate(pairwise(bounds.tolist())):
                own = wanted[slice(*np.searchsorted(wanted, [first, stop]))] - first
                if len(own):
                    group = file.read_row_group(piece.start + number)
                    for start in range(0, len(own), _ROWS):
                        part = own[start : start + _ROWS]
                        yield from zip((part + first).tolist(), group.take(part).to_pylist(), strict=True)
        except (OSError, UnicodeDecodeError) as error:
            raise _broken(path, error) from error
    piece.file.refuse_change()


def _refuse_column(file: Any, field: str, path: Path) -> None:
    import pyarrow

    names = file.schema_arrow.names
    kind = file.schema_arrow.field(field).type if field in names else None
    if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise InputError(
            "no such column of text",
            where=str(path),
            found=field if kind is None else f"{field}: {kind}",
            allowed=", ".join(names),
            fix="name the column with field",
        )


def _opened(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            "parquet files need the package pyarrow", fix="pip install 'distill[text]'"
        ) from error
    try:
        return ParquetFile(path)
    except (OSError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> DamagedDataError:
    return DamagedDataError(
        "a parquet file is damaged", where=str(path), found=str(error), fix="fetch it anew, or leave it out"
    )
