"""Statistics of an evaluation: 95% intervals, paired differences, and the scores of DD-Ranking.

Accuracies are fractions in [0, 1] everywhere in this file.

Intervals are Student's t over seeds, `mean ± t(0.975, n - 1) * s / sqrt(n)`: seeds are few and independent.

DD-Ranking (Li et al., "DD-Ranking: Rethinking the Evaluation of Dataset Distillation", arXiv 2505.13300, and
its README) asks how much of a set's accuracy is due to its labels, and how much to its augmentation:

    HLR = acc(real, hard) - acc(set, hard)
    IOR = acc(set, own labels) - acc(random subset of the same size, own labels)
    LRS = phi(w * IOR - (1 - w) * HLR)
    ARS = phi(g * (acc(set, aug) - acc(random, aug)) + (1 - g) * (acc(set, plain) - acc(random, plain)))
    phi(x) = (e^x - e^-1) / (e - e^-1)

phi maps [-1, 1] to [0, 1]. Numbers printed by the released package (ddranking 0.2.0) differ, for it feeds
percentage points instead of fractions to phi: real 85, set 60, random 25 give it 62.99 where the documented
formula gives 0.29. It also picks learning rate and epoch on the test set, which nothing here does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from distill.errors import InputError


def interval95(values: Sequence[float]) -> tuple[float, float]:
    """Mean of `values` and half-width of its 95% interval, Student's t with n - 1 degrees of freedom.

    Raises:
        InputError: fewer than two values.
        ValueError: a value is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)  # (n,)
    n = len(sample)
    if n < 2:
        raise InputError(
            "a 95% interval needs at least two seeds",
            found=f"{n} value{'' if n == 1 else 's'}",
            allowed="2 or more",
            fix="evaluate with more seeds",
        )
    if not np.isfinite(sample).all():
        raise ValueError(f"an interval of values that are not finite: {sample.tolist()}")
    quantile = float(stdtrit(n - 1, 0.975))
    return float(sample.mean()), quantile * float(sample.std(ddof=1)) / math.sqrt(n)


def hard_label_recovery(real_hard: float, set_hard: float) -> float:
    """HLR: what a student loses on the set with hard labels, against the full real data. Lower is better."""
    return _fraction("real_hard", real_hard) - _fraction("set_hard", set_hard)


def improvement_over_random(set_own: float, random_own: float) -> float:
    """IOR: what the set, with its own labels and recipe, gains over a random subset of its size."""
    return _fraction("set_own", set_own) - _fraction("random_own", random_own)


def label_robust_score(
    *, real_hard: float, set_hard: float, set_own: float, random_own: float, weight: float = 0.5
) -> float:
    """LRS in [0, 1], higher is better: does the set help without help from its labels?

    Args:
        real_hard: accuracy of the full data with hard labels.
        set_hard: accuracy of the set with hard labels.
        set_own: accuracy of the set with the labels and the recipe it is meant for.
        random_own: accuracy of a random subset of the same size, labelled and trained like `set_own`.
        weight: w of IOR, in [0, 1]; 1 - w is that of HLR.

    Raises:
        InputError: an accuracy or the weight lies outside [0, 1].
    """
    w = _fraction("weight", weight)
    gain = improvement_over_random(set_own, random_own)
    return _phi(w * gain - (1 - w) * hard_label_recovery(real_hard, set_hard))


def augmentation_robust_score(
    *,
    set_augmented: float,
    random_augmented: float,
    set_plain: float,
    random_plain: float,
    weight: float = 0.5,
) -> float:
    """ARS in [0, 1], higher is better: does the set beat random with and without augmentation?

    Args:
        set_augmented, random_augmented: accuracies of the set and of a random subset, students augmented.
        set_plain, random_plain: the same without augmentation.
        weight: g of the augmented difference, in [0, 1].

    Raises:
        InputError: an accuracy or the weight lies outside [0, 1].
    """
    g = _fraction("weight", weight)
    augmented = _fraction("set_augmented", set_augmented) - _fraction("random_augmented", random_augmented)
    plain = _fraction("set_plain", set_plain) - _fraction("random_plain", random_plain)
    return _phi(g * augmented + (1 - g) * plain)


def _phi(x: float) -> float:
    """Increasing map of [-1, 1] onto [0, 1]."""
    return (math.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))


def _fraction(name: str, value: float) -> float:
    if 0 <= value <= 1:  # false for NaN too
        return value
    raise InputError(
        f"{name} is not a fraction",
        found=f"{value:g}",
        allowed="0 to 1",
        fix="divide percentages by 100" if 1 < value <= 100 else None,
    )
