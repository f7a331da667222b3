"""k-means: Lloyd's rounds, greedy k-means++, and what must not matter: blocks, threads, scale, twins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from dataselect import clustering
from dataselect.clustering import (
    Clusters,
    distances_to_own,
    kmeans,
    nearest_centroids,
    scale_to_length_one,
    smallest_of_each,
)
from distill.randomness import generator


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slow_kmeans(
    features: np.ndarray, first: list[int], rounds: int, *, spherical: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd row by row in float64, from the rows `first`; for data whose clusters never become empty."""
    centroids = features[first]
    labels = np.full(len(features), -1)
    for _ in range(rounds):
        costs = [[-row @ c if spherical else ((row - c) ** 2).sum() for c in centroids] for row in features]
        found = np.array([cost.index(min(cost)) for cost in costs])
        if (found == labels).all():
            break
        labels = found
        centroids = np.stack([features[labels == j].mean(axis=0) for j in range(len(first))])
        if spherical:
            centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    return labels, centroids


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (40, 1, 4), (60, 5, 7), (90, 33, 6)])
def test_equals_the_slow_rounds(n: int, d: int, k: int, seed: int, spherical: bool) -> None:
    if spherical and d == 1:
        pytest.skip("a line has two directions")
    features = normal(n, d, seed=seed)
    if spherical:
        scale_to_length_one(features)
    found = kmeans(features, k, seed=seed, iterations=30, spherical=spherical)
    first = clustering._first_rows(features, k, seed=seed).tolist()
    labels, centroids = slow_kmeans(features.double().numpy(), first, 30, spherical=spherical)
    assert found.labels.tolist() == labels.tolist()
    np.testing.assert_allclose(found.centroids.numpy(), centroids, atol=2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_is_as_good_as_scikit_learn_from_the_same_rows(seed: int) -> None:
    features = normal(800, 6, seed=seed)
    first = clustering._first_rows(features, 20, seed=seed)
    theirs = KMeans(20, init=features[first].numpy(), n_init=1, max_iter=200, tol=0.0).fit(features.numpy())
    mine = kmeans(features, 20, seed=seed, iterations=200)
    assert float(distances_to_own(features, mine).square().sum()) == pytest.approx(theirs.inertia_, rel=1e-4)
    assert (np.bincount(theirs.labels_, minlength=20) == mine.sizes.numpy()).mean() > 0.9


def test_more_rounds_never_make_it_worse() -> None:
    features = normal(300, 4, seed=0)
    sums = [
        float(distances_to_own(features, kmeans(features, 12, seed=1, iterations=rounds)).square().sum())
        for rounds in range(1, 12)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(sums))
    assert sums[-1] < 0.98 * sums[0]


@pytest.mark.parametrize("seed", range(5))
def test_clusters_far_apart_are_found(seed: int) -> None:
    """Greedy k-means++ begins with one row of each."""
    own = torch.arange(200) % 8
    features = 100 * torch.eye(8)[own] + normal(200, 8, seed=seed)
    labels = kmeans(features, 8, seed=seed, iterations=25).labels
    assert all(len(labels[own == number].unique()) == 1 for number in range(8))
    assert len(labels.unique()) == 8


# --- the first centroids


def slow_spread(features: np.ndarray, count: int, chance: torch.Generator) -> list[int]:
    """Greedy k-means++ on whole numbers, in Python's integers."""
    n, tries = len(features), 2 + int(np.log(count))
    square = [[int(((a - b) ** 2).sum()) for a in features] for b in features]
    drawn = [int(torch.randint(n, (1,), generator=chance))]
    while len(drawn) < count:
        gaps = [min(square[at][row] for at in drawn) for row in range(n)]
        if max(gaps) == 0:
            drawn.append(min(set(range(n)) - set(drawn)))
            continue
        scale = int(clustering._fixed_point(max(gaps), n))
        ends = np.cumsum([gap * scale for gap in gaps])
        shares = torch.rand(tries, dtype=torch.float64, generator=chance).tolist()
        at = [int(share * float(ends[-1])) for share in shares]
        places = [next(row for row in range(n) if ends[row] > each) for each in at]
        sums = [sum(min(gaps[row], square[place][row]) for row in range(n)) for place in places]
        drawn.append(places[sums.index(min(sums))])
    return drawn


@pytest.mark.parametrize("seed", range(6))
def test_the_first_rows_are_those_of_greedy_kmeans_plus_plus(seed: int) -> None:
    features = np.random.default_rng(seed).integers(-4, 5, size=(30, 2))
    found = clustering._first_rows(torch.from_numpy(features).float(), 12, seed=seed)
    assert found.tolist() == slow_spread(features, 12, generator(seed, "k-means++"))


def test_rows_are_drawn_in_proportion_to_their_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0])
    scale = clustering._fixed_point(4.0, 6)
    drawn = clustering._draws(weights, scale, 8000, torch.Generator().manual_seed(0))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[weights == 0].sum() == 0
    expected = weights[weights > 0] * 1000
    assert (
        float(((counts[weights > 0] - expected) ** 2 / expected).sum()) < 14
    )  # chi-square, 2 degrees: p = 0.001


def test_the_first_rows_of_many_are_sought_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clustering, "_SAMPLE", 50)
    monkeypatch.setattr(clustering, "_SAMPLE_PER_CLUSTER", 2)
    features = normal(500, 3, seed=0)
    few, many = (clustering._first_rows(features, count, seed=1).tolist() for count in (5, 100))
    assert len(set(few)) == 5 and len(set(many)) == 100
    assert max(few) >= 50, "the sample is no prefix"


# --- what must not matter


def settings() -> Iterator[tuple[int, int]]:
    yield from ((block, threads) for block in (1, 64, 1000, 1 << 22) for threads in (1, 2))


def test_neither_blocks_nor_threads_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features = normal(700, 9, seed=2)
    wanted = kmeans(features, 15, seed=3, iterations=10)
    for block, threads in settings():
        monkeypatch.setattr(clustering, "_BLOCK_NUMBERS", block)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = kmeans(features, 15, seed=3, iterations=10)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found.labels, wanted.labels)
        assert torch.equal(found.centroids, wanted.centroids), "to the bit"


@pytest.mark.parametrize("scale", [2.0**-50, 1e-3, 3e15])
def test_the_scale_of_features_does_not_matter(scale: float) -> None:
    features = normal(200, 5, seed=4)
    wanted, found = (kmeans(each, 9, seed=0, iterations=20) for each in (features, features * scale))
    assert (found.labels == wanted.labels).float().mean() > 0.99
    assert len(found.labels.unique()) == 9


def test_ties_go_to_the_lower_centroid() -> None:
    features = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    centroids = torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    assert nearest_centroids(features, centroids).tolist() == [1, 0, 0]


# --- features out of the ordinary


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_constant_features_still_fill_every_cluster(k: int, value: float, spherical: bool) -> None:
    features = scale_to_length_one(torch.full((8, 4), value))
    found = kmeans(features, k, seed=0, iterations=5, spherical=spherical)
    assert found.sizes.tolist().count(1) >= k - 1
    assert found.sizes.sum() == 8 and found.sizes.min() >= 1
    torch.testing.assert_close(found.centroids, features[:k])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [3, 5, 9, 20])
def test_with_fewer_points_than_clusters_none_is_empty(k: int, seed: int) -> None:
    """Five points, each four times, in rank-deficient features."""
    features = (normal(5, 2, seed=seed) @ normal(2, 11, seed=seed + 1)).repeat(4, 1)
    found = kmeans(features, k, seed=seed, iterations=25)
    assert found.sizes.min() >= 1 and found.sizes.sum() == 20
    if k >= 5:
        assert float(distances_to_own(features, found).max()) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_as_many_clusters_as_rows(seed: int) -> None:
    found = kmeans(normal(30, 4, seed=seed), 30, seed=seed, iterations=3)
    assert found.sizes.tolist() == [1] * 30


def test_an_empty_cluster_takes_the_farthest_row() -> None:
    """The third centroid serves nobody; row 4 is farthest from its own, and row 3, alone in its cluster, stays."""
    features = torch.tensor([[0.0], [1.0], [2.0], [50.0], [8.0]])
    centroids = torch.tensor([[1.0], [90.0], [-99.0]])
    labels = torch.tensor([0, 0, 0, 1, 0])
    assert clustering._filled(features, centroids, labels).tolist() == [0, 0, 0, 1, 2]


def test_rows_of_zeros_stay_zeros_at_length_one() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    scale_to_length_one(features)
    torch.testing.assert_close(features, torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]]))


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_of_each_cluster_is_the_lowest_of_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values, labels = rng.integers(0, 4, 40), rng.permutation(np.r_[np.arange(6), rng.integers(0, 6, 34)])
    wanted = [min(np.flatnonzero(labels == j), key=lambda row: (values[row], row)) for j in range(6)]
    found = smallest_of_each(torch.from_numpy(values).float(), torch.from_numpy(labels))
    assert found.tolist() == wanted


def test_members_are_the_rows_of_each_cluster() -> None:
    clusters = Clusters(torch.tensor([2, 0, 2, 1, 0]), torch.zeros(3, 1))
    assert [rows.tolist() for rows in clusters.members()] == [[1, 4], [3], [0, 2]]
    assert clusters.sizes.tolist() == [2, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("spherical", [False, True])
def test_gpu_clusters_as_the_cpu_does(spherical: bool) -> None:
    features = scale_to_length_one(normal(3000, 32, seed=0))
    on_cpu, on_gpu = (
        kmeans(each, 40, seed=0, iterations=10, spherical=spherical) for each in (features, features.cuda())
    )
    assert (on_gpu.labels.cpu() == on_cpu.labels).float().mean() > 0.999
    torch.testing.assert_close(on_gpu.centroids.cpu(), on_cpu.centroids, rtol=1e-3, atol=1e-3)
