"""Greedy: lazily what the naive loop does, ties and costs and a beginning too; at random near it, by the seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dataselect import greedy as under_test
from dataselect.facility import FacilityLocation
from dataselect.greedy import Costs, lazy_greedy, stochastic_greedy
from dataselect.similarity import similarity_of


class Coverage:
    """f(S) = weight of what the sets of S cover: submodular, monotone, and exact on whole numbers.

    Args:
        covered: bool (N, M), which of M things each candidate covers.
        weights: float64 (M,).

    Attributes:
        tells: whether it knows how far gains fall.
    """

    def __init__(self, covered: Tensor, weights: Tensor) -> None:
        self.covered, self.weights = covered, weights
        self.evaluations = 0
        self.batch = 16
        self.tells = False
        self.clear()

    def bounds(self) -> Tensor:
        return self.covered.double() @ self.weights

    def gains(self, rows: Tensor) -> Tensor:
        self.evaluations += len(rows)
        return (self.covered[rows] & ~self.done).double() @ self.weights

    def add(self, row: int) -> Tensor | None:
        new = self.covered[row] & ~self.done
        self.done = self.done | new
        return (self.covered & new).double() @ self.weights if self.tells else None

    def clear(self) -> None:
        self.done = torch.zeros(self.covered.shape[1], dtype=torch.bool)

    def value(self, rows: tuple[int, ...] | list[int]) -> float:
        return float(self.weights[self.covered[list(rows)].any(dim=0)].sum())


def coverage(n: int, things: int, seed: int, *, share: float = 0.25) -> Coverage:
    generator = torch.Generator().manual_seed(seed)
    covered = torch.rand(n, things, generator=generator) < share
    return Coverage(covered, torch.randint(1, 5, (things,), generator=generator).double())


def naive(objective: Coverage, count: int, initial: list[int] | None = None) -> tuple[list[int], list[float]]:
    """Greedy by its definition: every candidate's gain, every time; the first of the greatest."""
    rows, gains = [], []
    for turn in range(count):
        values = [
            -math.inf if row in rows else objective.value([*rows, row]) - objective.value(rows)
            for row in range(len(objective.covered))
        ]
        row = initial[turn] if initial and turn < len(initial) else values.index(max(values))
        gains.append(objective.value([*rows, row]) - objective.value(rows))
        rows.append(row)
    return rows, gains


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("n", "things", "count"), [(1, 3, 1), (12, 5, 12), (40, 40, 20), (90, 30, 30)])
def test_lazy_is_naive_with_its_ties(n: int, things: int, count: int, seed: int) -> None:
    """Few things with small weights: most gains are tied, and many are 0."""
    objective = coverage(n, things, seed)
    found = lazy_greedy(objective, count)
    rows, gains = naive(coverage(n, things, seed), count)
    assert found.rows.tolist() == rows
    assert found.gains.tolist() == gains


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 7, 64, 1000])
def test_batches_and_what_is_known_do_not_matter(
    batch: int, tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [lazy_greedy(coverage(150, 60, seed), 40) for seed in range(5)]
    monkeypatch.setattr(under_test, "_LARGEST_BATCH", max(batch, 4))
    for seed, each in enumerate(wanted):
        objective = coverage(150, 60, seed)
        objective.batch, objective.tells = batch, tells
        found = lazy_greedy(objective, 40)
        assert found.rows.tolist() == each.rows.tolist()
        assert found.gains.tolist() == each.gains.tolist()


def test_gains_that_are_known_to_fall_save_evaluations() -> None:
    objective = coverage(2000, 3000, 0)
    objective.batch, objective.tells = 1, True
    lazy_greedy(objective, 50)
    assert objective.evaluations <= 2 * 50


def test_bounds_that_are_loose_do_not_matter() -> None:
    objective = coverage(80, 40, 3)
    wanted = lazy_greedy(coverage(80, 40, 3), 20)
    exact = objective.bounds
    objective.bounds = lambda: exact() * 1.5 + 1  # type: ignore[method-assign]
    assert lazy_greedy(objective, 20).rows.tolist() == wanted.rows.tolist()


def test_lazy_evaluates_far_fewer_than_naive() -> None:
    objective = coverage(2000, 3000, 0)
    lazy_greedy(objective, 50)
    assert objective.evaluations < 50 * 2000 / 4


def test_when_nothing_gains_any_more_a_pick_costs_one_batch() -> None:
    objective = coverage(2000, 5, 0)
    found = lazy_greedy(objective, 500)
    assert float(found.gains[50:].sum()) == 0
    assert found.rows[50:].tolist() == sorted(found.rows[50:].tolist()), "the lowest rows first"
    assert objective.evaluations < 4000 + 500 * 2 * objective.batch


@pytest.mark.parametrize("seed", range(8))
def test_a_beginning_is_kept_and_counts(seed: int) -> None:
    beginning = torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:5]
    rows, gains = naive(coverage(40, 60, seed), 12, beginning.tolist())
    found = lazy_greedy(coverage(40, 60, seed), 12, initial=beginning)
    assert found.rows.tolist() == rows and found.rows[:5].tolist() == beginning.tolist()
    assert found.gains.tolist() == gains
    assert lazy_greedy(coverage(40, 60, seed), 5, initial=beginning).rows.tolist() == beginning.tolist()
    drawn = stochastic(coverage(40, 60, seed), 12, initial=beginning)
    assert drawn.rows[:5].tolist() == beginning.tolist() and len(drawn.rows.unique()) == 12


# --- costs


def naive_costly(objective: Coverage, costs: np.ndarray, limit: float, *, ratio: bool) -> list[int]:
    rows: list[int] = []
    while True:
        left = limit - costs[rows].sum()
        able = [row for row in range(len(costs)) if row not in rows and costs[row] <= left]
        if not able:
            return rows
        gains = [objective.value([*rows, row]) - objective.value(rows) for row in able]
        keys = [gain / costs[row] if ratio else gain for gain, row in zip(gains, able, strict=True)]
        rows.append(able[keys.index(max(keys))])


def priced(n: int, seed: int) -> np.ndarray:
    """Powers of two, with which ratios are exact and tied."""
    return 2.0 ** np.random.default_rng(seed).integers(-1, 3, size=n)


@pytest.mark.parametrize("seed", range(15))
def test_costs_the_better_of_two_rules(seed: int) -> None:
    costs, limit = priced(30, seed), 7.5
    objective = coverage(30, 50, seed)
    both = [naive_costly(objective, costs, limit, ratio=ratio) for ratio in (True, False)]
    values = [objective.value(rows) for rows in both]
    objective.clear()
    objective.tells = bool(seed % 2)
    found = lazy_greedy(objective, 30, costs=Costs(torch.from_numpy(costs), limit))
    assert found.rows.tolist() == both[values.index(max(values))]
    assert float(found.gains.sum()) == pytest.approx(max(values))
    assert costs[found.rows.numpy()].sum() <= limit


def test_either_rule_alone_can_be_bad() -> None:
    """A cheap candidate of the best ratio shuts out a dear one that is all; many cheap ones beat the dearest."""
    dear = Coverage(torch.tensor([[True, False], [False, True]]), torch.tensor([2.0, 100.0]).double())
    found = lazy_greedy(dear, 2, costs=Costs(torch.tensor([0.01, 10.0]).double(), 10.0))
    assert found.rows.tolist() == [1]
    cheap = Coverage(torch.eye(5, dtype=torch.bool), torch.tensor([5.0, 4.0, 4.0, 4.0, 4.0]).double())
    found = lazy_greedy(cheap, 5, costs=Costs(torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0]).double(), 4.0))
    assert found.rows.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("seed", range(10))
def test_costs_keep_their_guarantee(seed: int) -> None:
    costs, limit = priced(10, seed), 6.0
    objective = coverage(10, 25, seed)
    best = max(
        objective.value(rows)
        for size in range(11)
        for rows in combinations(range(10), size)
        if costs[list(rows)].sum() <= limit
    )
    found = lazy_greedy(coverage(10, 25, seed), 10, costs=Costs(torch.from_numpy(costs), limit))
    assert float(found.gains.sum()) >= (1 - 1 / math.e) / 2 * best


@pytest.mark.parametrize("seed", range(5))
def test_equal_costs_are_a_count(seed: int) -> None:
    costs = Costs(torch.full((50,), 2.0, dtype=torch.float64), 15.0)
    found = lazy_greedy(coverage(50, 40, seed), 50, costs=costs)
    assert found.rows.tolist() == lazy_greedy(coverage(50, 40, seed), 7).rows.tolist()


def test_a_count_beside_costs_is_the_most_and_a_beginning_is_paid() -> None:
    costs = Costs(torch.ones(50, dtype=torch.float64), 10.0)
    assert len(lazy_greedy(coverage(50, 40, 0), 4, costs=costs).rows) == 4
    begun = lazy_greedy(coverage(50, 40, 0), 50, initial=torch.tensor([9, 8]), costs=costs)
    assert begun.rows[:2].tolist() == [9, 8] and len(begun.rows) == 10


# --- stochastic


def stochastic(
    objective: Coverage, count: int, *, epsilon: float = 0.1, seed: int = 0, initial: Tensor | None = None
) -> under_test.Picked:
    return stochastic_greedy(
        objective,
        count,
        size=len(objective.covered),
        epsilon=epsilon,
        generator=torch.Generator().manual_seed(seed),
        initial=initial,
    )


def test_stochastic_goes_by_its_seed() -> None:
    found = [stochastic(coverage(300, 400, 0), 20, seed=seed).rows.tolist() for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]


@given(n=st.integers(1, 40), data=st.data())
def test_stochastic_picks_nothing_twice(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n))
    objective = coverage(n, 10, n)
    found = stochastic(objective, count, seed=count)
    assert len(found.rows.unique()) == count
    assert float(found.gains.sum()) == objective.value(found.rows.tolist())


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5])
def test_stochastic_evaluates_no_more_than_its_rule_allows(epsilon: float) -> None:
    objective = coverage(1000, 500, 0)
    stochastic(objective, 40, epsilon=epsilon)
    drawn = math.ceil(1000 / 40 * math.log(1 / epsilon))
    assert 10 * drawn < objective.evaluations <= 40 * (drawn + under_test._REMEMBERED)


def test_stochastic_that_draws_all_is_greedy() -> None:
    for seed in range(5):
        found = stochastic(coverage(60, 80, seed), 20, epsilon=1e-300)
        assert found.rows.tolist() == lazy_greedy(coverage(60, 80, seed), 20).rows.tolist()


def test_stochastic_is_nearer_to_greedy_with_a_smaller_epsilon() -> None:
    objective = coverage(500, 1000, 0, share=0.01)
    greedy = float(lazy_greedy(objective, 15).gains.sum())

    def mean_value(epsilon: float) -> float:
        values = []
        for seed in range(20):
            objective.clear()
            values.append(float(stochastic(objective, 15, epsilon=epsilon, seed=seed).gains.sum()))
        return float(np.mean(values)) / greedy

    values = [mean_value(epsilon) for epsilon in (0.9, 0.3, 0.01)]
    assert values[0] < 0.85 < values[1] < values[2] <= 1
    assert values[2] > 0.97


def test_with_few_candidates_left_stochastic_still_finds_some() -> None:
    found = stochastic(coverage(25, 30, 0), 25, epsilon=0.9)
    assert sorted(found.rows.tolist()) == list(range(25))


@pytest.mark.parametrize("pick", [lazy_greedy, stochastic])
def test_gains_of_a_monotone_function_add_up(pick: Callable[..., under_test.Picked]) -> None:
    objective = coverage(100, 80, 1)
    found = pick(objective, 30)
    values = [objective.value(found.rows[:size].tolist()) for size in range(31)]
    np.testing.assert_allclose(found.gains.numpy(), np.diff(values))


def test_a_limit_that_holds_exactly_is_not_lost_to_rounding() -> None:
    """0.3 - 0.1 - 0.1 is less than 0.1 in floating point, and three times 0.1 more than 0.3."""
    for each, limit, picks in ((0.1, 0.3, 3), (0.1, 0.6, 6), (0.1, 0.29, 2), (1 / 3, 1.0, 3)):
        features = torch.eye(8)
        objective = FacilityLocation(similarity_of(features, "cosine"))
        costs = Costs(torch.full((8,), each, dtype=torch.float64), limit)
        assert len(lazy_greedy(objective, 8, costs=costs).rows) == picks, (each, limit)


def test_every_pick_is_told() -> None:
    told: list[None] = []
    lazy_greedy(coverage(50, 20, 0), 7, advance=lambda: told.append(None))
    assert len(told) == 7
    stochastic_greedy(
        coverage(50, 20, 0),
        5,
        size=50,
        epsilon=0.1,
        generator=torch.Generator(),
        advance=lambda: told.append(None),
    )
    assert len(told) == 12
