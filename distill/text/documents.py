"""The documents of a piece, row by row: what is read, what is no document, and what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distill.errors import InputError
from distill.text.corpus import CorpusConfig, Piece, TextFile
from distill.text.streams import lines_of, whole

_FIELDS_TOLD = 10


@dataclass(frozen=True)
class Unreadable:
    """A row that holds no document where one was expected.

    Args:
        row: number in the piece, from 0.
        why: in words.
    """

    row: int
    why: str


@dataclass(frozen=True)
class Block:
    """Rows of a piece that follow each other.

    Args:
        first: number of the first in the piece, from 0.
        texts: one a row; None for a line or a text of nothing but blanks, and for what cannot be read.
        unreadable: which of them, and why.
    """

    first: int
    texts: list[str | None]
    unreadable: tuple[Unreadable, ...] = ()


def read_blocks(
    piece: Piece, config: CorpusConfig, *, wanted: NDArray[np.int64] | None = None
) -> Iterator[Block]:
    """All rows of a piece, in order, in blocks of about a megabyte, or four of parquet.

    Args:
        piece: which.
        config: how it is read.
        wanted: int64 (n,), ascending rows of the piece; the text of others may be None, and what comes behind the last
            is not read.

    Raises:
        InputError: the file has changed, or a document is too long; a package that reads the file is not installed.
        DamagedDataError: the file is broken.
        UnsafeFileError: a compressed file becomes too large.
        MemoryExhaustedError: a parquet file does not fit in memory.
    """
    for block in _every_block(piece, config, wanted):
        yield block
        if wanted is not None and (not len(wanted) or block.first + len(block.texts) > wanted[-1]):
            piece.file.refuse_change()
            return


def _every_block(piece: Piece, config: CorpusConfig, wanted: NDArray[np.int64] | None) -> Iterator[Block]:
    longest = config.document_bytes
    if piece.file.format == "parquet":
        from distill.text.parquet import read_rows

        return _numbered(map(_said, read_rows(piece, config.field, longest=longest)))
    if piece.file.format == "text" and config.document == "file":
        return _numbered(iter([texts_of([whole(piece, longest=longest)], piece.file, config)]))
    lines = lines_of(piece, longest=longest)
    if wanted is not None:
        lines = _only(lines, wanted)
    return _numbered(texts_of(block, piece.file, config) for block in lines)


def _only(blocks: Iterator[list[bytes]], wanted: NDArray[np.int64]) -> Iterator[list[bytes]]:
    """The blocks with empty lines in the place of those that are not wanted: nobody parses them."""
    first = 0
    for lines in blocks:
        start, stop = np.searchsorted(wanted, [first, first + len(lines)])
        kept = [b""] * len(lines)
        for place in (wanted[start:stop] - first).tolist():
            kept[place] = lines[place]
        yield kept
        first += len(lines)


# A row is its text, None where there is nothing, or the reason why it cannot be read.
Row = str | None | ValueError


def _numbered(blocks: Iterator[list[Row]]) -> Iterator[Block]:
    first = 0
    for rows in blocks:
        unreadable = tuple(
            Unreadable(first + place, str(row))
            for place, row in enumerate(rows)
            if isinstance(row, ValueError)
        )
        yield Block(first, [row if isinstance(row, str) else None for row in rows], unreadable)
        first += len(rows)


def texts_of(lines: list[bytes], file: TextFile, config: CorpusConfig) -> list[Row]:
    """What these lines of a file say: a text, None, or why nothing can be read."""
    if file.format == "text":
        return [_decoded(line) for line in lines]
    return _parsed(lines, config.field)


def document_of(text: str | None) -> str | None:
    """A text, or None where it says nothing: blanks are no document, in whatever format they stand."""
    return text if text and not text.isspace() else None


def _said(texts: list[str | None]) -> list[Row]:
    return [document_of(text) for text in texts]


def _decoded(line: bytes) -> Row:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return ValueError(f"is no UTF-8: {error.reason} at byte {error.start}")
    return document_of(text)


def _parsed(lines: list[bytes], field: str) -> list[Row]:
    """The field's text of each line of JSON."""
    loads = _parser()
    rows: list[Row] = []
    for line in lines:
        if not line or line.isspace():
            rows.append(None)
            continue
        try:
            value = loads(line)
        except ValueError:
            value = _strictly(line)
        rows.append(_text_of(value, field))
    return rows


def _strictly(line: bytes) -> Any:
    """What the standard library makes of a line that the fast parser refuses: halves of surrogate pairs, NaN."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"is no JSON: {error}")


def _text_of(value: Any, field: str) -> Row:
    if isinstance(value, ValueError):
        return value
    if not isinstance(value, dict):
        return ValueError(f"is no JSON object, but {type(value).__name__}")
    text = value.get(field)
    if isinstance(text, str):
        return document_of(text)
    if field in value:
        return ValueError(f"holds no text in {field!r}, but {type(text).__name__}")
    there = ", ".join(map(repr, list(value)[:_FIELDS_TOLD]))
    return ValueError(f"has no field {field!r}; it has {there or 'none'}")


def _parser() -> Any:
    try:
        from orjson import loads
    except ImportError as error:
        raise InputError(
            "lines of JSON need the package orjson", fix="pip install 'distill[text]'"
        ) from error
    return loads
