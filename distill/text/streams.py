"""The bytes of a piece as whole lines, whatever they are compressed by, in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from distill.errors import DamagedDataError, InputError, UnsafeFileError
from distill.text.corpus import Piece, TextFile

_READ = 1 << 20  # bytes at once
_READ_ZSTD = 1 << 12
_LARGEST_WINDOW = 1 << 27  # what zstd may need to look back, in bytes
_EXPANSION = 1000  # times its size that a compressed file may become ...
_EXPANSION_FROM = 1 << 30  # ... from so many bytes on


def lines_of(piece: Piece, *, longest: int) -> Iterator[list[bytes]]:
    """The lines that begin in the piece, without their ends, in lists of about a megabyte.

    Args:
        piece: of a file of lines.
        longest: bytes that a line may have.

    Raises:
        InputError: a longer line, or the file has changed.
        DamagedDataError: the compressed file is broken.
        UnsafeFileError: it becomes more than a thousand times as large as it is.
    """
    piece.file.refuse_change()
    rest, first = b"", True
    row = 0
    for chunk in _chunks(piece):
        if first:
            chunk, first = chunk.removeprefix(b"\xef\xbb\xbf") if piece.start == 0 else chunk, False
        lines = (rest + chunk).split(b"\n")
        rest = lines.pop()
        row += len(lines)
        if len(rest) > longest or any(len(line) > longest for line in lines):
            raise _too_long(piece, [*lines, rest], row - len(lines), longest)
        if lines:
            yield [line.removesuffix(b"\r") for line in lines]
    if rest:
        yield [rest.removesuffix(b"\r")]
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
            raise _too_long(piece, [bytes(found)], 0, longest)
    piece.file.refuse_change()
    return bytes(found.removeprefix(b"\xef\xbb\xbf"))


def _too_long(piece: Piece, lines: list[bytes], before: int, longest: int) -> InputError:
    row = next(number for number, line in enumerate(lines) if len(line) > longest)
    told = f", line {before + row + 1}" if piece.start == 0 else ""
    return InputError(
        "a line is longer than a document may be",
        where=f"{piece.file.path}{told}",
        found=f"more than {longest} bytes",
        fix="raise document_bytes, or look whether the file has line ends",
    )


def _chunks(piece: Piece) -> Iterator[bytes]:
    with piece.file.path.open("rb") as file:
        if piece.file.compression is None:
            yield from _plain(file, piece)
        else:
            yield from _expanded(file, piece.file)


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
        place += len(file.readline()) - 1
    while place < piece.stop:
        chunk = file.read(min(_READ, piece.stop - place))
        if not chunk:
            return
        place += len(chunk)
        if place == piece.stop and not chunk.endswith(b"\n"):
            chunk += file.readline()
        yield chunk


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
