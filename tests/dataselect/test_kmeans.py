"""kmeans: one sample of each cluster, the one that its option asks for, in a defined order and with its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dataselect import kmeans as module
from dataselect.clustering import kmeans
from dataselect.kmeans import KMeans, medoids
from distill.contracts import Context, Source


def selector(**options: Any) -> KMeans:
    return KMeans(KMeans.Config.model_validate({"ipc": 1, "features": "pixels", **options}))


def normal(n: int, d: int, *, seed: int) -> Tensor:
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return features - features.mean(dim=0)


def slow_pick(features: np.ndarray, labels: np.ndarray, keep: str) -> list[int]:
    """Of each cluster, the largest first, the row with the smallest cost, by the definitions in float64."""
    picks = []
    for number in range(labels.max() + 1):
        members = np.flatnonzero(labels == number)
        centroid = features[members].mean(axis=0)
        costs: list[Any] = [
            np.linalg.norm(features[row] - centroid)
            if keep == "nearest"
            else sum(np.linalg.norm(features[row] - features[other]) for other in members)
            for row in members
        ]
        picks.append((-len(members), int(members[int(np.argmin(np.round(costs, 5)))])))
    return [row for _, row in sorted(picks)]


@pytest.mark.parametrize("keep", ["nearest", "medoid"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "d", "k"), [(1, 3, 1), (30, 2, 5), (50, 8, 50), (60, 17, 4)])
def test_equals_the_slow_pick(n: int, d: int, k: int, seed: int, keep: str) -> None:
    features = normal(n, d, seed=seed)
    rows, scores, weights = selector(keep=keep).pick(features, k, seed=seed)
    labels = kmeans(features, k, seed=seed, iterations=25).labels.numpy()
    values = features.double().numpy()
    assert rows.tolist() == slow_pick(values, labels, keep)
    centroids = np.stack([values[labels == labels[row]].mean(axis=0) for row in rows])
    np.testing.assert_allclose(scores, np.linalg.norm(values[rows] - centroids, axis=1), atol=1e-5)
    assert weights is None


@pytest.mark.parametrize("keep", ["nearest", "medoid"])
def test_weights_are_the_sizes_of_clusters(keep: str) -> None:
    features = normal(80, 5, seed=1)
    rows, _, weights = selector(keep=keep, weights="clusters").pick(features, 9, seed=2)
    assert weights is not None
    labels = kmeans(features, 9, seed=2, iterations=25).labels
    assert weights.tolist() == [int((labels == labels[row]).sum()) for row in rows]
    assert weights.sum() == 80
    assert weights.tolist() == sorted(weights.tolist(), reverse=True)


def test_golden_ranking() -> None:
    """Three groups on a line, worked by hand: the mean of the largest, 0.75, is near 1; its median is at 0."""
    line = torch.tensor([100.0, -0.5, 0.0, 0.0, 1.0, 3.25, 50.0, 51.0, 101.0, 49.0])[:, None]
    nearest = selector(weights="clusters").pick(line, 3, seed=0)
    medoid = selector(weights="clusters", keep="medoid").pick(line, 3, seed=0)
    assert nearest.rows.tolist() == [4, 6, 0] and medoid.rows.tolist() == [2, 6, 0]
    assert nearest.scores.tolist() == pytest.approx([0.25, 0, 0.5])
    assert medoid.scores.tolist() == pytest.approx([0.75, 0, 0.5])
    assert nearest.weights is not None and nearest.weights.tolist() == [5, 3, 2]


def test_a_medoid_is_not_drawn_to_an_outlier() -> None:
    line = torch.tensor([0.0, 1.0, 2.0, 3.0, 40.0])[:, None]
    assert selector(keep="medoid").pick(line, 1, seed=0).rows.tolist() == [2]
    assert selector(keep="nearest").pick(line, 1, seed=0).rows.tolist() == [3]


@pytest.mark.parametrize("keep", ["nearest", "medoid"])
def test_constant_features_and_twins_give_no_row_twice(keep: str) -> None:
    constant = selector(keep=keep).pick(torch.zeros(7, 3), 4, seed=0)
    assert len(set(constant.rows.tolist())) == 4 and constant.scores.tolist() == [0.0] * 4
    twins = normal(5, 6, seed=3).repeat(3, 1)
    for count in (5, 8, 15):
        rows = selector(keep=keep).pick(twins, count, seed=1).rows.tolist()
        assert len(set(rows)) == count
        assert {row % 5 for row in rows} == set(range(5)), "every point is there"
    assert sorted(selector(keep=keep).pick(twins, 5, seed=1).rows.tolist()) == list(range(5)), (
        "of twins the lowest"
    )


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features = normal(120, 7, seed=5)
    clusters = kmeans(features, 4, seed=0, iterations=25)
    wanted = medoids(features, clusters)
    for size in (1, 100, 1000):
        monkeypatch.setattr(module, "_BLOCK_NUMBERS", size)
        assert torch.equal(medoids(features, clusters), wanted)


@pytest.mark.parametrize("per_class", [True, False])
def test_per_class_and_over_all(
    per_class: bool, make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    """Each class gets its share, or the clusters of all compete; weights of all classes are in one unit."""
    source = make_source((6, 12, 18))
    options = {"ipc": None, "count": 6, "per_class": per_class, "weights": "clusters", "iterations": 50}
    found = selector(**options).run(make_context(), source, None)
    assert len(found.indices) == 6
    assert found.weights.sum() == pytest.approx(6)
    labels = source.train.labels.numpy()[found.indices]
    if per_class:
        assert np.bincount(labels).tolist() == [1, 2, 3]
        shares = np.bincount(labels, weights=found.weights)
        np.testing.assert_allclose(shares / shares.sum(), np.array([6, 12, 18]) / 36, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", ["nearest", "medoid"])
def test_gpu_picks_what_the_cpu_picks(keep: str) -> None:
    features = normal(500, 16, seed=0)
    method = selector(keep=keep)
    on_cpu, on_gpu = (method.pick(each, 20, seed=0) for each in (features, features.cuda()))
    assert on_gpu.rows.cpu().tolist() == on_cpu.rows.tolist()
    torch.testing.assert_close(on_gpu.scores.cpu(), on_cpu.scores, rtol=1e-4, atol=1e-4)
