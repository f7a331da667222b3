"""Passes over a corpus: pieces together are the whole, results are kept, and what is not whole is computed anew."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataselect.corpus_passes import Counted, Features, count_corpus, score_corpus
from dataselect.ngrams import Documents
from distill.parallel.local import LocalPool
from distill.progress import NullProgress
from distill.text import Corpus, CorpusConfig, find_files

FEATURES = Features(2, 500, "fast")


class CountedPool(LocalPool):
    """Knows how much was asked of it."""

    asked = 0

    def each(
        self, function: Callable[..., Any], items: Sequence[Any], *, doing: str
    ) -> Iterator[tuple[int, Any]]:
        self.asked += len(items)
        return super().each(function, items, doing=doing)


def documents(count: int, seed: int) -> list[str | None]:
    """Words of a small vocabulary; some documents are empty."""
    rng = np.random.default_rng(seed)
    words = [f"w{number}" for number in range(50)]
    return [" ".join(rng.choice(words, rng.integers(0, 30))) or None for _ in range(count)]


@pytest.fixture
def texts() -> dict[str, list[str | None]]:
    return {"a/one.jsonl": documents(40, 0), "b/two.jsonl.gz": documents(25, 1)}


@pytest.fixture
def corpus(tmp_path: Path, texts: dict[str, list[str | None]], monkeypatch: pytest.MonkeyPatch) -> Corpus:
    for name, own in texts.items():
        content = b"".join(json.dumps({"text": text or ""}).encode() + b"\n" for text in own)
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    monkeypatch.setattr(Corpus.pieces, "__kwdefaults__", {"piece_bytes": 1000})
    return find_files(CorpusConfig(files=[str(tmp_path / "corpus")]), where="data.files")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def count(corpus: Corpus, folder: Path, pool: LocalPool) -> list[Counted]:
    pieces = count_corpus(corpus, FEATURES, folder=folder, pool=pool, progress=NullProgress(), title="corpus")
    return [counted for _, counted in pieces]


@pytest.mark.parametrize("workers", [1, 2])
def test_pieces_together_are_the_whole(
    workers: int, corpus: Corpus, texts: dict[str, list[str | None]], folder: Path
) -> None:
    every = [text for own in texts.values() for text in own]
    there = [text for text in every if text is not None]
    wanted = np.zeros(500, dtype=np.int64)
    lengths = FEATURES.open().count(Documents.of(there), wanted)
    models = np.random.default_rng(2).normal(size=(2, 500))
    scores, _ = FEATURES.open().score(Documents.of(there), models)
    with LocalPool(workers) as pool:
        pieces = count(corpus, folder, pool)
        scored = list(
            score_corpus(corpus, FEATURES, models, folder=folder, pool=pool, progress=NullProgress())()
        )
    assert len(pieces) == len(scored) > 3
    assert np.array_equal(sum(piece.counts for piece in pieces), wanted)
    assert sum(piece.rows for piece in pieces) == 65
    assert sum(piece.documents for piece in pieces) == len(there)
    found = np.concatenate([piece.scores for _, piece in scored], axis=1)
    tokens = np.concatenate([piece.tokens for _, piece in scored])
    absent = np.array([text is None for text in every])
    assert (found[:, absent] == -np.inf).all() and (tokens[absent] == -1).all()
    assert np.array_equal(found[:, ~absent], scores)
    assert np.array_equal(tokens[~absent], lengths)


def test_what_is_done_is_not_done_again(corpus: Corpus, folder: Path) -> None:
    pool = CountedPool(1)
    first = count(corpus, folder, pool)
    done, pool.asked = pool.asked, 0
    assert done == len(corpus.pieces())
    again = count(corpus, folder, pool)
    assert pool.asked == 0
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.counts, other.counts) and one.rows == other.rows
    models = np.ones((1, 500))
    for scale, wanted in ((1.0, done), (1.0, 0), (2.0, done)):
        pool.asked = 0
        list(
            score_corpus(
                corpus, FEATURES, scale * models, folder=folder, pool=pool, progress=NullProgress()
            )()
        )
        assert pool.asked == wanted, "another model scores anew"


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_what_is_not_whole_is_done_again(damage: str, corpus: Corpus, folder: Path) -> None:
    pool = CountedPool(1)
    first = count(corpus, folder, pool)
    kept = sorted(folder.iterdir())[1]
    content = bytearray(kept.read_bytes())
    if damage == "gone":
        kept.unlink()
    else:
        middle = len(content) // 2
        content[middle] ^= 0xFF
        kept.write_bytes(content[:middle] if damage == "cut" else content)
    pool.asked = 0
    again = count(corpus, folder, pool)
    assert pool.asked == 1
    assert all(np.array_equal(one.counts, other.counts) for one, other in zip(first, again, strict=True))


def test_a_file_that_has_changed_is_done_again(corpus: Corpus, folder: Path) -> None:
    pool = CountedPool(1)
    count(corpus, folder, pool)
    path = corpus.files[1].path
    path.write_bytes(gzip.compress(b'{"text": "new words"}\n'))
    later = find_files(corpus.config, where="data.files")
    pool.asked = 0
    assert count(later, folder, pool)[-1].documents == 1
    assert pool.asked == 1


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a b"}\n{"text": 3}\nno JSON\n')
    (piece,) = count(find_files(CorpusConfig(files=[str(path)]), where="data.files"), folder, LocalPool(1))
    assert (piece.rows, piece.documents, piece.unreadable, piece.first) == (3, 1, 2, 1)
    assert piece.why == "holds no text in 'text', but int"


def test_who_reads_text_does_not_wait_for_torch() -> None:
    """Workers start with this import; torch takes seconds."""
    program = (
        "import sys, dataselect.corpus_passes, distill.parallel.worker; sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
