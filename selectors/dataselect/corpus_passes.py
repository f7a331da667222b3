"""Passes over a corpus, piece by piece in processes side by side: n-grams counted, documents scored.

Each piece's result is a file, written whole or not at all: a killed run computes the missing ones only. A file's name
holds the sha256 of everything that decides its content, so that a piece of a file that has changed is computed anew. Of
the documents nothing is held: scores lie on the disk, 8 bytes a document and model and 4 more.

FOLDER/counts-NUMBER-SHA256.npz    what a piece holds (`Counted`)
FOLDER/scores-NUMBER-SHA256.npz    scores of its rows (`Scored`)
FOLDER/chosen-NUMBER-SHA256.npz    n-grams of its chosen documents
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from unicodedata import unidata_version

import numpy as np
from numpy.typing import NDArray

from dataselect.ngrams import Documents, Hash, NGrams
from distill.files import is_whole_zip, remove_stale_partials, write_bytes_atomically
from distill.parallel import Pool
from distill.text import Corpus, CorpusConfig, Piece, digest, read_blocks

if TYPE_CHECKING:
    from distill.cache.text_passes import TextPasses
    from distill.contracts import Progress

ABSENT = -1  # tokens of a row without a document
ROWS = 1 << 16  # whose scores are looked at together
_PRODUCER = 3  # another number where results of the same inputs would be other ones

Work = TypeVar("Work", "Counting", "Scoring", "Recounting")


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
        models_sha256: of their bytes.
    """

    piece: Piece
    config: CorpusConfig
    features: Features
    models: NDArray[np.float64]
    models_sha256: str

    kind = "scores"

    @property
    def identity(self) -> str:
        """sha256 (hex) of everything that decides the result."""
        return _sha256(*_facts(self.piece, self.config), *astuple(self.features), self.models_sha256)


@dataclass(frozen=True)
class Recounting:
    """To count the n-grams of the chosen documents of a piece, for each target.

    Args:
        rows: int64 (n,), ascending rows of the piece.
        targets: int64 (n,), the number of the target that each was taken for.
        count: of targets.
    """

    piece: Piece
    config: CorpusConfig
    features: Features
    rows: NDArray[np.int64]
    targets: NDArray[np.int64]
    count: int

    kind = "chosen"

    @property
    def identity(self) -> str:
        """sha256 (hex) of everything that decides the result."""
        chosen = (self.rows.tobytes(), self.targets.tobytes(), self.count)
        return _sha256(*_facts(self.piece, self.config), *astuple(self.features), *chosen)


@dataclass(frozen=True)
class Counted:
    """What a piece holds.

    Attributes:
        counts: int64 (B,).
        rows: also those without a document.
        documents: rows with one.
        unreadable: rows that could not be read.
        first: the first of these, from 0; -1 where there is none.
        why: it could not be read.
    """

    counts: NDArray[np.int64]
    rows: int
    documents: int
    unreadable: int
    first: int
    why: str


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
    corpus: Corpus,
    features: Features,
    *,
    folder: Path,
    pool: Pool,
    progress: Progress,
    title: str,
    passes: TextPasses | None = None,
) -> Iterator[tuple[Piece, Counted]]:
    """What every piece of the corpus holds, in their order.

    Args:
        corpus: of one or more pieces.
        features: which n-grams.
        folder: where results are kept.
        pool: who works.
        progress: where it is told.
        title: what the corpus is called there.
        passes: who keeps what the pieces cost; None keeps nothing.

    Raises:
        InputError, DamagedDataError: what `read_blocks` refuses.
    """
    works = [Counting(piece, corpus.config, features) for piece in corpus.pieces()]
    paths = _done(works, count_piece, folder, pool, progress, f"count n-grams of {title}", passes)
    for work, path in zip(works, paths, strict=True):
        yield work.piece, _counted(path, features.buckets)


def score_corpus(
    corpus: Corpus,
    features: Features,
    models: NDArray[np.float64],
    *,
    folder: Path,
    pool: Pool,
    progress: Progress,
    passes: TextPasses | None = None,
) -> Callable[[], Iterator[tuple[Piece, Scored]]]:
    """Score every document; what is returned reads the scores, in order, as often as it is called.

    It gives at most `ROWS` rows at once, so that memory is that of a piece's scores.

    Args, raises: as `count_corpus`; `models` float64 (T, B).
    """
    by = models_sha256(models)
    works = [Scoring(piece, corpus.config, features, models, by) for piece in corpus.pieces()]
    paths = _done(works, score_piece, folder, pool, progress, "score documents", passes)
    pieces = [work.piece for work in works]

    def read() -> Iterator[tuple[Piece, Scored]]:
        for piece, path in zip(pieces, paths, strict=True):
            with np.load(path, allow_pickle=False) as kept:
                scores, tokens = kept["scores"], kept["tokens"]
            for start in range(0, len(tokens), ROWS):
                rows = slice(start, start + ROWS)
                yield piece, Scored(scores[:, rows], tokens[rows])

    return read


def models_sha256(models: NDArray[np.float64]) -> str:
    """sha256 (hex) of models, (T, B)."""
    return hashlib.sha256(models.astype("<f8").tobytes()).hexdigest()


def count_chosen(
    works: Sequence[Recounting],
    *,
    folder: Path,
    pool: Pool,
    progress: Progress,
    passes: TextPasses | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """N-grams of the documents chosen for each target, int64 (T, B), and the digests of all, in order: uint64 (n,).

    Args:
        works: pieces with a chosen document.
        folder, pool, progress, passes: as for `count_corpus`.
    """
    paths = _done(works, recount_piece, folder, pool, progress, "count n-grams of the choice", passes)
    total = np.zeros((works[0].count, works[0].features.buckets), dtype=np.int64)
    digests = []
    for path in paths:
        with np.load(path, allow_pickle=False) as kept:
            total[kept["target"], kept["bucket"]] += kept["counts"]
            digests.append(kept["digests"])
    return total, np.concatenate(digests)


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
    bucket = np.flatnonzero(counts)  # a small file has few of them
    return _packed(bucket=bucket, counts=counts[bucket], facts=facts, why=told)


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


def recount_piece(work: Recounting) -> bytes:
    """Count the chosen documents of one piece, in a process of its own; the content of the piece's file."""
    features = work.features.open()
    counts = np.zeros((work.count, work.features.buckets), dtype=np.int64)
    digests = np.zeros(len(work.rows), dtype=np.uint64)
    for block in read_blocks(work.piece, work.config, wanted=work.rows):
        inside = np.flatnonzero((work.rows >= block.first) & (work.rows < block.first + len(block.texts)))
        texts = [block.texts[place] or "" for place in (work.rows[inside] - block.first).tolist()]
        digests[inside] = [digest(text) for text in texts]
        targets = work.targets[inside]
        for target in np.unique(targets):
            own = [texts[place] for place in np.flatnonzero(targets == target).tolist()]
            features.count(Documents.of(own), counts[target])
    target, bucket = np.nonzero(counts)
    return _packed(target=target, bucket=bucket, counts=counts[target, bucket], digests=digests)


def _done(
    works: Sequence[Work],
    function: Callable[[Work], bytes],
    folder: Path,
    pool: Pool,
    progress: Progress,
    title: str,
    passes: TextPasses | None = None,
) -> list[Path]:
    """The files of all results; what is missing is computed."""
    remove_stale_partials(folder)
    paths = [folder / f"{work.kind}-{number:06d}-{work.identity}.npz" for number, work in enumerate(works)]
    missing = [number for number, path in enumerate(paths) if not is_whole_zip(path)]
    if passes is not None:
        passes.charge(folder, set(range(len(works))).difference(missing))
    if missing:
        with progress.task(title, total=len(missing), unit="piece") as task:
            before = time.perf_counter()
            for place, content in pool.each(function, [works[number] for number in missing], doing=title):
                write_bytes_atomically(paths[missing[place]], content)
                if passes is not None:
                    now = time.perf_counter()
                    passes.made(folder, missing[place], seconds=now - before)
                    before = now
                task.advance()
    return paths


def _packed(**arrays: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _counted(path: Path, buckets: int) -> Counted:
    with np.load(path, allow_pickle=False) as kept:
        rows, documents, unreadable, first = kept["facts"].tolist()
        why = kept["why"].tobytes().decode("utf-8")
        counts = np.zeros(buckets, dtype=np.int64)
        counts[kept["bucket"]] = kept["counts"]
        return Counted(counts, rows, documents, unreadable, first, why)


def _facts(piece: Piece, config: CorpusConfig) -> tuple[Any, ...]:
    file = piece.file
    read = (config.field, config.document, config.document_bytes)
    return (
        _PRODUCER,
        unidata_version,
        file.name,
        file.size,
        file.changed,
        file.sample,
        piece.start,
        piece.stop,
        *read,
    )


def _sha256(*parts: Any) -> str:
    result = hashlib.sha256()
    for part in parts:
        result.update(part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass"))
        result.update(b"\0")
    return result.hexdigest()
