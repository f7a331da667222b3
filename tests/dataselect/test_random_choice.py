"""The random selector: uniform, balanced, and another subset for another seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import chi2

from dataselect.random_choice import RandomChoice
from distill.contracts import Context, Selection, Source


def select(context: Context, source: Source, ipc: int, previous: Selection | None = None) -> Selection:
    return RandomChoice(RandomChoice.Config(ipc=ipc)).run(context, source, previous)


def test_every_sample_is_as_likely_as_the_next(source: Source, make_context: Callable[..., Context]) -> None:
    """Counts over 300 seeds. Draws of 3 of 8 without replacement: sum (O - E)^2 / (E (1 - 3/8)) * 7/8 ~ chi2(7)."""
    seeds, ipc, n = 300, 3, 8
    context = make_context()
    counts = np.zeros(len(source.train))
    for seed in range(seeds):
        chosen = select(Context(**{**context.__dict__, "seed": seed}), source, ipc)
        counts[chosen.indices] += 1
    expected = seeds * ipc / n
    for number in range(3):
        own = counts[source.train.labels.numpy() == number]
        statistic = ((own - expected) ** 2).sum() / (expected * (1 - ipc / n)) * (n - 1) / n
        assert 0.001 < chi2.sf(statistic, n - 1) < 0.999


def test_pairs_are_drawn_independently_of_their_distance(
    source: Source, make_context: Callable[..., Context]
) -> None:
    """With 2 of 8, each of the 28 pairs comes up; none hangs on to its neighbour."""
    context = make_context()
    pairs = np.zeros((len(source.train),) * 2)
    for seed in range(400):
        first, second = sorted(select(Context(**{**context.__dict__, "seed": seed}), source, 2).indices[:2])
        pairs[first, second] += 1
    seen = pairs[pairs > 0]
    assert len(seen) == 28
    assert chi2.sf(((seen - 400 / 28) ** 2 / (400 / 28)).sum(), 27) > 0.001


def test_is_balanced_by_class(
    make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    source = make_source((20, 5, 9))
    chosen = select(make_context(), source, 4)
    labels = source.train.labels.numpy()[chosen.indices]
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_classes_are_drawn_apart(
    make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    """Two classes of equal size get different draws, and a class keeps its draw when another one grows."""
    small, grown = make_source((8, 8)), make_source((20, 8))
    a, b = (select(make_context(), source, 5) for source in (small, grown))
    own = [np.flatnonzero(source.train.labels.numpy() == 1) for source in (small, grown)]
    places = [
        np.searchsorted(rows, picks.indices[5:]).tolist() for rows, picks in zip(own, (a, b), strict=True)
    ]
    assert places[0] == places[1]
    first = np.searchsorted(np.flatnonzero(small.train.labels.numpy() == 0), a.indices[:5]).tolist()
    assert first != places[0]


def test_picks_from_the_selection_before(source: Source, make_context: Callable[..., Context]) -> None:
    context = make_context()
    before = select(context, source, 5)
    after = select(context, source, 2, before)
    assert set(after.indices) <= set(before.indices)
