"""Matching pursuit: each turn against a slow one solved from scratch, weights against NNLS, and the updated factor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from dataselect.gradients import DenseGradients, FactoredGradients, GradientMatrix
from dataselect.matching_pursuit import Match, Support, matching_pursuit, raise_factor

SHAPES = [(1, 3), (12, 4), (30, 8), (25, 40), (40, 33)]


def best_weights(rows: np.ndarray, target: np.ndarray, ridge: float) -> np.ndarray:
    """argmin over w >= 0 of || rows^T w - target ||^2 + ridge ||w||^2."""
    system = np.concatenate([rows.T, np.sqrt(ridge) * np.eye(len(rows))])
    return nnls(system, np.concatenate([target, np.zeros(len(rows))]), maxiter=1000)[0]


def objective(rows: np.ndarray, weights: np.ndarray, target: np.ndarray, ridge: float) -> float:
    return float(((weights @ rows - target) ** 2).sum() + ridge * (weights**2).sum())


def slow_pursuit(
    rows: np.ndarray, target: np.ndarray, count: int, ridge: float
) -> tuple[list[int], np.ndarray]:
    """Correlations and NNLS from scratch at every turn; a row whose weight becomes 0 leaves."""
    support: list[int] = []
    weights = np.zeros(0)
    lengths = np.linalg.norm(rows, axis=1)
    while len(support) < count:
        residual = target - weights @ rows[support]
        scores = rows @ residual
        scores[support] = -np.inf
        scores[scores <= 1e-5 * np.linalg.norm(residual) * lengths] = -np.inf
        if np.linalg.norm(residual) <= 1e-7 * np.linalg.norm(target) or scores.max() == -np.inf:
            break
        support.append(int(scores.argmax()))
        weights = best_weights(rows[support], target, ridge)
        support = [row for row, weight in zip(support, weights, strict=True) if weight > 0]
        weights = weights[weights > 0]
    return support, weights


def matched(rows: np.ndarray, target: np.ndarray, count: int, ridge: float = 0.0) -> Match:
    gradients = DenseGradients(torch.from_numpy(rows).float())
    return matching_pursuit(gradients, torch.from_numpy(target), count, ridge=ridge)


def as_float32(rows: np.ndarray) -> np.ndarray:
    return rows.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("ridge", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_pursuit_solved_from_scratch(shape: tuple[int, int], seed: int, ridge: float) -> None:
    rng = np.random.default_rng(seed)
    rows = as_float32(rng.normal(size=shape) + 0.4 * rng.normal(size=shape[1]))
    target = rows.sum(axis=0)
    count = min(len(rows), 10)
    found = matched(rows, target, count, ridge)
    support, weights = slow_pursuit(rows, target, count, ridge)
    assert found.rows[: len(support)].tolist() == support
    np.testing.assert_allclose(found.weights[: len(support)], weights, rtol=1e-6, atol=1e-9)
    assert (found.weights[len(support) :] == 0).all()


def test_weights_do_leave_in_the_cases_above() -> None:
    """Otherwise the removal of rows would not be tested there: orthogonal pursuit takes other rows."""
    left = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        rows = as_float32(rng.normal(size=(40, 33)) + 0.4 * rng.normal(size=33))
        target = rows.sum(axis=0)
        picks: list[int] = []
        for _ in range(30):
            weights = np.linalg.lstsq(rows[picks].T, target, rcond=None)[0] if picks else np.zeros(0)
            scores = rows @ (target - weights @ rows[picks])
            scores[picks] = -np.inf
            picks.append(int(scores.argmax()))
        left += matched(rows, target, 30).rows.tolist() != picks
    assert left


@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_weights_are_the_optimum_on_their_rows_and_errors_are_those_of_the_objective(
    seed: int, ridge: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = as_float32(rng.normal(size=(60, 20)))
    target = rng.normal(size=20) * 5
    found = matched(rows, target, 12, ridge)
    wanted = best_weights(rows[found.rows], target, ridge)
    np.testing.assert_allclose(found.weights, wanted, rtol=1e-6, atol=1e-9)
    last = objective(rows[found.rows], found.weights, target, ridge)
    assert found.errors[-1] == pytest.approx(np.sqrt(last) / np.linalg.norm(target), rel=1e-9)
    # Nothing left at 0 would lower the objective: the condition of Karush, Kuhn and Tucker on the rows picked.
    slope = rows[found.rows] @ (target - found.weights @ rows[found.rows]) - ridge * found.weights
    assert (slope <= 1e-8 * np.linalg.norm(target)).all()


@pytest.mark.parametrize("ridge", [0.0, 0.2, 5.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_objective_falls_with_every_pick(seed: int, ridge: float) -> None:
    rows = np.random.default_rng(seed).normal(size=(50, 30))
    errors = matched(rows, rows.sum(axis=0), 50, ridge).errors
    assert (np.diff(errors) <= 1e-12).all()
    assert errors[0] < 1
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize("seed", range(5))
def test_all_rows_are_the_optimum_over_all_of_them(seed: int) -> None:
    """With budget = n the turns end at the non-negative least squares over everything."""
    rng = np.random.default_rng(seed)
    rows, target, ridge = as_float32(rng.normal(size=(15, 6))), rng.normal(size=6), 0.3
    found = matched(rows, target, 15, ridge)
    weights = np.zeros(15)
    weights[found.rows] = found.weights
    np.testing.assert_allclose(weights, best_weights(rows, target, ridge), atol=1e-8)
    assert sorted(found.rows.tolist()) == list(range(15))


def test_golden_picks() -> None:
    """Worked by hand: along t, then what is left of it; the row against it never has a weight."""
    rows = np.array([[0.0, 1.0], [2.0, 0.0], [-1.0, 0.0], [3.0, 0.0]])
    found = matched(rows, np.array([6.0, 2.0]), 3)
    assert found.rows.tolist() == [3, 0, 1]
    assert found.weights.tolist() == pytest.approx([2, 2, 0])
    assert found.errors.tolist() == pytest.approx([2 / np.sqrt(40), 0, 0])


def test_ties_go_to_the_lowest_row_and_duplicates_are_filled_in_without_weight() -> None:
    rng = np.random.default_rng(0)
    few = as_float32(rng.normal(size=(4, 37)))
    rows = np.tile(few, (3, 1))
    found = matched(rows, few.sum(axis=0), 12)
    assert sorted(found.rows[:4].tolist()) == list(range(4))
    assert found.rows[4:].tolist() == list(range(4, 12))
    np.testing.assert_allclose(found.weights[:4], 1, rtol=1e-6)
    assert (found.weights[4:] == 0).all()


def test_a_ridge_shares_the_weight_of_duplicates() -> None:
    rows = np.tile([[3.0, 4.0]], (5, 1))
    found = matched(rows, rows.sum(axis=0), 5, ridge=1.0)
    assert found.rows.tolist() == list(range(5))
    np.testing.assert_allclose(found.weights, 5 * 25 / (5 * 25 + 1))


def test_a_target_of_zero_and_rows_of_zero_take_the_lowest_rows_without_weight() -> None:
    for rows, target in (
        (np.ones((4, 3)), np.zeros(3)),
        (np.zeros((4, 3)), np.ones(3)),
        (np.zeros((4, 3)), np.zeros(3)),
    ):
        found = matched(rows, target, 3)
        assert found.rows.tolist() == [0, 1, 2]
        assert found.weights.tolist() == [0, 0, 0]
        assert found.errors.tolist() == [1.0 if target.any() else 0.0] * 3


def test_rows_against_the_target_come_last_in_the_order_of_their_correlation() -> None:
    rows = np.array([[-3.0, 0.0], [-1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    found = matched(rows, np.array([1.0, 1.0]), 4)
    assert found.rows.tolist() == [2, 0, 1, 3], "nothing is left to correlate with: the lowest row"
    away = matched(rows[[0, 1, 3]], np.array([1.0, 0.0]), 3)
    assert away.rows.tolist() == [1, 2, 0]
    assert not away.weights.any()


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_units_do_not_matter(scale: float) -> None:
    rows = np.random.default_rng(2).normal(size=(40, 12))
    plain = matched(rows, rows.sum(axis=0), 10, ridge=0.5)
    scaled = matched(rows * scale, rows.sum(axis=0) * scale, 10, ridge=0.5 * scale**2)
    assert scaled.rows.tolist() == plain.rows.tolist()
    np.testing.assert_allclose(scaled.weights, plain.weights, rtol=1e-4)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_the_block_size_does_not_matter(block: int) -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(13, width, generator=generator).repeat(4, 1) for width in (5, 9))
    whole, parts = (FactoredGradients(left, right, block=size) for size in (4096, block))
    for ridge in (0.0, 0.5):
        wanted = matching_pursuit(whole, whole.total(), 30, ridge=ridge)
        found = matching_pursuit(parts, parts.total(), 30, ridge=ridge)
        assert found.rows.tolist() == wanted.rows.tolist()
        np.testing.assert_allclose(found.weights, wanted.weights, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_factors_are_as_good_as_flat_gradients(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(40, 4, generator=generator), torch.randn(40, 7, generator=generator)
    factored, dense = (
        FactoredGradients(left, right),
        DenseGradients((left[:, :, None] * right[:, None]).flatten(1)),
    )
    a = matching_pursuit(factored, factored.total(), 15, ridge=0.1)
    b = matching_pursuit(dense, dense.total(), 15, ridge=0.1)
    assert a.rows.tolist() == b.rows.tolist()
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-4)


# --- the factor


@pytest.mark.parametrize("seed", range(4))
def test_the_factor_follows_rows_that_come_and_leave(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, ridge = rng.normal(size=(14, 9)), 0.2
    support = Support(14, ridge)
    for row in range(14):
        products = rows[support.rows] @ rows[row]
        assert support.add(row, products, float(rows[row] @ rows[row]), 1.0)
        if row % 3 == 2:
            support.remove(int(rng.integers(len(support))))
        own = rows[support.rows]
        np.testing.assert_allclose(
            support.factor @ support.factor.T, own @ own.T + ridge * np.eye(len(own)), atol=1e-12
        )
        assert (np.triu(support.factor, 1) == 0).all()
    assert len(support) == 10


def test_a_row_in_the_span_of_others_is_not_added() -> None:
    support = Support(3, 0.0)
    rows = np.array([[1.0, 2.0, 3.0], [0.0, 1.0, 1.0], [2.0, 5.0, 7.0]])
    added = [
        support.add(row, rows[support.rows] @ rows[row], float(rows[row] @ rows[row]), 1.0)
        for row in range(3)
    ]
    assert added == [True, True, False]
    assert support.rows == [0, 1]


@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_raised_factor_is_that_of_the_sum(size: int) -> None:
    rng = np.random.default_rng(size)
    square = rng.normal(size=(size, size))
    matrix, column = square @ square.T + np.eye(size), rng.normal(size=size)
    factor = np.linalg.cholesky(matrix).astype(np.float64)
    raise_factor(factor, column.copy())
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrix + np.outer(column, column)), atol=1e-12)


# --- gradients


@pytest.mark.parametrize("block", [1, 3, 100])
def test_products_of_factors_are_those_of_the_outer_products(block: int) -> None:
    generator = torch.Generator().manual_seed(4)
    left, right = torch.randn(10, 3, generator=generator), torch.randn(10, 5, generator=generator)
    flat = (left[:, :, None] * right[:, None]).flatten(1).double()
    rows, others, weights = (
        torch.tensor([3, 9, 3]),
        torch.tensor([0, 4]),
        torch.rand(3, generator=generator).double(),
    )
    each: GradientMatrix
    for each in (FactoredGradients(left, right, block=block), DenseGradients(flat.float(), block=block)):
        direction = torch.randn(15, generator=generator, dtype=torch.float64).view(each.shape)
        wanted = flat @ direction.flatten()
        torch.testing.assert_close(each.products(direction), wanted, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(each.products(direction.float()), wanted.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(each.products(direction, rows), wanted[rows], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            each.between(rows, others), flat[rows] @ flat[others].T, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(
            each.combined(rows, weights).flatten(), weights @ flat[rows], rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(each.total().flatten(), flat.sum(dim=0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(each.squares().double(), flat.square().sum(dim=1), rtol=1e-5, atol=1e-6)
        assert each.squares().dtype == torch.float32 and len(each) == 10


@pytest.mark.gpu
@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_gpu_picks_what_the_cpu_picks(ridge: float) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(500, 10, generator=generator), torch.rand(500, 33, generator=generator)
    on_cpu, on_gpu = FactoredGradients(left, right), FactoredGradients(left.cuda(), right.cuda())
    a = matching_pursuit(on_cpu, on_cpu.total(), 60, ridge=ridge)
    b = matching_pursuit(on_gpu, on_gpu.total(), 60, ridge=ridge)
    assert a.rows.tolist() == b.rows.tolist()
    np.testing.assert_allclose(a.weights, b.weights, rtol=1e-5, atol=1e-8)
