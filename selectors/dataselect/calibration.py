"""The scale on which a number tells two sides apart by its size: what a score must be multiplied by to be a log ratio.

    min_{a, b}  sum_i ln(1 + exp(-y_i (a + b s_i))),   0 <= b,   y_i = 1 for the target's M, -1 for the source's N

of scores s that did not know their own samples (Platt, "Probabilistic Outputs for Support Vector Machines", 1999).
Then a + b s - ln(M / N) is the log ratio of the densities of target and source that is nearest in likelihood.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

Scores = NDArray[np.float64]


def calibrate(source: Scores, target: Scores, *, most: float | None = None) -> tuple[float, float]:
    """The intercept, less the logarithm of M / N, and the slope: 0 and 0 of scores that are all alike.

    Args:
        source: float64 (N,).
        target: float64 (M,).
        most: of the slope.
    """
    spread = float(np.concatenate([source, target]).std())
    if spread == 0.0:
        return 0.0, 0.0
    rows, prior = len(source) + len(target), float(np.log(len(target) / len(source)))

    def loss(model: Scores) -> tuple[float, Scores]:
        """The mean log-loss and its gradient, at an intercept and a slope in units of 1 / spread."""
        value, gradient = 0.0, np.zeros(2)
        for scores, side in ((source / spread, 0.0), (target / spread, 1.0)):
            logits = model[0] + model[1] * scores
            value += float(np.logaddexp(0.0, -logits if side else logits).sum())
            errors = expit(logits) - side
            gradient += (errors.sum(), errors @ scores)
        return value / rows, gradient / rows

    bounds = [(None, None), (0.0, None if most is None else most * spread)]
    exact = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    found = minimize(loss, np.array([prior, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds, options=exact)
    return float(found.x[0]) - prior, float(found.x[1]) / spread
