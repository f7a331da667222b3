"""Intervals against scipy and printed tables; DD-Ranking's scores against golden numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distill.errors import InputError
from distill.evaluation.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    interval95,
    label_robust_score,
)

fractions = st.floats(0, 1)


# Student's t at 0.975 from a printed table (any statistics textbook); values -1..1 have known deviation.
@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)])
def test_half_width_is_the_printed_t_times_standard_error(n: int, t: float) -> None:
    values = np.linspace(0, 1, n)
    mean, half = interval95(values.tolist())
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(
        t * values.std(ddof=1) / math.sqrt(n), rel=3e-4
    )  # the table has three decimals


@given(st.lists(fractions, min_size=2, max_size=12).filter(lambda values: np.std(values) > 1e-6))
def test_interval_equals_scipy(values: list[float]) -> None:
    mean, half = interval95(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_interval_of_equal_values_has_no_width() -> None:
    assert interval95([0.5, 0.5, 0.5]) == (0.5, 0.0)


def test_interval_covers_the_true_mean_95_times_in_100() -> None:
    draws = np.random.default_rng(0).normal(0.7, 0.02, size=(2000, 5))
    covered = [abs(mean - 0.7) <= half for mean, half in map(interval95, draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)  # 4 standard errors of a share over 2000


@pytest.mark.parametrize("values", [[], [0.5]])
def test_interval_of_fewer_than_two_values_is_refused(values: list[float]) -> None:
    with pytest.raises(InputError, match=f"found: {len(values)} value"):
        interval95(values)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_interval_of_values_that_are_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        interval95([0.5, bad])


def test_paired_interval_sees_through_noise_that_seeds_share() -> None:
    b = [0.60, 0.70, 0.80, 0.65]
    a = [value + 0.02 + step for value, step in zip(b, (0.001, -0.001, 0.0, 0.0), strict=True)]
    mean, half = interval95([x - y for x, y in zip(a, b, strict=True)])
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert mean > half


# real, set (hard = own) and random; alpha = 0.5 IOR - 0.5 HLR, and phi(alpha) worked out from the formula.
@pytest.mark.parametrize(
    ("real", "own", "random", "expected"),
    [
        (0.85, 0.60, 0.25, 0.29076),  # alpha 0.05
        (0.565, 0.50, 0.20, 0.32199),  # alpha 0.1175
        (1.0, 0.0, 1.0, 0.0),  # alpha -1, the worst
        (0.0, 1.0, 0.0, 1.0),  # alpha +1, the best
        (0.5, 0.5, 0.5, 0.26894),  # alpha 0: (1 - 1/e) / (e - 1/e)
    ],
)
def test_label_robust_score_golden(real: float, own: float, random: float, expected: float) -> None:
    score = label_robust_score(real_hard=real, set_hard=own, set_own=own, random_own=random)
    assert score == pytest.approx(expected, abs=1e-5)


def test_label_robust_score_weighs_its_two_questions() -> None:
    accuracies = {"real_hard": 0.9, "set_hard": 0.3, "set_own": 0.8, "random_own": 0.5}
    assert hard_label_recovery(0.9, 0.3) == pytest.approx(0.6)
    assert improvement_over_random(0.8, 0.5) == pytest.approx(0.3)
    only_gain = (math.exp(0.3) - math.exp(-1)) / (math.e - math.exp(-1))
    only_loss = (math.exp(-0.6) - math.exp(-1)) / (math.e - math.exp(-1))
    assert label_robust_score(**accuracies, weight=1.0) == pytest.approx(only_gain)
    assert label_robust_score(**accuracies, weight=0.0) == pytest.approx(only_loss)


def test_augmentation_robust_score_golden() -> None:
    accuracies = {"set_augmented": 0.6, "random_augmented": 0.4, "set_plain": 0.5, "random_plain": 0.5}
    assert augmentation_robust_score(**accuracies) == pytest.approx(0.31369, abs=1e-5)  # phi(0.1)
    assert augmentation_robust_score(**accuracies, weight=1.0) == pytest.approx(0.36314, abs=1e-5)  # phi(0.2)
    assert augmentation_robust_score(**accuracies, weight=0.0) == pytest.approx(0.26894, abs=1e-5)  # phi(0)


@given(fractions, fractions, fractions, fractions, fractions)
def test_scores_stay_in_the_unit_interval(a: float, b: float, c: float, d: float, w: float) -> None:
    lrs = label_robust_score(real_hard=a, set_hard=b, set_own=c, random_own=d, weight=w)
    ars = augmentation_robust_score(
        set_augmented=a, random_augmented=b, set_plain=c, random_plain=d, weight=w
    )
    assert -1e-12 <= lrs <= 1 + 1e-12
    assert -1e-12 <= ars <= 1 + 1e-12


@pytest.mark.parametrize("bad", [85.0, -0.1, math.nan])
def test_percentages_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="real_hard is not a fraction"):
        label_robust_score(real_hard=bad, set_hard=0.6, set_own=0.6, random_own=0.25)
    with pytest.raises(InputError, match="weight is not a fraction"):
        augmentation_robust_score(
            set_augmented=0.6, random_augmented=0.4, set_plain=0.5, random_plain=0.5, weight=bad
        )


def test_a_percentage_is_told_what_to_do() -> None:
    with pytest.raises(InputError, match="divide percentages by 100"):
        hard_label_recovery(85.0, 60.0)
