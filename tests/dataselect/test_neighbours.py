"""k nearest neighbours: equal to all distances sorted, to the bit, whatever the block size and the road taken."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from dataselect import neighbours
from dataselect.neighbours import nearest_neighbours


def brute_force(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Every distance from the differences, sorted; the sort keeps equal ones by row number."""
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(torch.inf)
    order = distances.argsort(dim=1, stable=True)[:, : min(k, len(features) - 1)]
    return distances.gather(1, order), order


def slow_neighbours(features: np.ndarray, k: int) -> list[list[int]]:
    """The definition: the other rows by distance, then by number."""

    def square(a: int, b: int) -> float:
        return float(((features[a] - features[b]) ** 2).sum())

    rows = range(len(features))
    return [sorted((b for b in rows if b != a), key=lambda b: (square(a, b), b))[:k] for a in rows]


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0], wanted[0])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that were measured against all others, by call."""
    counts: list[int] = []
    measure = neighbours._measured

    def counting(features: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        counts.append(len(rows))
        return measure(features, rows, k)

    monkeypatch.setattr(neighbours, "_measured", counting)
    return counts


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (6, 2), (30, 1), (200, 7), (300, 90)])
def test_equals_brute_force_to_the_bit(shape: tuple[int, int], k: int, seed: int) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    found = nearest_neighbours(features, k)
    assert found[0].shape == found[1].shape == (shape[0], min(k, shape[0] - 1))
    assert_same(found, brute_force(features, k))


@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_float64(seed: int) -> None:
    features = torch.randn(80, 20, generator=torch.Generator().manual_seed(seed))
    distances, numbers = nearest_neighbours(features, 4)
    exact = features.double().numpy()
    wanted = np.linalg.norm(exact[:, None] - exact[numbers.numpy()], axis=2)
    np.testing.assert_allclose(distances.numpy(), wanted, rtol=1e-6)
    assert numbers.tolist() == slow_neighbours(exact, 4)


@settings(max_examples=80)
@given(
    features=arrays.arrays(
        np.int8, st.tuples(st.integers(1, 40), st.integers(1, 3)), elements=st.integers(-2, 2)
    ),
    k=st.integers(1, 12),
)
def test_ties_go_to_the_lowest_row(features: np.ndarray, k: int) -> None:
    """On whole numbers every tie is exact, and most rows have duplicates."""
    exact = features.astype(np.float64)
    _, numbers = nearest_neighbours(torch.from_numpy(exact).float(), k)
    assert numbers.tolist() == slow_neighbours(exact, k)


@pytest.mark.parametrize("copies", [2, 9, 60])
def test_duplicates_of_wide_features_are_exactly_as_near_as_their_twins(
    copies: int, measured: list[int]
) -> None:
    """More twins than are measured at first make every row go the long way."""
    features = torch.randn(5, 37, generator=torch.Generator().manual_seed(0)).mul(3).repeat(copies, 1)
    found = nearest_neighbours(features, 5)
    assert_same(found, brute_force(features, 5))
    assert not found[0][:, : copies - 1].any()
    assert sum(measured) == (5 * copies if copies == 60 else 0)


def test_constant_features_are_near_in_order() -> None:
    distances, numbers = nearest_neighbours(torch.full((40, 3), 7.0), 3)
    assert not distances.any()
    assert numbers[:5].tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2]]


def test_spread_rows_go_the_short_way_alone(measured: list[int]) -> None:
    nearest_neighbours(torch.randn(500, 64, generator=torch.Generator().manual_seed(0)), 5)
    assert not measured


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_rounding_of_the_short_way_never_shows(offset: float, measured: list[int]) -> None:
    """Far from the origin inner products lose the distances; then the rows are measured."""
    features = torch.randn(150, 20, generator=torch.Generator().manual_seed(0)) + offset
    assert_same(nearest_neighbours(features, 5), brute_force(features, 5))
    assert sum(measured) > 100


def test_one_row_far_away_keeps_no_other_from_the_short_way(measured: list[int]) -> None:
    features = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    features[17] *= 1e4
    assert_same(nearest_neighbours(features, 5), brute_force(features, 5))
    assert sum(measured) <= 1


@pytest.mark.parametrize("block_bytes", [1, 30_000, 200_000])
@pytest.mark.parametrize("twins", [1, 30])
def test_the_block_size_does_not_matter(block_bytes: int, twins: int) -> None:
    features = torch.randn(300 // twins, 25, generator=torch.Generator().manual_seed(1)).repeat(twins, 1)
    assert_same(nearest_neighbours(features, 6, block_bytes=block_bytes), nearest_neighbours(features, 6))


@pytest.mark.parametrize("shape", [(4000, 3), (60, 5000)])
def test_blocks_keep_within_their_bytes(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither all pairs nor the features of all that are measured are there at once."""
    block_bytes, seen = 2_000_000, []
    ranked = neighbours._ranked

    def looking(features: Tensor, squares: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        seen.append(len(rows))
        return ranked(features, squares, rows, k)

    monkeypatch.setattr(neighbours, "_ranked", looking)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    nearest_neighbours(features, 5, block_bytes=block_bytes)
    assert sum(seen) == shape[0] and len(seen) > 1
    assert 4 * max(seen) * (shape[0] + 13 * shape[1]) <= block_bytes


@pytest.mark.gpu
def test_gpu_finds_what_the_cpu_finds() -> None:
    features = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    features[100:150] = features[0]
    on_cpu, on_gpu = nearest_neighbours(features, 7), nearest_neighbours(features.cuda(), 7)
    assert on_gpu[1].cpu().tolist() == on_cpu[1].tolist()
    torch.testing.assert_close(on_gpu[0].cpu(), on_cpu[0])
