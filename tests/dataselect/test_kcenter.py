"""k-center: the greedy choice of the paper, its guarantee, and ties."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dataselect.kcenter import greedy_kcenter


def slow_kcenter(features: np.ndarray, count: int) -> tuple[list[int], list[float]]:
    """The definition, distance by distance: nearest to the mean, then always the farthest from those picked."""
    rows = range(len(features))

    def distance(a: int, b: int) -> float:
        return float(np.sqrt(((features[a] - features[b]) ** 2).sum()))

    to_mean = [float(np.sqrt((row**2).sum())) for row in features]
    picks = [to_mean.index(min(to_mean))]
    radii = [min(to_mean)]
    while len(picks) < count:
        gaps = [-1.0 if row in picks else min(distance(row, pick) for pick in picks) for row in rows]
        picks.append(gaps.index(max(gaps)))
        radii.append(max(gaps))
    return picks, radii


def radius(features: np.ndarray, picks: tuple[int, ...] | list[int]) -> float:
    """Distance of the worst served sample to its nearest pick."""
    gaps = np.linalg.norm(features[:, None] - features[list(picks)][None], axis=2)
    return float(gaps.min(axis=1).max())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1, 3), (30, 1), (25, 7), (40, 33)])
def test_equals_the_slow_loop(shape: tuple[int, int], seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=shape)
    features -= features.mean(axis=0)
    count = min(len(features), 20)
    picks, radii = greedy_kcenter(torch.from_numpy(features).float(), count)
    wanted, wanted_radii = slow_kcenter(features, count)
    assert picks.tolist() == wanted
    np.testing.assert_allclose(radii.numpy(), wanted_radii, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    half=arrays.arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.integers(-3, 3)),
    data=st.data(),
)
def test_ties_go_to_the_lowest_row_and_duplicates_come_last(half: np.ndarray, data: st.DataObject) -> None:
    """On whole numbers every tie is exact; x and -x together have the mean 0."""
    features = np.concatenate([half, -half]).astype(np.float64)
    count = data.draw(st.integers(1, len(features)))
    picks, radii = greedy_kcenter(torch.from_numpy(features).float(), count)
    wanted, wanted_radii = slow_kcenter(features, count)
    assert picks.tolist() == wanted
    np.testing.assert_allclose(radii.numpy(), wanted_radii, rtol=1e-6)


@pytest.mark.parametrize("seed", range(8))
def test_the_radius_is_at_most_twice_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(4, 11)), int(rng.integers(1, 5))
    features = rng.normal(size=(n, 2)) * (1 + 9 * (rng.random((n, 1)) < 0.2))
    features -= features.mean(axis=0)
    picks, _ = greedy_kcenter(torch.from_numpy(features).float(), k)
    optimum = min(radius(features, chosen) for chosen in combinations(range(n), k))
    assert radius(features, picks.tolist()) <= 2 * optimum + 1e-5


def test_golden_ranking() -> None:
    """Worked by hand: the middle, the far corner, the corner opposite, then what lies between."""
    points = torch.tensor(
        [[0.0, 0.0], [4.0, 3.0], [-4.0, -3.0], [-1.0, 1.0], [1.0, -1.0], [4.0, 2.0], [-4.0, -2.0]]
    )
    picks, radii = greedy_kcenter(points, 7)
    assert picks.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert radii.tolist() == pytest.approx([0, 5, 5, 2**0.5, 2**0.5, 1, 1])


@pytest.mark.parametrize("seed", range(3))
def test_duplicates_of_wide_features_are_exactly_as_near_as_their_twins(seed: int) -> None:
    """Rounding must not tell twins apart: 5 points, each four times, in 37 dimensions far from round numbers."""
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(5, 37, generator=generator) * 3).repeat(4, 1)
    features -= features.mean(dim=0)
    picks, radii = greedy_kcenter(features, 20)
    assert sorted(picks.tolist()) == list(range(20))
    assert sorted(picks[:5].tolist()) == list(range(5))
    assert radii[5:].tolist() == [0.0] * 15
    assert picks[5:].tolist() == list(range(5, 20))


def test_constant_features_are_picked_in_order() -> None:
    picks, radii = greedy_kcenter(torch.zeros(6, 3), 6)
    assert picks.tolist() == list(range(6))
    assert radii.tolist() == [0.0] * 6


@pytest.mark.gpu
def test_gpu_picks_what_the_cpu_picks() -> None:
    features = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    features -= features.mean(dim=0)
    on_cpu, on_gpu = greedy_kcenter(features, 50), greedy_kcenter(features.cuda(), 50)
    assert on_gpu[0].cpu().tolist() == on_cpu[0].tolist()
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1])
