"""The scale on which a number tells two sides apart by its size: what a score must be multiplied by to be a log ratio.

    min_{a, b}  -sum_i t_i ln p_i + (1 - t_i) ln(1 - p_i),   p_i = 1 / (1 + exp(-a - b s_i)),   0 <= b
    t_i = (M + 1) / (M + 2) for the target's M samples, 1 / (N + 2) for the source's N

of scores s that did not know their own samples (Platt, "Probabilistic Outputs for Support Vector Machines", 1999).
Then a + b s - ln(m / n), with m = sum_i t_i and n = N + M - m, is the log ratio of the densities of target and source
that is nearest in likelihood. That t_i are not 1 and 0 keeps it finite where scores tell the two apart without fail:
plain logistic regression has no optimum there, and would end wherever its tolerance let it. Elsewhere they change it by
O(1 / N + 1 / M).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

Scores = NDArray[np.float64]

_EXACT = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}


def calibrate(source: Scores, target: Scores, *, most: float | None = None) -> tuple[float, float]:
    """The intercept, less ln(m / n), and the slope: 0 and 0 of scores that are all alike.

    Args:
        source: float64 (N,).
        target: float64 (M,).
        most: of the slope.
    """
    spread = float(np.concatenate([source, target]).std())
    if spread == 0.0:
        return 0.0, 0.0
    rows = len(source) + len(target)
    sides = ((source, 1 / (len(source) + 2)), (target, 1 - 1 / (len(target) + 2)))
    stood = sum(len(scores) * side for scores, side in sides)  # m
    prior = float(np.log(stood / (rows - stood)))

    def loss(model: Scores) -> tuple[float, Scores]:
        """The mean log-loss and its gradient, at an intercept and a slope in units of 1 / spread."""
        value, gradient = 0.0, np.zeros(2)
        for scores, side in sides:
            logits = model[0] + model[1] * (scores / spread)
            value += float((np.logaddexp(0.0, logits) - side * logits).sum())
            errors = expit(logits) - side
            gradient += (errors.sum(), errors @ scores / spread)
        return value / rows, gradient / rows

    bounds = [(None, None), (0.0, None if most is None else most * spread)]
    found = minimize(loss, np.array([prior, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds, options=_EXACT)
    return float(found.x[0]) - prior, float(found.x[1]) / spread
