"""Gumbel top-k: its statistics against exact probabilities, and what it does not depend on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from dataselect.resampling import Greatest, gumbel_noise

WEIGHTS = np.array([1.0, 2.0, 3.0, 5.0, 8.0, 0.5])


def inclusion(weights: np.ndarray, count: int) -> np.ndarray:
    """The probability of each item to be among `count` drawn one after the other, by all orders."""
    found = np.zeros(len(weights))
    for order in permutations(range(len(weights)), count):
        left, chance = weights.sum(), 1.0
        for item in order:
            chance *= weights[item] / left
            left -= weights[item]
        found[list(order)] += chance
    return found


@pytest.mark.parametrize("count", [1, 3, 5])
def test_items_are_drawn_as_often_as_their_weights_say(count: int) -> None:
    """Chi-square of inclusions over 20,000 seeds; the six are dependent, so the bound is wide (p < 1e-6)."""
    seeds = 20_000
    noise = np.stack([gumbel_noise(seed, "a.jsonl", range(6)) for seed in range(seeds)])
    keys = np.log(WEIGHTS) + noise
    drawn = np.argsort(-keys, axis=1)[:, :count]
    frequencies = np.bincount(drawn.ravel(), minlength=6)
    wanted = inclusion(WEIGHTS, count) * seeds
    assert wanted.sum() == pytest.approx(count * seeds)
    assert float(((frequencies - wanted) ** 2 / wanted).sum()) < 36


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(0, "a", range(100_000))
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.02)


def test_noise_hangs_on_the_seed_the_file_the_row_and_the_draw_alone() -> None:
    noise = gumbel_noise(1, "a", range(100))
    assert np.array_equal(gumbel_noise(1, "a", range(40, 60)), noise[40:60])
    some = np.array([70, 3, 99])
    assert np.array_equal(gumbel_noise(1, "a", some), noise[some])
    for other in (
        gumbel_noise(2, "a", range(100)),
        gumbel_noise(1, "b", range(100)),
        gumbel_noise(1, "a", range(100), draw=1),
    ):
        assert not np.isin(noise, other).any()


@pytest.mark.parametrize("size", [1, 3, 7, 40])
@pytest.mark.parametrize("count", [1, 5, 39, 40, 60])
def test_the_greatest_are_found_however_they_come(size: int, count: int) -> None:
    values = np.random.default_rng(0).integers(0, 6, 40).astype(float)  # many alike
    values[[4, 20]] = -np.inf
    values[7] = np.nan
    rows = np.arange(40)
    finite = rows[np.isfinite(values)]
    wanted = finite[np.lexsort((finite, -values[finite]))][:count]
    for order in (rows, rows[::-1], np.random.default_rng(1).permutation(40)):
        greatest = Greatest(count)
        for start in range(0, 40, size):
            part = order[start : start + size]
            greatest.add(values[part], part)
        assert greatest.rows.tolist() == wanted.tolist()


def test_what_waits_is_sorted_now_and_then_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, with twins, against a whole sort."""
    monkeypatch.setattr("dataselect.resampling._WAITING", 4)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 60, 500).astype(np.float64)
    values[::17] = -np.inf
    greatest = Greatest(23)
    for part in np.array_split(rng.permutation(500), 40):
        greatest.add(values[part], part)
    there = np.flatnonzero(values > -np.inf)
    assert greatest.rows.tolist() == there[np.lexsort((there, -values[there]))][:23].tolist()
