"""The scale of a score: a plain form's optimum, finite and settled where scores tell the sides apart without fail."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from dataselect import calibration
from dataselect.calibration import calibrate

Scores = NDArray[np.float64]


def normal(count: int, *, seed: int, mean: float = 0.0, spread: float = 1.0) -> Scores:
    return np.random.default_rng(seed).normal(mean, spread, count)


def weighted(source: Scores, target: Scores, *, shares: tuple[float, float]) -> tuple[float, float]:
    """scikit-learn's intercept and slope, every sample on both sides, by a share of the source's, of the target's."""
    scores = np.concatenate([source, target])
    own = np.repeat(shares, [len(source), len(target)])
    kept = (both := np.concatenate([own, 1 - own])) > 0
    rows, sides = np.tile(scores, 2)[:, None], np.repeat([1, 0], len(scores))
    found = LogisticRegression(C=1e12, solver="newton-cholesky", tol=1e-13, max_iter=10_000)
    found.fit(rows[kept], sides[kept], sample_weight=both[kept])
    stood = own.sum()
    prior = np.log(stood / (len(scores) - stood))
    return float(found.intercept_[0] - prior), float(found.coef_[0, 0])


def platts(source: Scores, target: Scores) -> tuple[float, float]:
    return 1 / (len(source) + 2), (len(target) + 1) / (len(target) + 2)


# Overlapping, unlike in number, told apart without fail, and in scores far from 0.
SIDES = [
    (normal(200, seed=0), normal(50, seed=1, mean=1.0)),
    (normal(12, seed=2), normal(900, seed=3, mean=0.5, spread=2.0)),
    (normal(400, seed=4, mean=-4.0), normal(100, seed=5, mean=4.0)),
    (normal(90, seed=6, mean=30.0), normal(30, seed=7, mean=31.0)),
]


@pytest.mark.parametrize("sides", SIDES)
def test_the_optimum_is_that_of_platts_targets(sides: tuple[Scores, Scores]) -> None:
    assert calibrate(*sides) == pytest.approx(weighted(*sides, shares=platts(*sides)), rel=1e-4, abs=1e-5)


def test_scores_that_tell_apart_without_fail_have_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain logistic regression has none: it ends where the optimiser's tolerance lets it."""
    source, target = SIDES[2]
    assert source.max() < target.min()
    slopes = []
    for tolerance in (1e-6, 1e-8, 1e-10, 1e-12):
        monkeypatch.setattr(calibration, "_EXACT", {"ftol": 0.0, "gtol": tolerance, "maxiter": 1000})
        slopes.append(calibrate(source, target)[1])
    assert max(slopes) < min(slopes) * 1.001
    assert max(slopes) < 2.0, (
        "the log ratio of N(4, 1) and N(-4, 1) has the slope 8; of what N and M can tell, less"
    )


def test_scores_of_two_values_have_the_log_odds_that_their_counts_can_tell() -> None:
    """The closed form: p = 1 / (N + 2) of the source's value, (M + 1) / (M + 2) of the target's."""
    shift, slope = calibrate(np.full(30, -1.0), np.full(10, 1.0))
    of_source, of_target = -np.log(31), np.log(11)
    assert slope == pytest.approx((of_target - of_source) / 2, rel=1e-5)
    stood = 30 / 32 + 10 * 11 / 12
    assert shift == pytest.approx((of_target + of_source) / 2 - np.log(stood / (40 - stood)), abs=1e-5)


@pytest.mark.parametrize("count", [100, 1000, 10_000])
def test_overlapping_scores_have_the_scale_of_the_plain_form_up_to_1_over_n(count: int) -> None:
    source, target = normal(count, seed=8, mean=-0.5), normal(count, seed=9, mean=0.5)
    found, plain = calibrate(source, target), weighted(source, target, shares=(0.0, 1.0))
    assert found == pytest.approx(plain, abs=10 / count)
    assert abs(found[1] - plain[1]) > 0.1 / count, "and is not it"


def test_the_slope_stays_within_its_bounds() -> None:
    source, target = SIDES[0]
    assert calibrate(target, source)[1] == 0.0, "scores that rank the wrong way say nothing"
    free = calibrate(source, target)[1]
    shift, slope = calibrate(source, target, most=free / 2)
    assert slope == free / 2
    logits = np.concatenate([source, target]) * slope + shift
    shares = np.repeat(platts(source, target), [200, 50])
    prior = np.log(shares.sum() / (250 - shares.sum()))
    assert float(expit(logits + prior).sum()) == pytest.approx(shares.sum(), rel=1e-6), (
        "the best intercept for it"
    )


def test_scores_that_are_all_alike_say_nothing() -> None:
    assert calibrate(np.full(9, 3.0), np.full(4, 3.0)) == (0.0, 0.0)
