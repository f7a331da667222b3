"""Voters and their weights."""

from __future__ import annotations

from itertools import combinations

import pytest

from distill.recovery.voting import draw_voters, prior_weights, voices


def test_four_points_more_are_69_to_31() -> None:
    assert prior_weights([64.0, 60.0], temperature=5.0) == pytest.approx((0.69, 0.31), abs=0.001)
    assert prior_weights([56.4, 42.3, 52.5, 44.2, 40.6], temperature=10.0) == pytest.approx(
        (0.41, 0.10, 0.28, 0.12, 0.09), abs=0.01
    )


def test_one_image_a_class_is_judged_by_the_best() -> None:
    assert draw_voters(0, ipc=1, priors=[50.0, 70.0, 60.0], drawn=2, seed=0) == (1, 2)


def test_all_pairs_come_in_turn() -> None:
    priors = [0.0] * 5
    drawn = [draw_voters(number, ipc=20, priors=priors, drawn=2, seed=3) for number in range(20)]
    pairs = set(combinations(range(5), 2))
    assert set(drawn[:10]) == set(drawn[10:]) == pairs
    assert drawn[:10] != drawn[10:]
    assert drawn == [draw_voters(number, ipc=20, priors=priors, drawn=2, seed=3) for number in range(20)]


@pytest.mark.parametrize("voting", ["prior", "equal", "random"])
def test_voices_sum_to_one(voting: str) -> None:
    found = voices((0, 2), voting, priors=[60.0, 0.0, 64.0], temperature=5.0, number=4, seed=1)  # type: ignore[arg-type]
    assert [teacher for teacher, _ in found] == [0, 2]
    weights = [weight for _, weight in found]
    assert sum(weights) == pytest.approx(1) and min(weights) > 0
    if voting == "equal":
        assert weights == [0.5, 0.5]
    if voting == "prior":
        assert weights[1] == pytest.approx(0.69, abs=0.001)
    if voting == "random":
        again = voices((0, 2), "random", priors=[0.0] * 3, temperature=5.0, number=5, seed=1)
        assert [weight for _, weight in again] != weights
