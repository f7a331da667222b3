"""Documents of a file as they stand there, with all that belongs to them: for writing out those that were chosen."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import DamagedDataError
from distill.text.corpus import CorpusConfig, TextFile, whole_file
from distill.text.documents import document_of, texts_of
from distill.text.streams import lines_of, whole


@dataclass(frozen=True)
class Record:
    """A document.

    Args:
        row: of the file, from 0.
        text: of the document.
        line: of JSON, UTF-8 without an end: the line of the file where it is one, else an object with what it holds.
    """

    row: int
    text: str
    line: bytes


def read_records(file: TextFile, config: CorpusConfig, rows: NDArray[np.int64]) -> Iterator[Record]:
    """The documents of these rows, in order; the file is read once, up to the last of them.

    Args:
        file: of a corpus.
        config: how it is read.
        rows: int64 (n,), ascending.

    Raises:
        DamagedDataError: a row holds no document.
        InputError, DamagedDataError, UnsafeFileError, MemoryExhaustedError: as `read_blocks`.
    """
    file.refuse_change()
    if file.format == "parquet":
        yield from _of_parquet(file, config, rows)
        return
    if file.format == "text" and config.document == "file":
        blocks = iter([[whole(whole_file(file), longest=config.document_bytes)]])
    else:
        blocks = lines_of(whole_file(file), longest=config.document_bytes)
    first = 0
    for lines in blocks:
        start, stop = np.searchsorted(rows, [first, first + len(lines)])
        own = rows[start:stop].tolist()
        chosen = [lines[row - first] for row in own]
        for row, line, text in zip(own, chosen, texts_of(chosen, file, config), strict=True):
            if not isinstance(text, str):
                raise _no_document(file, row)
            yield Record(row, text, line if file.format == "jsonl" else _encoded({config.field: text}))
        first += len(lines)
        if not len(rows) or first > int(rows[-1]):
            file.refuse_change()
            return
    if len(rows):
        raise _no_document(file, int(rows[-1]))


def _of_parquet(file: TextFile, config: CorpusConfig, rows: NDArray[np.int64]) -> Iterator[Record]:
    from distill.text.parquet import read_records as read

    found = 0
    for row, record in read(whole_file(file), rows):
        text = record.get(config.field)
        if not isinstance(text, str) or document_of(text) is None:
            raise _no_document(file, row)
        found += 1
        yield Record(row, text, _encoded(record))
    if found < len(rows):
        raise _no_document(file, int(rows[found]))


def _encoded(record: dict[str, Any]) -> bytes:
    """A record as JSON that every reader takes."""
    return json.dumps(_plain(record), ensure_ascii=False, allow_nan=False, default=str).encode(
        "utf-8", "surrogatepass"
    )


def _plain(value: Any) -> Any:
    """What JSON knows: bytes become base64, NaN and infinities null; what is left, such as dates, becomes text."""
    if isinstance(value, bytes):
        return b64encode(value).decode("ascii")
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _no_document(file: TextFile, row: int) -> DamagedDataError:
    return DamagedDataError(
        "a document of the set is not there",
        where=f"{file.path}, row {row + 1}",
        fix="name the files that the set was chosen from",
    )
