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

    files: Annotated[list[str], Field(min_length=1)]
    field: str = "text"
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
    """

    path: Path
    name: str
    format: Format
    compression: Compression | None
    size: int
    changed: int

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
        """sha256 (hex) of names and sizes."""
        told = "".join(f"{file.name}\0{file.size}\n" for file in self.files)
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
    own = Path(os.path.abspath(path))  # noqa: PTH100 - `..` is taken away, and links are left, as in patterns
    for pattern in files:
        if Path(pattern).is_dir():
            if _kind(own) is not None and Path(pattern).resolve() in own.resolve().parents:
                return True
        elif _fits(own.parts, Path(os.path.abspath(pattern)).parts):  # noqa: PTH100
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
        return [plain.absolute()]
    if plain.is_dir():
        found = [path for path in plain.absolute().rglob("*") if path.is_file() and _kind(path) is not None]
    else:
        matches = map(Path, glob.glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
        found = [path.absolute() for path in matches if path.is_file()]
    if not found:
        raise InputError(
            "no file of text is there",
            where=where,
            found=pattern,
            allowed=f"a file, a folder of files or a pattern; {_kinds()}",
            fix="correct the path",
        )
    return found


def _described(path: Path, name: str, where: str) -> TextFile:
    kind = _kind(path)
    if kind is None:
        raise InputError("no file of text that is known", where=where, found=str(path), allowed=_kinds())
    facts = path.stat()
    return TextFile(path, name, *kind, facts.st_size, facts.st_mtime_ns)


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
