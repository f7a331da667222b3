"""Importance weights of documents: how much likelier the target makes their n-grams than the corpus does.

    log w(x) = sum_b c_b(x) (ln(p_b + 1e-8) - ln(q_b + 1e-8))

with c(x) the counts of x's hashed n-grams, q the corpus's shares of all counts and p the target's,
(counts + s) / (total + s B) with smoothing s (Xie, Santurkar, Ma and Liang, "Data Selection for Language Models via
Importance Resampling", NeurIPS 2023, section 3). The sum grows with a document's length, so that long documents have
weights far from 1 on either side; divided by the number of n-grams it is a mean.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

_LEAST = 1e-8  # what the paper's code adds to every share

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
    return float(target[there] @ (np.log(target[there] + _LEAST) - np.log(other[there] + _LEAST)))


class EffectiveSize:
    """(sum w)^2 / sum w^2 of weights that come in blocks of logarithms: so many equal ones are as uncertain."""

    def __init__(self) -> None:
        self._greatest = -np.inf
        self._sum = 0.0
        self._squares = 0.0

    def add(self, log_weights: Model) -> None:
        """Take a block in; -inf is a weight of 0."""
        greatest = max(self._greatest, float(log_weights.max(initial=-np.inf)))
        if greatest == -np.inf:
            return
        scale = np.exp(self._greatest - greatest)
        weights = np.exp(log_weights - greatest)
        self._sum = self._sum * scale + float(weights.sum())
        self._squares = self._squares * scale**2 + float(weights @ weights)
        self._greatest = greatest

    @property
    def log_sum(self) -> float:
        """Logarithm of the sum of the weights."""
        return self._greatest + float(np.log(self._sum)) if self._sum else -np.inf

    def most(self, count: int) -> float:
        """Logarithm of sqrt(m) times the mean of m weights, above which truncation leaves none.

        (Ionides, "Truncated Importance Sampling", Journal of Computational and Graphical Statistics, 2008.)
        """
        return self.log_sum - math.log(max(count, 1)) / 2  # the mean times sqrt(m) is the sum over sqrt(m)

    @property
    def size(self) -> float:
        return self._sum**2 / self._squares if self._squares else 0.0
