"""The bytes of a piece as whole lines, whatever they are compressed by, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distill.errors import DamagedDataError, InputError, UnsafeFileError
from distill.text.corpus import Piece, TextFile

_READ = 1 << 20  # bytes at once, read and expanded
_READ_ZSTD = 1 << 12
_LARGEST_WINDOW = 1 << 27  # what zstd may need to look back, in bytes
_EXPANSION = 1000  # times its size that a compressed file may become ...
_EXPANSION_FROM = 1 << 30  # ... from so many bytes on
_ROWS_FROM = 1 << 20  # rows that every compressed file may have; beyond it may have one a byte
_MARK = b"\xef\xbb\xbf"  # of the order of bytes, which some write before UTF-8


def lines_of(piece: Piece, *, longest: int) -> Iterator[list[bytes]]:
    """The lines that begin in the piece, without their ends, in lists of about a megabyte.

    Args:
        piece: of a file of lines.
        longest: bytes that a line may have.

    Raises:
        InputError: a longer line, or the file has changed.
        DamagedDataError: the compressed file is broken.
        UnsafeFileError: it becomes more than a thousand times as large as it is, or has more rows than bytes.
    """
    piece.file.refuse_change()
    held: list[bytes] = []  # of a line whose end is not there yet
    length = row = 0
    for number, chunk in enumerate(_chunks(piece)):
        if number == 0 and piece.start == 0:
            chunk = chunk.removeprefix(_MARK)
        lines = chunk.split(b"\n")
        if length + len(lines[0]) > longest or any(len(line) > longest for line in lines):
            raise _too_long(piece, [length + len(lines[0]), *map(len, lines[1:])], row, longest)
        rest = lines.pop()
        if lines:
            # A long line comes in many chunks: joined once, at its end.
            lines[0] = b"".join([*held, lines[0]])
            held, length = [], 0
            row += len(lines)
            _refuse_rows(piece.file, row)
            yield [line.removesuffix(b"\r") for line in lines]
        held.append(rest)
        length += len(rest)
    if length:
        yield [b"".join(held).removesuffix(b"\r")]
    piece.file.refuse_change()


def whole(piece: Piece, *, longest: int) -> bytes:
    """All bytes of an uncut file.

    Raises: as `lines_of`.
    """
    piece.file.refuse_change()
    found = bytearray()
    for chunk in _chunks(piece):
        found += chunk
        if len(found) > longest:
            raise _too_long(piece, [len(found)], 0, longest)
    piece.file.refuse_change()
    return bytes(found.removeprefix(_MARK))


def _too_long(piece: Piece, lengths: list[int], before: int, longest: int) -> InputError:
    row = next(number for number, length in enumerate(lengths) if length > longest)
    told = f", line {before + row + 1}" if piece.start == 0 else ""
    return InputError(
        "a line is longer than a document may be",
        where=f"{piece.file.path}{told}",
        found=f"more than {longest} bytes",
        fix="raise document_bytes, or look whether the file has line ends",
    )


def _refuse_rows(file: TextFile, rows: int) -> None:
    """Every row costs memory, even an empty one: a kilobyte of zstd can hold a thousand million of them."""
    if file.compression is not None and rows > max(file.size, _ROWS_FROM):
        raise UnsafeFileError(
            "a compressed file has more rows than bytes",
            where=str(file.path),
            found=f"{rows} rows in {file.size} bytes, and more",
            fix="leave the file out, or expand it yourself",
        )


def _chunks(piece: Piece) -> Iterator[bytes]:
    """The bytes of the piece, `_READ` at once; the last chunk may have less."""
    with piece.file.path.open("rb") as file:
        if piece.file.compression is None:
            yield from _evenly(_plain(file, piece))
        else:
            yield from _evenly(_expanded(file, piece.file))


def _evenly(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes, `_READ` at once: of crumbs a long line is slow to join, and a hundred megabytes to split need
    many times their memory.
    """
    held = bytearray()
    for chunk in chunks:
        place = 0
        while place < len(chunk):
            part = memoryview(chunk)[place : place + _READ - len(held)]
            held += part
            place += len(part)
            if len(held) == _READ:
                yield bytes(held)
                held.clear()
    if held:
        yield bytes(held)


def _plain(file: BinaryIO, piece: Piece) -> Iterator[bytes]:
    """Bytes from the first line that begins in the piece to the end of the last one that does."""
    if not piece.stop:  # an uncut file
        while chunk := file.read(_READ):
            yield chunk
        return
    place = piece.start
    if place:
        # A line that begins right here does so behind the end of another.
        file.seek(place - 1)
        place += sum(map(len, _line(file))) - 1
    while place < piece.stop:
        chunk = file.read(min(_READ, piece.stop - place))
        if not chunk:
            return
        place += len(chunk)
        yield chunk
        if place == piece.stop and not chunk.endswith(b"\n"):
            yield from _line(file)


def _line(file: BinaryIO) -> Iterator[bytes]:
    """The file up to the next end of a line, in parts: there may be none for gigabytes."""
    while part := file.readline(_READ):
        yield part
        if part.endswith(b"\n"):
            return


def _expanded(file: BinaryIO, of: TextFile) -> Iterator[bytes]:
    """What the compressed file becomes; refused where that is out of all proportion."""
    limit = max(_EXPANSION * of.size, _EXPANSION_FROM)
    total = 0
    for chunk in _gunzipped(file, of.path) if of.compression == "gzip" else _zstd(file, of.path):
        total += len(chunk)
        if total > limit:
            raise UnsafeFileError(
                f"a compressed file becomes more than {_EXPANSION} times as large as it is",
                where=str(of.path),
                found=f"{total} bytes of {of.size}, and more",
                fix="leave the file out, or expand it yourself",
            )
        yield chunk


def _gunzipped(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Members one after the other, as gzip allows."""
    member: Any = None
    taken = b""
    try:
        while taken or (taken := file.read(_READ)):
            member = member or zlib.decompressobj(wbits=31)
            yield member.decompress(taken, _READ)
            taken = member.unconsumed_tail
            if member.eof:
                member, taken = None, member.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise _broken(path, str(error)) from error
    if member is not None:
        raise _broken(path, "its end is missing")


def _zstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Frames one after the other. Few bytes at a time: a frame may make 30,000 of one, and cannot be told to wait."""
    zstandard = _zstandard()
    decompressor = zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame: Any = None
    taken = b""
    try:
        while taken or (taken := file.read(_READ_ZSTD)):
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(taken)
            frame, taken = (None, frame.unused_data) if frame.eof else (frame, b"")
    except zstandard.ZstdError as error:
        raise _broken(path, str(error)) from error
    if frame is not None:
        raise _broken(path, "its end is missing")


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise InputError(
            "files compressed by zstd need the package zstandard", fix="pip install 'distill[text]'"
        ) from error
    return zstandard


def _broken(path: Path, how: str) -> DamagedDataError:
    return DamagedDataError(
        "a compressed file is damaged", where=str(path), found=how, fix="fetch it anew, or leave it out"
    )
