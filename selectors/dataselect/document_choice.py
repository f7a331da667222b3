"""Which documents of a scored corpus are kept: filter, length, truncation, and resampling for one target or several.

With s(x) a document's score for a target, L(x) its tokens and G(x) its n-grams:

    log w(x) = s(x), or with `by_length` s(x) mean(G) / G(x)    of documents with L(x) >= min_tokens; else -inf
    flattened: log w(x) / temperature
    truncated: w(x) <= sqrt(m) mean(w)                          of the m that pass (Ionides, "Truncated Importance
                                                                Sampling", JCGS 2008)
    kept: the k greatest of log w(x) + g(x), g Gumbel noise     or without noise the k greatest weights

The sum over n-grams makes long documents certain, one way or the other; the mean, brought to the scale of a document of
mean length, does not. Of several targets each takes its share in turn, of what is left: int(k share), the last one what
remains (as the package of Xie et al. does).

Scores are read from the disk piece by piece a few times, for what only the whole corpus tells (mean length, mean
weight), to choose, and for the scores of the chosen: memory is that of a piece and of the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataselect.corpus_passes import Scored
from dataselect.importance import EffectiveSize
from dataselect.resampling import Greatest, gumbel_noise
from distill.errors import InputError
from distill.text import Piece

Reading = Callable[[], Iterator[tuple[Piece, Scored]]]


@dataclass(frozen=True)
class Rules:
    """How documents are chosen.

    Args:
        n: longest n-grams of the scores.
        min_tokens: of a document.
        by_length: whether scores are means over n-grams.
        truncate: whether weights are.
        noise: whether documents are drawn; without, those of the greatest weights are taken.
        temperature: by which log weights are divided.
    """

    n: int
    min_tokens: int
    by_length: bool
    truncate: bool
    noise: bool
    temperature: float = 1.0


class Chosen(NamedTuple):
    """The documents, in the order of targets and, of each, the greatest key first.

    Attributes:
        numbers: int64 (k,), rows of the whole corpus, counted through its files in order.
        scores: float64 (k,), log w for the target that took it.
        targets: int64 (k,), which one.
        passed: documents that passed the filter.
        effective: (sum w)^2 / sum w^2 of them, for each target.
    """

    numbers: NDArray[np.int64]
    scores: NDArray[np.float64]
    targets: NDArray[np.int64]
    passed: int
    effective: tuple[float, ...]


def choose(read: Reading, rules: Rules, counts: Sequence[int], *, seed: int, where: str = "count") -> Chosen:
    """Choose documents.

    Args:
        read: gives all pieces in order, each time it is called.
        rules: how.
        counts: for each of T targets, in the order in which they take.
        seed: of the noise; a document's own follows from it, its file's name and its row there.
        where: the option that tells how many, for messages.

    Raises:
        InputError: fewer documents pass the filter than are asked for.
    """
    whole = _Whole.of(read, rules, len(counts))
    total = sum(counts)
    if whole.passed < total:
        raise InputError(
            f"{total} documents are asked for, and {whole.passed} have {rules.min_tokens} tokens or more",
            where=where,
            found=f"{total} documents",
            allowed=f"at most {whole.passed} documents",
            fix="lower the budget, or min_tokens",
        )
    best = [Greatest(total) for _ in counts]
    for piece, first, row, scored in placed(read):
        logs = whole.log_weights(scored, rules)
        numbers = np.arange(first, first + logs.shape[1])
        for target, greatest in enumerate(best):
            keys = logs[target]
            if rules.noise:
                rows = range(row, row + len(keys))
                keys = keys + gumbel_noise(seed, piece.file.name, rows, draw=target)
            greatest.add(keys, numbers)
    numbers, targets = _in_turn(best, counts)
    scores = _scores_of(numbers, targets, read, rules, whole)
    return Chosen(numbers, scores, targets, whole.passed, whole.effective)


def draw_uniform(read: Reading, rules: Rules, count: int, *, seed: int, draw: int) -> NDArray[np.int64]:
    """Random documents that pass the filter, for comparison: int64 (count,), distinct numbers, in random order.

    Args:
        read, rules, seed: as for `choose`.
        count: at most as many as pass.
        draw: another number than that of any target.
    """
    greatest = Greatest(count)
    for piece, first, row, scored in placed(read):
        rows = range(row, row + len(scored.tokens))
        keys = gumbel_noise(seed, piece.file.name, rows, draw=draw)
        keys[scored.tokens < max(rules.min_tokens, 0)] = -np.inf
        greatest.add(keys, np.arange(first, first + len(keys)))
    return greatest.rows


def _in_turn(best: Sequence[Greatest], counts: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Each target takes its count of what those before it left: documents, and the target of each."""
    taken = np.empty(0, dtype=np.int64)
    for greatest, count in zip(best, counts, strict=True):
        left = greatest.rows if not len(taken) else greatest.rows[~np.isin(greatest.rows, taken)]
        taken = np.concatenate([taken, left[:count]])
    return taken, np.repeat(np.arange(len(counts)), counts)


def _scores_of(
    numbers: NDArray[np.int64], targets: NDArray[np.int64], read: Reading, rules: Rules, whole: _Whole
) -> NDArray[np.float64]:
    """log w of each chosen document for the target that took it."""
    scores = np.empty(len(numbers))
    order = np.argsort(numbers)
    ascending = numbers[order]
    for _, first, _, scored in placed(read):
        here = order[between(ascending, first, len(scored.tokens))]
        if len(here):
            logs = whole.log_weights(scored, rules)
            scores[here] = logs[targets[here], numbers[here] - first]
    return scores


def between(ascending: NDArray[np.int64], first: int, count: int) -> slice:
    """Where the numbers from `first` on, `count` of them, stand."""
    start, stop = np.searchsorted(ascending, [first, first + count])
    return slice(int(start), int(stop))


@dataclass(frozen=True)
class _Whole:
    """What only the whole corpus tells.

    Args:
        passed: documents that pass the filter.
        grams: mean n-grams of them.
        most: log of the greatest weight that is left, of each target; inf without truncation.
        effective: sizes of each target's weights.
    """

    passed: int
    grams: float
    most: tuple[float, ...]
    effective: tuple[float, ...]

    @classmethod
    def of(cls, read: Reading, rules: Rules, targets: int) -> _Whole:
        passed, grams = 0, 0
        for _, scored in read():
            passes = scored.tokens >= max(rules.min_tokens, 0)
            passed += int(passes.sum())
            grams += int(ngrams_of(scored.tokens[passes], rules.n).sum())
        found = cls(passed, grams / max(passed, 1), (math.inf,) * targets, ())
        if rules.truncate:
            means = found._sizes(read, rules, targets)
            most = tuple(size.most(passed) for size in means)
            found = cls(passed, found.grams, most, ())
        sizes = found._sizes(read, rules, targets)
        return cls(passed, found.grams, found.most, tuple(size.size for size in sizes))

    def _sizes(self, read: Reading, rules: Rules, targets: int) -> list[EffectiveSize]:
        sizes = [EffectiveSize() for _ in range(targets)]
        for _, scored in read():
            for size, logs in zip(sizes, self.log_weights(scored, rules), strict=True):
                size.add(logs)
        return sizes

    def log_weights(self, scored: Scored, rules: Rules) -> NDArray[np.float64]:
        """float64 (T, rows), -inf for rows that do not pass."""
        logs = scored.scores.copy()
        passes = scored.tokens >= max(rules.min_tokens, 0)
        logs[:, ~passes] = -np.inf
        if rules.by_length:
            grams = ngrams_of(scored.tokens, rules.n)
            there = passes & (grams > 0)
            logs[:, there] *= self.grams / grams[there]
        return np.minimum(logs / rules.temperature, np.array(self.most)[:, None])


def ngrams_of(tokens: NDArray[np.int32], n: int) -> NDArray[np.int64]:
    """N-grams of documents with so many tokens: sum over i = 1..n of max(0, tokens - i + 1)."""
    wide = tokens.astype(np.int64)
    return sum((np.maximum(wide - i, 0) for i in range(n)), np.zeros_like(wide))


def placed(read: Reading) -> Iterator[tuple[Piece, int, int, Scored]]:
    """Every piece with the number of its first row in the corpus, and that of the same row in its file."""
    first, row, name = 0, 0, ""
    for piece, scored in read():
        if piece.file.name != name:
            row, name = 0, piece.file.name
        yield piece, first, row, scored
        first += len(scored.tokens)
        row += len(scored.tokens)
