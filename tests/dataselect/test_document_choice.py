"""The choice of documents: against plain forms, by how often, and what it does not depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dataselect.corpus_passes import Scored
from dataselect.document_choice import Reading, Rules, choose, ngrams_of
from dataselect.resampling import gumbel_noise
from distill.errors import InputError
from distill.text import Piece
from distill.text.corpus import TextFile

PLAIN = Rules(n=2, min_tokens=0, by_length=False, truncate=False, noise=False)


def reading(scores: NDArray[np.float64], tokens: NDArray[np.int32], files: list[int], cut: int) -> Reading:
    """Files of so many rows, in pieces of at most `cut`."""

    def read() -> Iterator[tuple[Piece, Scored]]:
        start = 0
        for number, rows in enumerate(files):
            file = TextFile(Path("nowhere"), f"{number}.jsonl", "jsonl", None, 1, 1)
            for first in range(start, start + rows, cut):
                part = slice(first, min(first + cut, start + rows))
                yield Piece(file, 0, 1), Scored(scores[:, part], tokens[part])
            start += rows

    return read


@pytest.fixture
def corpus() -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    """Scores for two targets and tokens of 60 rows, three of which are no documents."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 40, 60).astype(np.int32)
    tokens[[3, 20, 59]] = -1
    scores = rng.normal(0, 30, (2, 60))
    scores[:, tokens < 0] = -np.inf
    return scores, tokens


@pytest.mark.parametrize("cut", [1, 7, 60])
@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("by_length", [False, True])
def test_the_choice_is_that_of_a_plain_form(
    cut: int, noise: bool, by_length: bool, corpus: tuple[NDArray[np.float64], NDArray[np.int32]]
) -> None:
    scores, tokens = corpus
    rules = Rules(n=2, min_tokens=5, by_length=by_length, truncate=False, noise=noise)
    found = choose(reading(scores, tokens, [25, 35], cut), rules, (10, 7), seed=3)

    passes = tokens >= 5
    grams = np.maximum(tokens, 0) + np.maximum(tokens - 1, 0)
    logs = np.full((2, 60), -np.inf)
    for row in np.flatnonzero(passes):
        factor = grams[passes].mean() / grams[row] if by_length else 1.0
        logs[:, row] = scores[:, row] * factor
    keys = logs.copy()
    if noise:
        for target in range(2):
            keys[target, :25] += gumbel_noise(3, "0.jsonl", range(25), draw=target)
            keys[target, 25:] += gumbel_noise(3, "1.jsonl", range(35), draw=target)
    first = np.argsort(-keys[0], kind="stable")[:10].tolist()
    second = [row for row in np.argsort(-keys[1], kind="stable").tolist() if row not in first][:7]
    assert found.numbers.tolist() == [*first, *second]
    assert found.targets.tolist() == [0] * 10 + [1] * 7
    wanted = [*logs[0, first], *logs[1, second]]
    assert found.scores == pytest.approx(wanted, rel=1e-12)
    assert found.passed == passes.sum()
    assert found.effective == choose(reading(scores, tokens, [25, 35], 60), rules, (10, 7), seed=3).effective
    for target in range(2):
        weights = np.exp(logs[target, passes] - logs[target, passes].max())
        assert found.effective[target] == pytest.approx(weights.sum() ** 2 / (weights @ weights), rel=1e-9)


def test_no_weight_is_above_what_truncation_leaves() -> None:
    logs = np.log(np.array([[1.0, 1.0, 1.0, 100.0]]))
    tokens = np.full(4, 9, dtype=np.int32)
    rules = Rules(n=1, min_tokens=0, by_length=False, truncate=True, noise=False)
    found = choose(reading(logs, tokens, [4], 2), rules, (1,), seed=0)
    most = np.sqrt(4) * (103 / 4)
    assert found.numbers.tolist() == [3]
    assert np.exp(found.scores) == pytest.approx([most])
    assert found.effective[0] == pytest.approx((3 + most) ** 2 / (3 + most**2))


def test_too_large_a_budget_is_refused(corpus: tuple[NDArray[np.float64], NDArray[np.int32]]) -> None:
    scores, tokens = corpus
    there = int((tokens >= 0).sum())
    every = choose(reading(scores, tokens, [60], 9), PLAIN, (there, 0), seed=0)
    assert sorted(every.numbers.tolist()) == np.flatnonzero(tokens >= 0).tolist()
    with pytest.raises(InputError, match="58 documents are asked for, and 57") as caught:
        choose(reading(scores, tokens, [60], 9), PLAIN, (there, 1), seed=0)
    assert caught.value.allowed == "at most 57 documents"


def test_a_drawn_document_hangs_on_its_place_and_not_on_what_else_is_there() -> None:
    """The order of keys of one file is the same beside another file."""
    rng = np.random.default_rng(1)
    scores, tokens = rng.normal(size=(1, 40)), np.full(40, 9, dtype=np.int32)
    rules = Rules(n=1, min_tokens=0, by_length=False, truncate=False, noise=True)
    alone = choose(reading(scores[:, :20], tokens[:20], [20], 20), rules, (20,), seed=5).numbers
    beside = choose(reading(scores, tokens, [20, 20], 6), rules, (40,), seed=5).numbers
    assert [number for number in beside if number < 20] == alone.tolist()


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ngrams_of_a_document(n: int) -> None:
    for tokens in range(6):
        wanted = sum(max(0, tokens - i + 1) for i in range(1, n + 1))
        assert ngrams_of(np.array([tokens], dtype=np.int32), n).tolist() == [wanted]
    assert ngrams_of(np.array([-1], dtype=np.int32), n).tolist() == [0]


def test_a_higher_temperature_spreads_the_draw(
    corpus: tuple[NDArray[np.float64], NDArray[np.int32]],
) -> None:
    """Log weights are divided by it: those of the reading divided before give the same choice."""
    scores, tokens = corpus
    drawn = Rules(n=2, min_tokens=0, by_length=False, truncate=False, noise=True)
    cold = choose(reading(scores, tokens, [60], 60), drawn, (8, 4), seed=1)
    warm = choose(reading(scores, tokens, [60], 60), replace(drawn, temperature=30.0), (8, 4), seed=1)
    plain = choose(reading(scores / 30, tokens, [60], 60), drawn, (8, 4), seed=1)
    assert warm.numbers.tolist() == plain.numbers.tolist() != cold.numbers.tolist()
    assert warm.scores == pytest.approx(plain.scores)
    assert min(warm.effective) > 5 > 2 > min(cold.effective)
