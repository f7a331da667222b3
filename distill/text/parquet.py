"""Documents of parquet files, by row groups.

A dictionary page holds a value once that a million rows may repeat: its longest tells how many rows are read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import DamagedDataError, InputError, MemoryExhaustedError
from distill.text.corpus import Piece

_ROWS = 8192  # at once, at most ...
_BYTES = 4 << 20  # ... and of about so many bytes, in Arrow and in a block
_REPEATED = 64 << 20  # bytes of rows at once that may be repetitions of the longest value of a dictionary
_BUFFER = 1 << 20  # bytes of a column that are read at once, before they are expanded
_LARGEST_GROUP = 4 << 30  # bytes that a row group may become


def cut_row_groups(path: Path, piece_bytes: int) -> list[tuple[int, int]]:
    """Runs of row groups of about so many bytes: first, and one behind the last.

    Raises:
        DamagedDataError: no parquet file.
        InputError: a row group that is too large to be read.
    """
    with _errors_told(path), _opened(path) as file:
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


def read_rows(piece: Piece, field: str, *, longest: int) -> Iterator[list[str | None]]:
    """The field's text of every row of the piece's row groups, None where it is null, in lists of about 4 MB.

    Args:
        piece: which row groups.
        field: a column of strings, or of a dictionary of such.
        longest: bytes (UTF-8) that a text may have.

    Raises:
        InputError: no such column, or one that holds no text; a document that is too long; the file has changed.
        DamagedDataError: the file is broken.
        MemoryExhaustedError: Arrow has no memory for a batch.
    """
    piece.file.refuse_change()
    path = piece.file.path
    with _errors_told(path):
        with _opened(path) as file:
            _refuse_column(file, field, path)
        with _opened(path) as file, _opened(path, dictionaries=[field]) as probe:
            for number in range(piece.start, piece.stop):
                rows = _batch_rows(probe, number, [field])
                for batch in file.iter_batches(rows, [number], [field], use_threads=False):
                    yield from _blocks(batch.column(0), path, longest)
    piece.file.refuse_change()


def read_records(piece: Piece, wanted: NDArray[np.int64]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of the piece with all their columns, each with its number there; one is in memory, and a batch in Arrow.

    Args:
        piece: which row groups.
        wanted: int64 (n,), ascending.

    Raises: as `read_rows`.
    """
    piece.file.refuse_change()
    path = piece.file.path
    with _errors_told(path):
        with _opened(path) as file:
            strings = _columns_of_strings(file.schema_arrow)
        with _opened(path) as file, _opened(path, dictionaries=strings) as probe:
            groups = range(piece.start, piece.stop)
            bounds = np.cumsum([0, *(file.metadata.row_group(number).num_rows for number in groups)])
            for number, (first, stop) in zip(groups, pairwise(bounds.tolist()), strict=True):
                own = wanted[slice(*np.searchsorted(wanted, [first, stop]))]
                for row, record in _records_of(file, probe, number, own - first):
                    yield first + row, record
    piece.file.refuse_change()


def _records_of(
    file: Any, probe: Any, group: int, wanted: NDArray[np.int64]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """These rows of a row group; what comes behind the last is not read."""
    if not len(wanted):
        return
    first = 0
    for batch in file.iter_batches(_batch_rows(probe, group), [group], use_threads=False):
        for column in filter(_is_dictionary, batch.columns):
            _refuse_indices(column)
        for row in wanted[slice(*np.searchsorted(wanted, [first, first + batch.num_rows]))].tolist():
            (record,) = batch.slice(row - first, 1).to_pylist()
            yield row, record
        first += batch.num_rows
        if first > wanted[-1]:
            return


def _batch_rows(probe: Any, number: int, columns: list[str] | None = None) -> int:
    """How many rows of a row group are read at once: about `_BYTES` of them, and `_REPEATED` at worst.

    The bytes of a row are those of all columns, also where one is read: pyarrow 26 ends the process where the
    description of one column is damaged.

    Args:
        probe: the file, opened with dictionaries: its first row brings all values of a dictionary page. Read to its end
            such a file would gather the values of all pages.
        number: of the row group.
        columns: what will be read; None for all.
    """
    group = probe.metadata.row_group(number)
    rows = min(max(_BYTES * group.num_rows // max(group.total_byte_size, 1), 1), _ROWS)
    longest = 0
    for batch in probe.iter_batches(1, [number], columns, use_threads=False):
        dictionaries = [column.dictionary for column in batch.columns if _has_lengths(column)]
        longest = sum(int(_lengths(values).max(initial=0)) for values in dictionaries)
        break
    return int(max(min(rows, _REPEATED // max(longest, 1)), 1))


def _blocks(column: Any, path: Path, longest: int) -> Iterator[list[str | None]]:
    """A column's rows in lists of at most `_BYTES`, or of one row.

    Nothing is made of a row before its length is known: a small page can say a hundred megabytes a thousand times.

    Args:
        column: strings or a dictionary array of them; values and indices may be null.

    Raises:
        InputError: a row has more than `longest` bytes.
        ArrowIndexError: one has no value.
    """
    column = column if _is_dictionary(column) else column.dictionary_encode()
    _refuse_indices(column)
    absent = column.indices.is_null().to_numpy(zero_copy_only=False)
    places = column.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    lengths = np.append(_lengths(column.dictionary), 0)  # one more: without values, there is no place 0
    sizes = np.where(absent, 0, lengths[places])
    if sizes.max(initial=0) > longest:
        raise InputError(
            "a document is too long",
            where=str(path),
            found=f"{sizes.max()} bytes",
            allowed=f"at most {longest}",
            fix="raise document_bytes, or leave the file out",
        )
    for start, stop in _runs(np.cumsum(sizes)):
        yield _texts(column.dictionary, places[start:stop], absent[start:stop])


def _is_dictionary(column: Any) -> bool:
    from pyarrow import types

    return bool(types.is_dictionary(column.type))


def _has_lengths(column: Any) -> bool:
    return _is_dictionary(column) and any(is_kind(column.type.value_type) for is_kind in _kinds())


def _kinds() -> tuple[Any, ...]:
    from pyarrow import types

    return types.is_string, types.is_large_string, types.is_binary, types.is_large_binary


def _refuse_indices(column: Any) -> None:
    """Arrow hands out what stands in the page, also where its dictionary has no such value."""
    from pyarrow import ArrowIndexError
    from pyarrow.compute import min_max

    bounds = min_max(column.indices).as_py()
    if bounds["max"] is not None and not 0 <= bounds["min"] <= bounds["max"] < len(column.dictionary):
        raise ArrowIndexError(f"value {bounds['max']} of a dictionary of {len(column.dictionary)}")


def _lengths(values: Any) -> NDArray[np.int64]:
    """Bytes of each value; 0 of null."""
    from pyarrow.compute import binary_length

    lengths: NDArray[np.int64] = binary_length(values).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def _runs(ends: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Rows, first and one behind the last, that have at most `_BYTES` together or are one; `ends` is cumulative."""
    start, before = 0, 0
    while start < len(ends):
        stop = max(int(np.searchsorted(ends, before + _BYTES, side="right")), start + 1)
        yield start, stop
        start, before = stop, int(ends[stop - 1])


def _texts(values: Any, places: NDArray[np.int64], absent: NDArray[np.bool_]) -> list[str | None]:
    """The values at these places of a dictionary, each made once."""
    used, inverse = np.unique(places[~absent], return_inverse=True)
    made = values.take(_array(used)).to_pylist()
    rows: list[str | None] = [None] * len(places)
    for row, number in zip(np.flatnonzero(~absent).tolist(), inverse.tolist(), strict=True):
        rows[row] = made[number]
    return rows


def _array(numbers: NDArray[np.int64]) -> Any:
    from pyarrow import array

    return array(numbers)


def _columns_of_strings(schema: Any) -> list[str]:
    """The columns, not parts of nested ones, of which a dictionary can be made."""
    return [column.name for column in schema if any(is_kind(column.type) for is_kind in _kinds())]


def _refuse_column(file: Any, field: str, path: Path) -> None:
    names = file.schema_arrow.names
    kind = file.schema_arrow.field(field).type if field in names else None
    if kind is None or not _is_text(kind):
        raise InputError(
            "no such column of text",
            where=str(path),
            found=field if kind is None else f"{field}: {kind}",
            allowed=", ".join(names),
            fix="name the column with field",
        )


def _is_text(kind: Any) -> bool:
    """Strings, or a dictionary of them, as pandas writes categories."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _opened(path: Path, *, dictionaries: Sequence[str] = ()) -> Any:
    """The file; of these columns, Arrow makes dictionaries."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            "parquet files need the package pyarrow", fix="pip install 'distill[text]'"
        ) from error
    return ParquetFile(path, read_dictionary=list(dictionaries), buffer_size=_BUFFER)


@contextmanager
def _errors_told(path: Path) -> Iterator[None]:
    """What Arrow raises, as errors for the user; its types have no base of their own that all share."""
    try:
        yield
    except MemoryError as error:
        raise MemoryExhaustedError(
            "a parquet file does not fit in memory",
            where=str(path),
            found=str(error) or None,
            fix="write it with smaller row groups, or set DISTILL_WORKERS to fewer processes",
        ) from error
    except Exception as error:
        if not _is_damage(error):
            raise
        raise DamagedDataError(
            "a parquet file is damaged",
            where=str(path),
            found=str(error),
            fix="fetch it anew, or leave it out",
        ) from error


def _is_damage(error: Exception) -> bool:
    """Arrow is there: what it is not raises InputError, which is no damage."""
    if isinstance(error, InputError):
        return False
    from pyarrow import ArrowException

    return isinstance(error, OSError | UnicodeDecodeError | ArrowException)
