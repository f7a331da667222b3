"""Passes over a corpus, piece by piece in processes side by side: n-grams counted, documents scored.

Each piece's result is a file in the step's folder, written whole or not at all: a killed run computes the missing ones
only. A file's name holds the sha256 of everything that decides its content, so that a piece of a file that has changed
is computed anew. Of the documents nothing is held: scores lie on the disk, 8 bytes a document and model and 4 more.

FOLDER/counts-NUMBER.SHA256.npz    what a piece holds (`Counted`)
FOLDER/scores-NUMBER.SHA256.npz    scores of its rows (`Scored`)
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataselect.ngrams import Documents, Hash, NGrams
from distill.files import remove_stale_partials, write_bytes_atomically
from distill.parallel import Pool
from distill.text import Corpus, CorpusConfig, Piece, read_blocks

if TYPE_CHECKING:
    from distill.contracts import Progress

ABSENT = -1  # tokens of a row without a document
_PRODUCER = 1  # another number where results of the same inputs would be other ones

Work = TypeVar("Work", "Counting", "Scoring")


@dataclass(frozen=True)
class Features:
    """Which n-grams, as `NGrams` takes them."""

    n: int
    buckets: int
    hash: Hash

    def open(self) -> NGrams:
        """The one of this process: what it remembers of one piece serves the next, and the next pass."""
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(features: Features) -> NGrams:
    return NGrams(n=features.n, buckets=features.buckets, hash=features.hash)


@dataclass(frozen=True)
class Counting:
    """To count the n-grams of a piece."""

    piece: Piece
    config: CorpusConfig
    features: Features

    kind = "counts"

    @property
    def identity(self) -> str:
        """sha256 (hex) of everything that decides the result."""
        return _sha256(*_facts(self.piece, self.config), *astuple(self.features))


@dataclass(frozen=True)
class Scoring:
    """To score the documents of a piece.

    Args:
        models: float64 (T, B).
    """

    piece: Piece
    config: CorpusConfig
    features: Features
    models: NDArray[np.float64]

    kind = "scores"

    @property
    def identity(self) -> str:
        """sha256 (hex) of everything that decides the result."""
        return _sha256(*_facts(self.piece, self.config), *astuple(self.features), self.models.tobytes())


@dataclass(frozen=True)
class Counted:
    """What a piece holds.

    Attributes:
        path: of its file.
        rows: also those without a document.
        documents: rows with one.
        unreadable: rows that could not be read.
        first: the first of these, from 0; -1 where there is none.
        why: it could not be read.
    """

    path: Path
    rows: int
    documents: int
    unreadable: int
    first: int
    why: str

    @property
    def counts(self) -> NDArray[np.int64]:
        """int64 (B,), read at each use: those of all pieces of a large corpus are not held."""
        with np.load(self.path, allow_pickle=False) as kept:
            return np.asarray(kept["counts"])


@dataclass(frozen=True)
class Scored:
    """The rows of a piece.

    Attributes:
        scores: float64 (T, rows), -inf where there is no document.
        tokens: int32 (rows,), -1 there.
    """

    scores: NDArray[np.float64]
    tokens: NDArray[np.int32]


def count_corpus(
    corpus: Corpus, features: Features, *, folder: Path, pool: Pool, progress: Progress, title: str
) -> list[Counted]:
    """What every piece of the corpus holds, in their order.

    Args:
        corpus: of one or more pieces.
        features: which n-grams.
        folder: where results are kept.
        pool: who works.
        progress: where it is told.
        title: what the corpus is called there.

    Raises:
        InputError, DamagedDataError: what `read_blocks` refuses.
    """
    works = [Counting(piece, corpus.config, features) for piece in corpus.pieces()]
    paths = _done(works, count_piece, folder, pool, progress, f"count n-grams of {title}")
    return [_counted(path) for path in paths]


def score_corpus(
    corpus: Corpus,
    features: Features,
    models: NDArray[np.float64],
    *,
    folder: Path,
    pool: Pool,
    progress: Progress,
) -> Iterator[tuple[Piece, Scored]]:
    """The scores of every piece, in their order, one after the other: memory is that of one.

    Args, raises: as `count_corpus`; `models` float64 (T, B).
    """
    works = [Scoring(piece, corpus.config, features, models) for piece in corpus.pieces()]
    paths = _done(works, score_piece, folder, pool, progress, "score documents")
    for work, path in zip(works, paths, strict=True):
        with np.load(path, allow_pickle=False) as kept:
            yield work.piece, Scored(kept["scores"], kept["tokens"])


def count_piece(work: Counting) -> bytes:
    """Count one piece, in a process of its own; the content of the piece's file."""
    features = work.features.open()
    counts = np.zeros(work.features.buckets, dtype=np.int64)
    rows = documents = unreadable = 0
    first, why = ABSENT, ""
    for block in read_blocks(work.piece, work.config):
        texts = [text for text in block.texts if text is not None]
        features.count(Documents.of(texts), counts)
        rows += len(block.texts)
        documents += len(texts)
        if block.unreadable and not unreadable:
            first, why = block.unreadable[0].row, block.unreadable[0].why
        unreadable += len(block.unreadable)
    facts = np.array([rows, documents, unreadable, first], dtype=np.int64)
    told = np.frombuffer(why.encode("utf-8", "replace"), np.uint8)
    return _packed(counts=counts, facts=facts, why=told)


def score_piece(work: Scoring) -> bytes:
    """Score one piece, in a process of its own; the content of the piece's file."""
    features = work.features.open()
    scores = [np.empty((len(work.models), 0))]
    tokens = [np.empty(0, dtype=np.int32)]
    for block in read_blocks(work.piece, work.config):
        there = np.array([text is not None for text in block.texts], dtype=bool)
        documents = Documents.of([text for text in block.texts if text is not None])
        whole = np.full((len(work.models), len(there)), -np.inf)
        lengths = np.full(len(there), ABSENT, dtype=np.int32)
        whole[:, there], lengths[there] = features.score(documents, work.models)
        scores.append(whole)
        tokens.append(lengths)
    return _packed(scores=np.concatenate(scores, axis=1), tokens=np.concatenate(tokens))


def _done(
    works: Sequence[Work],
    function: Callable[[Work], bytes],
    folder: Path,
    pool: Pool,
    progress: Progress,
    title: str,
) -> list[Path]:
    """The files of all results; what is missing is computed."""
    remove_stale_partials(folder)
    paths = [folder / f"{work.kind}-{number:06d}.{work.identity}.npz" for number, work in enumerate(works)]
    missing = [number for number, path in enumerate(paths) if not _is_whole(path)]
    if missing:
        with progress.task(title, total=len(missing), unit="piece") as task:
            for place, content in pool.each(function, [works[number] for number in missing], doing=title):
                write_bytes_atomically(paths[missing[place]], content)
                task.advance()
    return paths


def _packed(**arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _is_whole(path: Path) -> bool:
    """Whether the file is there, with the checksums that a zip file has."""
    with suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(path) as kept:
        return kept.testzip() is None
    return False


def _counted(path: Path) -> Counted:
    with np.load(path, allow_pickle=False) as kept:
        rows, documents, unreadable, first = kept["facts"].tolist()
        why = kept["why"].tobytes().decode("utf-8")
        return Counted(path, rows, documents, unreadable, first, why)


def _facts(piece: Piece, config: CorpusConfig) -> tuple[Any, ...]:
    file = piece.file
    read = (config.field, config.document, config.document_bytes)
    return (_PRODUCER, file.name, file.size, file.changed, piece.start, piece.stop, *read)


def _sha256(*parts: Any) -> str:
    result = hashlib.sha256()
    for part in parts:
        result.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass"))
        result.update(b"\0")
    return result.hexdigest()
