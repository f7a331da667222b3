"""CRAIG: distances from factors, picks and weights against the definition, and the bound that gives it its worth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dataselect.craig import Craig, FactoredDistance, GradientDistance, craig
from distill.contracts import Context, Source
from distill.errors import RecipeErrors
from distill.recipe import make_recipe

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 2, "batch_size": 16}}


def factors(
    count: int, *, classes: int = 4, width: int = 6, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(count, classes, generator=generator)
    return left, torch.rand(count, width, generator=generator) + 0.5


def flat(left: torch.Tensor, right: torch.Tensor) -> np.ndarray:
    """float64 (N, C (D + 1)): the outer products."""
    return (left.double()[:, :, None] * right.double()[:, None]).flatten(1).numpy()


def distances(gradients: np.ndarray) -> np.ndarray:
    return np.sqrt(((gradients[:, None] - gradients[None]) ** 2).sum(axis=2))


def slow_sums(apart: np.ndarray, picks: list[int]) -> np.ndarray:
    """(N,): the sum over all of the distance to the nearest of the picks and row j; inf where j is picked already."""
    sums = [apart[:, [*picks, row]].min(axis=1).sum() for row in range(len(apart))]
    return np.where(np.isin(np.arange(len(apart)), picks), np.inf, sums)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 12, 40])
def test_every_pick_is_the_best_by_the_slow_definition(count: int, seed: int) -> None:
    """Two that are each other's nearest are as good as each other, but for rounding: sums are compared, not rows."""
    left, right = factors(count, seed=seed)
    keep, gradients = min(count, 7), flat(left, right)
    apart = distances(gradients)
    dense = GradientDistance(torch.from_numpy(gradients).float())
    for similarity in (FactoredDistance(left, right), dense):
        rows, means, weights = craig(similarity, keep)
        picks = rows.tolist()
        for turn, pick in enumerate(picks):
            sums = slow_sums(apart, picks[:turn])
            assert sums[pick] <= sums.min() + 1e-5 * sums[pick]
            assert float(means[turn]) == pytest.approx(sums[pick] / count, rel=1e-4, abs=1e-5)
        sizes = np.bincount(apart[:, picks].argmin(axis=1), minlength=keep)
        assert weights is not None and weights.tolist() == sizes.tolist()


@pytest.mark.parametrize("keep", [1, 5, 30])
@pytest.mark.parametrize("seed", range(3))
def test_weights_count_samples_and_the_bound_holds(keep: int, seed: int) -> None:
    """Not one more each, as in DeepCore; the error of the weighted sum is at most the sum of the distances."""
    left, right = factors(60, seed=seed)
    gradients = flat(left, right)
    rows, means, weights = craig(FactoredDistance(left, right), keep)
    assert weights is not None and int(weights.sum()) == 60
    nearest = distances(gradients)[:, rows.numpy()]
    assert weights.tolist() == np.bincount(nearest.argmin(axis=1), minlength=keep).tolist()
    error = np.linalg.norm(gradients.sum(axis=0) - weights.numpy() @ gradients[rows.numpy()])
    bound = nearest.min(axis=1).sum()
    assert error <= bound
    assert 60 * float(means[-1]) == pytest.approx(bound, rel=2e-3)
    more = np.linalg.norm(gradients.sum(axis=0) - (weights.numpy() + 1) @ gradients[rows.numpy()])
    assert more != pytest.approx(error, rel=1e-3)


def test_the_mean_distance_falls_to_nothing() -> None:
    left, right = factors(50)
    rows, means, weights = craig(FactoredDistance(left, right), 50)
    assert sorted(rows.tolist()) == list(range(50))
    assert (np.diff(means.numpy()) <= 1e-6).all()
    assert float(means[-1]) < 1e-6 * float(means[0])
    assert weights is not None and weights.tolist() == [1] * 50


def test_golden_picks() -> None:
    """On a line, by hand: the middle of the larger group, the other group, then the far end."""
    places = torch.tensor([0.0, 1.0, 2.0, 50.0, 52.0, -6.0])
    rows, means, weights = craig(FactoredDistance(places[:, None], torch.ones(6, 1)), 3)
    assert rows.tolist() == [1, 3, 5]
    assert means.tolist() == pytest.approx([109 / 6, 11 / 6, 4 / 6], rel=1e-3)
    assert weights is not None and weights.tolist() == [3, 2, 1]


def test_duplicates_come_last_and_are_assigned_to_the_first_that_was_picked() -> None:
    left, right = (part.repeat(3, 1) for part in factors(4))
    rows, _, weights = craig(FactoredDistance(left, right), 12)
    assert sorted(rows[:4].tolist()) == list(range(4))
    assert rows[4:].tolist() == list(range(4, 12))
    assert weights is not None and weights.tolist() == [3] * 4 + [0] * 8
    dense = craig(GradientDistance(torch.from_numpy(flat(left, right)).float()), 12)
    assert dense.rows.tolist() == rows.tolist()


def test_gradients_of_zero_are_picked_in_order() -> None:
    rows, means, weights = craig(FactoredDistance(torch.zeros(5, 2), torch.ones(5, 3)), 3)
    assert rows.tolist() == [0, 1, 2]
    assert means.tolist() == [0, 0, 0]
    assert weights is not None and weights.tolist() == [5, 0, 0]


@pytest.mark.parametrize("seed", range(3))
def test_distances_from_factors_are_those_of_the_flat_gradients(seed: int) -> None:
    left, right = factors(40, seed=seed)
    near = FactoredDistance(left, right)
    apart = distances(flat(left, right))
    greatest = 2 * np.linalg.norm(flat(left, right), axis=1).max()
    rows = torch.tensor([3, 0, 39])
    block = near.block(rows, slice(5, 25))
    np.testing.assert_allclose(block, greatest - apart[rows.numpy(), 5:25], rtol=1e-4)
    np.testing.assert_allclose(
        near.between(rows, torch.tensor([1, 7])), (greatest - apart[rows.numpy()])[:, [1, 7]], rtol=1e-4
    )
    out = torch.empty(3, 20)
    assert near.block(rows, slice(5, 25), out=out) is out
    np.testing.assert_allclose(out, block)
    assert (near.block(slice(0, 40), slice(0, 40)).shape, near.device.type) == ((40, 40), "cpu")
    np.testing.assert_allclose(near.own(), greatest, rtol=1e-5)
    dense = GradientDistance(torch.from_numpy(flat(left, right)).float())
    np.testing.assert_allclose(dense.block(rows, slice(5, 25)), block, rtol=1e-4)


@pytest.mark.parametrize("matrix_bytes", [0, 1 << 12, 1 << 20])
def test_what_is_kept_does_not_matter(matrix_bytes: int) -> None:
    near = FactoredDistance(*factors(150, seed=2))
    wanted, found = craig(near, 40), craig(near, 40, matrix_bytes=matrix_bytes)
    for a, b in zip(wanted, found, strict=True):
        assert a is not None and b is not None and a.tolist() == b.tolist()


@pytest.mark.parametrize("features", ["last_layer", "gradients"])
def test_weights_of_a_run_are_cluster_sizes_of_each_class(
    features: str, make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    source, context = make_source((10, 6, 14)), make_context()
    options = {"ipc": 2, "features": features, "network": NETWORK}
    found = Craig(Craig.Config.model_validate(options)).run(context, source, None)
    sizes = found.weights.reshape(3, 2).sum(axis=1)
    np.testing.assert_allclose(sizes / sizes.sum(), np.array([10, 6, 14]) / 30, rtol=1e-5)
    assert (np.diff(found.scores.reshape(3, 2), axis=1) <= 0).all()


def test_classes_have_no_say_without_per_class(source: Source, make_context: Callable[..., Context]) -> None:
    config = Craig.Config.model_validate({"count": 5, "per_class": False, "network": NETWORK})
    found = Craig(config).run(make_context(), source, None)
    assert len(found.indices) == 5
    np.testing.assert_allclose(found.weights * 24 / 5, np.round(found.weights * 24 / 5), atol=1e-4)
    assert (np.diff(found.scores) <= 0).all()


def test_other_features_than_gradients_are_refused() -> None:
    with pytest.raises(RecipeErrors) as caught:
        make_recipe({"data": {"name": "digits"}, "steps": [{"craig": {"ipc": 2, "features": "pixels"}}]})
    assert "last_layer" in str(caught.value)


@pytest.mark.gpu
def test_gpu_picks_what_the_cpu_picks() -> None:
    left, right = factors(500, classes=10, width=33)
    a, b = craig(FactoredDistance(left, right), 50), craig(FactoredDistance(left.cuda(), right.cuda()), 50)
    assert a.rows.tolist() == b.rows.cpu().tolist()
    assert a.weights is not None and b.weights is not None and a.weights.tolist() == b.weights.cpu().tolist()
    torch.testing.assert_close(a.scores, b.scores.cpu(), rtol=1e-4, atol=1e-4)
