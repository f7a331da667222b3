"""Where chosen documents lie, beside as many random ones for comparison; and the work of reading both again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataselect.corpus_passes import Features, Recounting
from dataselect.document_choice import Chosen, Reading, Rules, between, draw_uniform, placed
from distill.contracts import DocumentSet, Selection
from distill.text import Corpus, Piece

_CONTROL = 1 << 32  # the draw of random documents, which is none of a target


def with_controls(
    chosen: Chosen, read: Reading, rules: Rules, counts: Sequence[int], *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The chosen documents, and behind them for each target as many random ones: numbers, and for whom; int64 (2k,).

    Those of target t stand for t, the random ones beside it for T + t. A small control is the beginning of a large one.
    """
    uniform = draw_uniform(read, rules, max(counts), seed=seed, draw=_CONTROL)
    controls = [uniform[:count] for count in counts]
    takers = np.repeat(np.arange(len(counts)), counts) + len(counts)
    return np.concatenate([chosen.numbers, *controls]), np.concatenate([chosen.targets, takers])


class Found(NamedTuple):
    """Where documents lie.

    Attributes:
        names: of files.
        file: int32 (n,), numbers in `names`.
        row: int64 (n,), in the file.
        works: to read them again, piece by piece, in ascending order of their numbers ...
        order: ... which are those of documents `order`, int64 (n,).
    """

    names: tuple[str, ...]
    file: NDArray[np.int32]
    row: NDArray[np.int64]
    works: list[Recounting]
    order: NDArray[np.int64]


def find(
    corpus: Corpus,
    features: Features,
    read: Reading,
    numbers: NDArray[np.int64],
    takers: NDArray[np.int64],
    *,
    groups: int,
) -> Found:
    """Where the documents of these numbers lie, (n,), and work for those who read them again for `takers`, (n,)."""
    file, row = np.empty(len(numbers), dtype=np.int32), np.empty(len(numbers), dtype=np.int64)
    order = np.argsort(numbers, kind="stable")
    ascending = numbers[order]
    names: dict[str, int] = {}
    parts: dict[Piece, tuple[int, slice]] = {}  # number of the first row, and where in `ascending`
    piece_before, piece_first = None, 0
    for piece, first, start, scored in placed(read):
        if piece is not piece_before:
            piece_before, piece_first = piece, first
        here = between(ascending, first, len(scored.tokens))
        if here.start == here.stop:
            continue
        file[order[here]] = names.setdefault(piece.file.name, len(names))
        row[order[here]] = start + ascending[here] - first
        begun = parts[piece][1].start if piece in parts else here.start
        parts[piece] = piece_first, slice(begun, here.stop)
    works = [
        Recounting(piece, corpus.config, features, ascending[part] - first, takers[order[part]], groups)
        for piece, (first, part) in parts.items()
    ]
    return Found(tuple(names), file, row, works, order)


def as_set(chosen: Chosen, found: Found, digests: NDArray[np.uint64]) -> DocumentSet:
    """The chosen documents, which are the first that were found, and the files that hold them."""
    count = len(chosen.numbers)
    held, file = np.unique(found.file[:count], return_inverse=True)
    own = np.empty(len(digests), dtype=np.uint64)
    own[found.order] = digests
    selection = Selection(
        indices=chosen.numbers,
        weights=np.ones(count, dtype=np.float32),
        scores=chosen.scores.astype(np.float32),
    )
    names = tuple(found.names[number] for number in held.tolist())
    return DocumentSet(selection, names, file.astype(np.int32), found.row[:count], own[:count])
