"""Which files a corpus has, and the pieces that are read on their own, by any process in any order.

Plain files are cut at any byte: a piece has the lines that begin in it. Compressed files are one piece, parquet files
are cut between row groups. Files are in the order of their names below the folder that all of them share, whatever
order they are given in, and are known by these names: a corpus may be moved as a whole.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill.byte_sizes import AsBytes
from distill.errors import InputError
from distill.training.config import Strict

Format = Literal["jsonl", "parquet", "text"]
Compression = Literal["gzip", "zstd"]

_SAMPLE = 64 << 10  # bytes

_COMPRESSED: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


class CorpusConfig(Strict):
    """Files of text.

    `files` are paths, folders (every file below them that can be read) or patterns such as `data/**/*.jsonl.gz`;
    `field` is the name of the text in lines of JSON and in parquet. In text files a document is a `line` or the whole
    `file`. Lines that cannot be read are left out and counted; more than the share `bad_lines` of them are refused.
    A line of more than `document_bytes` is refused.
    """

    name: Literal["text"] = "text"
    files: Annotated[list[str], Field(min_length=1)]
    field: Annotated[str, Field(min_length=1)] = "text"
    document: Literal["line", "file"] = "line"
    bad_lines: Annotated[float, Field(ge=0, le=1)] = 0.001
    document_bytes: Annotated[int, AsBytes(at_least=1)] = 16 << 20


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus.

    Args:
        path: where it is.
        name: its path below the folder that all files of the corpus share, with `/`.
        format: of its content.
        compression: None for a plain one.
        size: bytes on disk.
        changed: time of its last change, in ns.
        sample: sha256 (hex) of its first, middle and last 64 KiB: tells copies of other content apart, which have its
            name, size and time.
    """

    path: Path
    name: str
    format: Format
    compression: Compression | None
    size: int
    changed: int
    sample: str = ""

    def refuse_change(self) -> None:
        """Raise InputError where the file is not what it was when the corpus was opened."""
        try:
            facts = self.path.stat()
        except OSError as error:
            raise InputError(
                "a file of the corpus is gone", where=str(self.path), fix="put it back, and run again"
            ) from error
        if (facts.st_size, facts.st_mtime_ns) != (self.size, self.changed):
            raise InputError(
                "a file of the corpus has changed since the run began",
                where=str(self.path),
                found=f"{facts.st_size} bytes",
                allowed=f"{self.size} bytes, as it was",
                fix="wait until it is written, and run again with --fresh",
            )


@dataclass(frozen=True)
class Piece:
    """What is read on its own.

    Args:
        file: of which.
        start, stop: bytes of a plain file of lines; row groups of parquet; both 0 for a file that is not cut.
    """

    file: TextFile
    start: int
    stop: int


@dataclass(frozen=True)
class Corpus:
    """Files of text, in the order of their names.

    Args:
        config: how they are read.
        files: at least one.
    """

    config: CorpusConfig
    files: tuple[TextFile, ...]

    @property
    def identity(self) -> str:
        """sha256 (hex) of names, sizes and samples of the content."""
        told = "".join(f"{file.name}\0{file.size}\0{file.sample}\n" for file in self.files)
        return sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    def pieces(self, *, piece_bytes: int = 64 << 20) -> list[Piece]:
        """All pieces, in the order of files and rows.

        Args:
            piece_bytes: about so large.
        """
        return [piece for file in self.files for piece in _cut(file, self.config, piece_bytes)]


def find_files(config: CorpusConfig, *, where: str) -> Corpus:
    """The corpus of these files.

    Args:
        config: which, and how they are read.
        where: the option that names the files, such as data.files.

    Raises:
        InputError: a pattern without a file, a file of no known kind, or one that cannot be looked at.
    """
    paths = sorted({path for pattern in config.files for path in _matching(pattern, where)})
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    files = [_described(path, path.relative_to(shared).as_posix(), where) for path in paths]
    return Corpus(config, tuple(sorted(files, key=lambda file: file.name)))


def would_be_read(path: Path, files: Sequence[str]) -> bool:
    """Whether a file at `path` would be one of a corpus of these files, were it there.

    Args:
        path: of a file that may be absent.
        files: as of `CorpusConfig`.
    """
    own = _absolute(path)
    for pattern in files:
        if Path(pattern).is_dir():
            folder, there = Path(pattern).resolve(), own.resolve()
            if (
                _kind(own) is not None
                and folder in there.parents
                and not _is_hidden(there.relative_to(folder))
            ):
                return True
        elif _fits(own.parts, _absolute(Path(pattern)).parts):
            return True
    return False


def _fits(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether `glob` takes these parts of a path for those of a pattern; hidden names must be named."""
    if not pattern or not path:
        return not pattern and not path
    name, own = path[0], pattern[0]
    if own == "**":
        further = not name.startswith(".") and (len(path) == 1 == len(pattern) or _fits(path[1:], pattern))
        return further or _fits(path, pattern[1:])
    hidden = name.startswith(".") and not own.startswith(".")
    return not hidden and fnmatchcase(name, own) and _fits(path[1:], pattern[1:])


def _matching(pattern: str, where: str) -> list[Path]:
    """Absolute paths of the files that a path, a folder or a pattern means."""
    plain = Path(pattern)
    if plain.is_file():
        return [_absolute(plain)]
    if plain.is_dir():
        below = _absolute(plain)
        found = [
            path
            for path in below.rglob("*")
            if path.is_file() and _kind(path) is not None and not _is_hidden(path.relative_to(below))
        ]
    else:
        matches = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
        found = [_absolute(path) for path in matches if path.is_file()]
    if not found:
        raise InputError(
            "no file of text is there",
            where=where,
            found=pattern,
            allowed=f"a file, a folder of files or a pattern; {_kinds()}",
            fix="correct the path",
        )
    return found


def _absolute(path: Path) -> Path:
    """The path without `..`, wherever it is looked at from; links are left."""
    return Path(os.path.abspath(path))  # noqa: PTH100


def _is_hidden(path: Path) -> bool:
    """Whether a file or a folder on its way begins with a dot, as those of editors and of git do."""
    return any(part.startswith(".") for part in path.parts)


def _sample(path: Path, size: int) -> str:
    """sha256 (hex) of the first, middle and last part of a file; of all of it where it is small."""
    state = sha256()
    with path.open("rb") as file:
        for start in sorted({0, max(size // 2 - _SAMPLE // 2, 0), max(size - _SAMPLE, 0)}):
            file.seek(start)
            state.update(file.read(_SAMPLE))
    return state.hexdigest()


def _described(path: Path, name: str, where: str) -> TextFile:
    kind = _kind(path)
    if kind is None:
        raise InputError("no file of text that is known", where=where, found=str(path), allowed=_kinds())
    try:
        facts = path.stat()
        sample = _sample(path, facts.st_size)
    except OSError as error:
        raise InputError(
            "a file cannot be read", where=where, found=f"{path}: {error.strerror}", fix="leave it out"
        ) from error
    return TextFile(path, name, *kind, facts.st_size, facts.st_mtime_ns, sample)


def _kind(path: Path) -> tuple[Format, Compression | None] | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = _COMPRESSED.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    format = _FORMATS.get(suffixes[-1]) if suffixes else None
    if format is None or (format == "parquet" and compression is not None):
        return None
    return format, compression


def _kinds() -> str:
    return f"{', '.join(_FORMATS)}; also {', '.join(_COMPRESSED)} behind any but .parquet"


def whole_file(file: TextFile) -> Piece:
    """A file as one piece, however it is cut otherwise."""
    if file.format == "parquet":
        from distill.text.parquet import cut_row_groups

        cuts = cut_row_groups(file.path, file.size + 1)
        return Piece(file, 0, max((stop for _, stop in cuts), default=0))
    return Piece(file, 0, 0)


def _cut(file: TextFile, config: CorpusConfig, piece_bytes: int) -> Sequence[Piece]:
    if file.format == "parquet":
        from distill.text.parquet import cut_row_groups

        return [Piece(file, start, stop) for start, stop in cut_row_groups(file.path, piece_bytes)]
    if file.compression is not None or (file.format == "text" and config.document == "file"):
        return [Piece(file, 0, 0)]
    bounds = [*range(0, file.size, piece_bytes), file.size]
    return [Piece(file, start, stop) for start, stop in pairwise(bounds)]
