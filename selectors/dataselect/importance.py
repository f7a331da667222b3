"""Importance weights of documents: how much likelier the target makes their n-grams than the corpus does.

    log w(x) = sum_b c_b(x) (ln(p_b + 1e-8) - ln(q_b + 1e-8))

with c(x) the counts of x's hashed n-grams, q the corpus's shares of all counts and p the target's,
(counts + s) / (total + s B) with smoothing s (Xie, Santurkar, Ma and Liang, "Data Selection for Language Models via
Importance Resampling", NeurIPS 2023, section 3). The sum grows with a document's length, so that long documents have
weights far from 1 on either side; divided by the number of n-grams it is a mean.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_LEAST = 1e-8  # what the paper's code adds to every share
_BLOCK = 1 << 16  # weights that are added up at once

Counts = NDArray[np.int64]
Model = NDArray[np.float64]


def shares(counts: Counts, *, smoothing: float = 0.0) -> Model:
    """Shares of the buckets, float64 (B,), with the sum 1.

    Args:
        counts: int64 (B,), not all 0 where there is no smoothing.
        smoothing: what is added to every count.
    """
    total = counts.sum() + smoothing * len(counts)
    assert total > 0, "an empty target and an empty corpus are refused before"
    return (counts + smoothing) / total


def log_ratio(target: Model, corpus: Model) -> Model:
    """ln(p + 1e-8) - ln(q + 1e-8) of shares p and q: float64 (B,)."""
    return np.log(target + _LEAST) - np.log(corpus + _LEAST)


def divergence(target: Model, other: Model) -> float:
    """KL(target || other) of shares in nats, each with 1e-8 more, over the buckets of the target."""
    there = target > 0
    logs = np.log(target[there] + _LEAST) - np.log(other[there] + _LEAST)
    return float((target[there] * logs).sum())  # a product of BLAS would hang on the number of threads


class EffectiveSize:
    """(sum w)^2 / sum w^2 of weights that come in blocks of logarithms: so many equal ones are as uncertain.

    They are added up in blocks of our own, so that the last digit does not tell how a corpus was cut.
    """

    def __init__(self) -> None:
        self._totals = _Totals()
        self._waiting = np.empty(0)

    def add(self, log_weights: Model) -> None:
        """Take a block in; -inf is a weight of 0."""
        waiting = np.concatenate([self._waiting, log_weights])
        whole = len(waiting) - len(waiting) % _BLOCK
        for start in range(0, whole, _BLOCK):
            self._totals = self._totals.with_block(waiting[start : start + _BLOCK])
        self._waiting = waiting[whole:].copy()

    @property
    def log_sum(self) -> float:
        """Logarithm of the sum of the weights."""
        totals = self._totals.with_block(self._waiting)
        return totals.greatest + float(np.log(totals.sum)) if totals.sum else -np.inf

    def most(self, count: int) -> float:
        """Logarithm of sqrt(m) times the mean of m weights, above which truncation leaves none.

        (Ionides, "Truncated Importance Sampling", Journal of Computational and Graphical Statistics, 2008.)
        """
        return self.log_sum - math.log(max(count, 1)) / 2  # the mean times sqrt(m) is the sum over sqrt(m)

    @property
    def size(self) -> float:
        totals = self._totals.with_block(self._waiting)
        return float(totals.sum**2 / totals.squares) if totals.squares else 0.0


class _Totals(NamedTuple):
    """Sums of weights and of their squares, in units of the greatest weight, which is kept as a logarithm."""

    greatest: float = -np.inf
    sum: float = 0.0
    squares: float = 0.0

    def with_block(self, log_weights: Model) -> _Totals:
        greatest = max(self.greatest, float(log_weights.max(initial=-np.inf)))
        if greatest == -np.inf:
            return self
        scale = float(np.exp(self.greatest - greatest))
        weights = np.exp(log_weights - greatest)
        return _Totals(
            greatest,
            self.sum * scale + float(weights.sum()),
            self.squares * scale**2 + float((weights * weights).sum()),
        )
