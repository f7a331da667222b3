"""SemDeDup: the largest cosine to an earlier row of a cluster, and what epsilon or a budget keeps by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataselect import semdedup
from dataselect.clustering import kmeans, scale_to_length_one
from dataselect.semdedup import SemDeDup, nearest_earlier
from distill.contracts import Context, Selection, Source


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twins_of(features: Tensor, *, clusters: int = 1, seed: int = 0, hard: bool = True) -> Tensor:
    return nearest_earlier(features.clone(), clusters=clusters, seed=seed, iterations=25, hard=hard)


def slow_twins(features: Tensor, *, clusters: int, seed: int, hard: bool) -> np.ndarray:
    """The pseudocode of the paper in float64: sort by cosine to the centroid, then the largest before each."""
    unit = scale_to_length_one(features.clone())
    found = kmeans(unit, clusters, seed=seed, iterations=25, spherical=True)
    values, labels = unit.double().numpy(), found.labels.numpy()
    twins = np.full(len(values), -1.0)
    for number in range(clusters):
        members = np.flatnonzero(labels == number)
        near = values[members] @ values[members].mean(axis=0)
        order = members[np.argsort(near if hard else -near, kind="stable")]
        for place, row in enumerate(order[1:], start=1):
            twins[row] = max(values[order[:place]] @ values[row])
    return twins


@pytest.mark.parametrize("hard", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "d", "clusters"), [(1, 3, 1), (40, 5, 1), (60, 33, 4), (30, 2, 30)])
def test_equals_the_pseudocode_of_the_paper(n: int, d: int, clusters: int, seed: int, hard: bool) -> None:
    features = normal(n, d, seed=seed) + 0.5
    found = twins_of(features, clusters=clusters, seed=seed, hard=hard)
    wanted = slow_twins(features, clusters=clusters, seed=seed, hard=hard)
    np.testing.assert_allclose(found.numpy(), wanted, atol=2e-6)
    assert (found == -1).sum() == clusters, "the first of each cluster has none before it"


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features = normal(150, 6, seed=1)
    wanted = twins_of(features, clusters=2)
    for size in (1, 7, 64):
        monkeypatch.setattr(semdedup, "_BLOCK", size)
        assert torch.equal(twins_of(features, clusters=2), wanted)


def test_golden_order() -> None:
    """Angles on the circle, worked by hand. The centroid is at 0 degrees: 60 and -60 are hard, 0 and 2 easy."""
    angles = torch.tensor([0.0, 60.0, -60.0, 2.0, -2.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    cos = lambda degrees: float(np.cos(np.deg2rad(degrees)))  # noqa: E731
    hard = [cos(2), -1, cos(120), cos(58), cos(4)]  # order 1, 2, 3, 4, 0
    assert twins_of(features).tolist() == pytest.approx(hard, abs=2e-6)
    easy = [-1, cos(58), cos(58), cos(2), cos(2)]  # order 0, 3, 4, 1, 2
    assert twins_of(features, hard=False).tolist() == pytest.approx(easy, abs=2e-6)


def test_of_exact_duplicates_the_lowest_row_stays_whatever_their_length() -> None:
    """Twelve points, three times each, at other lengths: the cosine does not see it."""
    features = torch.cat([normal(12, 37, seed=2) * scale for scale in (1.0, 3.0, 0.01)])
    found = twins_of(features, clusters=3)
    assert (found[12:] == 1).all()
    assert (found[:12] < 0.999).all()


def test_of_a_chain_the_first_alone_is_kept() -> None:
    """Each is a near twin of the next; as in the paper, dropped samples drop others."""
    angles = (torch.arange(8) * 5.0).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    found = twins_of(features)
    epsilon = 1 - float(np.cos(np.deg2rad(5.5)))
    # From both ends to the middle: of the far ends each begins a chain of its own.
    assert (found <= 1 - epsilon).nonzero()[:, 0].tolist() == [0, 7]


def test_rows_of_zeros_are_twins_of_each_other_alone() -> None:
    features = normal(9, 4, seed=3)
    features[[2, 5, 8]] = 0
    for clusters in (1, 3):
        found = twins_of(features, clusters=clusters)
        assert found[2] <= 0 and found[[5, 8]].tolist() == [1.0, 1.0]


def test_constant_features_are_all_twins_but_one() -> None:
    for features in (torch.ones(6, 3), torch.zeros(6, 3)):
        found = twins_of(features)
        assert found[0] <= 0 and found[1:].tolist() == [1.0] * 5


# --- the method


def run(source: Source, context: Context, **options: Any) -> Selection:
    return SemDeDup(SemDeDup.Config.model_validate({"features": "pixels", **options})).run(
        context, source, None
    )


def doubled(make_source: Callable[..., Source]) -> Source:
    """Three classes of ten images, the last five of each those of the first five."""
    source = make_source((10, 10, 10))
    for number in range(3):
        rows = (source.train.labels == number).nonzero()[:, 0]
        source.train.images[rows[5:]] = source.train.images[rows[:5]]
    return source


@pytest.mark.parametrize("per_class", [True, False])
@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_epsilon_alone_drops_the_planted_duplicates(
    make_source: Callable[..., Source], make_context: Callable[..., Context], keep: str, per_class: bool
) -> None:
    source = doubled(make_source)
    found = run(source, make_context(), epsilon=1e-4, per_class=per_class, keep=keep)
    labels = source.train.labels.numpy()
    first = np.concatenate([np.flatnonzero(labels == number)[:5] for number in range(3)])
    assert sorted(found.indices) == sorted(first)
    assert found.meta["score"] == SemDeDup.score


@pytest.mark.parametrize("count", [1, 7, 23, 30])
def test_a_budget_is_what_its_epsilon_would_keep(
    source: Source, make_source: Callable[..., Source], make_context: Callable[..., Context], count: int
) -> None:
    source = make_source((10, 10, 10))
    exact = run(source, make_context(), count=count, per_class=False)
    assert len(exact.indices) == count
    assert (np.diff(exact.scores) >= 0).all()
    if count > 1:
        epsilon = 1 - float(exact.scores.max()) - 1e-7
        again = run(source, make_context(), epsilon=epsilon, per_class=False)
        assert again.indices.tolist() == exact.indices.tolist()


def test_with_epsilon_a_budget_is_the_most(source: Source, make_context: Callable[..., Context]) -> None:
    free = run(source, make_context(), epsilon=0.1, per_class=False)
    assert 4 < len(free.indices) < 24
    capped = run(source, make_context(), epsilon=0.1, count=4, per_class=False)
    assert capped.indices.tolist() == free.indices[:4].tolist()
    roomy = run(source, make_context(), epsilon=0.1, count=24, per_class=False)
    assert roomy.indices.tolist() == free.indices.tolist()


def test_smaller_clusters_compare_less(source: Source, make_context: Callable[..., Context]) -> None:
    kept = [
        len(run(source, make_context(), epsilon=0.2, per_class=False, cluster_size=size).indices)
        for size in (1000, 4, 1)
    ]
    assert kept[0] <= kept[1] <= kept[2] == 24


def test_a_size_must_come_from_somewhere() -> None:
    with pytest.raises(ValidationError, match="exactly one of ipc, fraction and count"):
        SemDeDup.Config.model_validate({})
    assert SemDeDup.Config.model_validate({"epsilon": 0.1}).finds_size
    assert not SemDeDup.Config.model_validate({"ipc": 1}).finds_size


@pytest.mark.gpu
def test_gpu_finds_what_the_cpu_finds() -> None:
    features = normal(600, 32, seed=0) + 0.3
    on_cpu = twins_of(features, clusters=3)
    torch.testing.assert_close(twins_of(features.cuda(), clusters=3).cpu(), on_cpu, atol=3e-6, rtol=0)
