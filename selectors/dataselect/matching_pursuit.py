"""Matching pursuit with weights of at least 0: few rows whose weighted sum is near a given vector.

    min over w >= 0 with |w|_0 <= k of  E(w) = || sum_i w_i g_i - t ||^2 + ridge ||w||^2

Each turn takes the row with the largest correlation <g_i, residual>, and then the best weights of all rows taken so
far. With weights of any sign this is orthogonal matching pursuit; kept at 0 and above it is NNOMP (Nguyen, Idier,
Soussen and Djermoune, "Non-Negative Orthogonal Greedy Algorithms", IEEE Transactions on Signal Processing 2019): the
active set method for non-negative least squares of Lawson and Hanson (1974, chapter 23), ended when k rows have a
weight. A row whose weight would become negative leaves and may come back, so that E falls with every turn and the
weights are the optimum on their rows, where clipping them at 0, or one NNLS at the end, gives neither.

The Cholesky factor of  G_S G_S^T + ridge I  is updated by a row: O(k^2) operations a turn, 8 k^2 bytes; solving from
scratch takes O(k^3) a turn. The correlations of a turn are computed from the residual: one pass over the gradients, and
no N x k matrix.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from torch import Tensor

from dataselect.gradients import GradientMatrix, in_levels

Numbers = NDArray[np.float64]

# Correlations in float32 are off by less than this share of ||g_i|| ||residual||, and one below it is none.
_ROUNDING = 1e-5
# Those in float64 that differ by less than this share are equal.
_EQUAL = 1e-12
# A row that is at most this share of its squared length away from the span of others is in it.
_INDEPENDENT = 1e-10
# A residual of this share of the target's length is none.
_MATCHED = 1e-7
# The least share of E by which a turn must lower it.
_FALL = 1e-12


class Match(NamedTuple):
    """What was picked from N rows.

    Attributes:
        rows: int64 (k,), in the order picked.
        weights: float64 (k,), 0 or more: the optimum on these rows.
        errors: float64 (k,), root of E after each pick as a share of the target's length; it falls.
    """

    rows: NDArray[np.int64]
    weights: Numbers
    errors: Numbers


def matching_pursuit(gradients: GradientMatrix, target: Tensor, count: int, *, ridge: float = 0.0) -> Match:
    """Pick `count` rows, and their weights.

    Where fewer rows are the optimum over all (the target is matched, or no other row has a positive correlation with
    the residual), the others are those with the largest correlations, with weight 0. Ties go to the lowest row.

    Args:
        gradients: N of them.
        target: t, a direction of theirs, float64.
        count: k, at most N.
        ridge: in units of a squared length of a gradient.
    """
    lengths = gradients.squares().sqrt()  # (N,)
    length = float(torch.linalg.vector_norm(target))
    support = Support(count, ridge)
    residual, error = target, length**2
    barred: list[int] = []  # rows in the span of the support
    while len(support) < count:
        row = _most_correlated(
            gradients, residual, lengths, [*support.rows, *barred], least=_MATCHED * length
        )
        if row is None:
            break
        before = len(support)
        if not _enter(support, gradients, target, row):
            barred.append(row)
            continue
        if len(support) <= before:
            barred.clear()  # others left: what was in their span may be outside now
        residual = target - _combined(gradients, support)
        last, error = error, _objective(residual, support.weights, ridge)
        support.note(error)
        if not error < last * (1 - _FALL):
            break
    rows = _filled(support.rows, gradients.products(residual), length * float(lengths.max()), count)
    padding = (0, count - len(support))
    errors = np.pad(support.errors, padding, constant_values=error)
    return Match(rows, np.pad(support.weights, padding), np.sqrt(errors) / (length or 1.0))


class Support:
    """The rows with a weight, their best weights, and the Cholesky factor of their products.

    Args:
        capacity: rows at most.
        ridge: added to the diagonal.
    """

    def __init__(self, capacity: int, ridge: float) -> None:
        self.ridge = ridge
        self.rows: list[int] = []
        self.weights: Numbers = np.zeros(0)
        self.errors: Numbers = np.zeros(0)  # E when each came
        self._wanted: Numbers = np.zeros(0)  # <g_i, t>
        self._factor: Numbers = np.zeros((capacity, capacity), order="F")  # columns are updated

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def factor(self) -> Numbers:
        """L, lower triangular, with  L L^T = G_S G_S^T + ridge I."""
        return self._factor[: len(self), : len(self)]

    def add(self, row: int, products: Numbers, square: float, wanted: float) -> bool:
        """Add a row with weight 0; False, and nothing is done, where it is in the span of the others.

        Args:
            products: <g_row, g_j> with the rows there are.
            square: ||g_row||^2.
            wanted: <g_row, t>.
        """
        size, diagonal = len(self), square + self.ridge
        column = solve_triangular(self.factor, products, lower=True) if size else products
        pivot = diagonal - float(column @ column)
        if pivot <= _INDEPENDENT * diagonal:
            return False
        self._factor[size, :size] = column
        self._factor[size, size] = math.sqrt(pivot)
        self.rows.append(row)
        self.weights = np.append(self.weights, 0.0)
        self.errors = np.append(self.errors, np.nan)
        self._wanted = np.append(self._wanted, wanted)
        return True

    def remove(self, place: int) -> None:
        """Remove the row at a place: the factor of those behind it takes its column up."""
        size = len(self)
        column = self._factor[place + 1 : size, place].copy()
        kept = [*range(place), *range(place + 1, size)]
        self._factor[: size - 1, : size - 1] = self._factor[np.ix_(kept, kept)]
        raise_factor(self._factor[place : size - 1, place : size - 1], column)
        del self.rows[place]
        self.weights, self.errors, self._wanted = (
            np.delete(each, place) for each in (self.weights, self.errors, self._wanted)
        )

    def settle(self) -> None:
        """Find the best weights of at least 0; rows on the way to which a weight reaches 0 leave."""
        while len(self):
            wanted = self._unconstrained()
            falling = np.flatnonzero(wanted <= 0)
            if not len(falling):
                self.weights = wanted
                return
            have = self.weights[falling]
            steps = have / np.maximum(have - wanted[falling], np.finfo(np.float64).tiny)
            first = int(falling[np.argmin(steps)])
            self.weights = np.maximum(self.weights + steps.min() * (wanted - self.weights), 0.0)
            self.remove(first)

    def note(self, error: float) -> None:
        """Note E for the row that came last."""
        self.errors[-1] = error

    def _unconstrained(self) -> Numbers:
        half = solve_triangular(self.factor, self._wanted, lower=True)
        return solve_triangular(self.factor, half, lower=True, trans="T")


def raise_factor(factor: Numbers, column: Numbers) -> None:
    """Turn L into the lower triangular factor of  L L^T + column column^T,  in place and in O(k^2) operations.

    Golub and Van Loan, "Matrix Computations", section 6.5.4.
    """
    for place in range(len(column)):
        diagonal, entry = factor[place, place], column[place]
        longer = math.hypot(diagonal, entry)
        cosine, sine = longer / diagonal, entry / diagonal
        factor[place, place] = longer
        below = factor[place + 1 :, place]
        below += sine * column[place + 1 :]
        below /= cosine
        column[place + 1 :] = cosine * column[place + 1 :] - sine * below


def _enter(support: Support, gradients: GradientMatrix, target: Tensor, row: int) -> bool:
    """Let a row in, and find the weights; False where it can have none."""
    numbers = torch.tensor([row, *support.rows], device=gradients.device)
    square, *products = gradients.between(numbers[:1], numbers)[0].tolist()
    one = torch.ones(1, dtype=torch.float64, device=gradients.device)
    wanted = float((gradients.combined(numbers[:1], one) * target).sum())
    if not support.add(row, np.array(products), square, wanted):
        return False
    support.settle()
    return bool(support.rows) and support.rows[-1] == row


def _combined(gradients: GradientMatrix, support: Support) -> Tensor:
    """sum of the support's rows with their weights, float64."""
    rows = torch.tensor(support.rows, device=gradients.device)
    return gradients.combined(rows, torch.from_numpy(support.weights).to(gradients.device))


def _objective(residual: Tensor, weights: Numbers, ridge: float) -> float:
    """E."""
    return float(residual.square().sum()) + ridge * float(weights @ weights)


def _most_correlated(
    gradients: GradientMatrix, residual: Tensor, lengths: Tensor, out: list[int], *, least: float
) -> int | None:
    """The row not in `out` with the largest correlation; None where none is positive or nothing is left to match.

    Found in float32; those that its rounding may have put in a wrong order are compared in float64.
    """
    size = float(torch.linalg.vector_norm(residual))
    if size <= least:
        return None
    scores = gradients.products(residual.float())
    rounding = _ROUNDING * size * lengths
    scores[scores <= rounding] = -torch.inf
    scores[out] = -torch.inf
    lowest = (scores - rounding).max()
    if lowest == -torch.inf:
        return None
    rows = (scores + rounding >= lowest).nonzero()[:, 0]
    exact = gradients.products(residual, rows)
    return int(rows[_first_greatest(exact, _EQUAL * size * float(lengths.max()))])


def _first_greatest(values: Tensor, slack: float) -> int:
    """The lowest place of those at most `slack` below the greatest value.

    Equal gradients give values that rounding tells apart, otherwise in blocks of another size or on another device.
    """
    return int((values >= values.max() - slack).nonzero()[0, 0])


def _filled(rows: list[int], correlations: Tensor, scale: float, count: int) -> NDArray[np.int64]:
    """`rows`, and others up to `count`: those with the largest correlations, the lowest first where they are equal."""
    levels = in_levels(correlations, scale)
    levels[rows] = -torch.inf
    others = torch.argsort(levels, descending=True, stable=True)[: count - len(rows)]
    return np.array([*rows, *others.tolist()], dtype=np.int64)
