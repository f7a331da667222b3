"""k-center greedy: pick the samples so that every sample is near a picked one.

Minimise over S of size k:  max_x min_{s in S} ||f(x) - f(s)||_2.

The greedy choice adds, each time, the sample farthest from those picked; its radius is at most twice the optimum
(Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985). For active learning and coresets it was
proposed by Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018,
algorithm 1. One running minimum (n,) is kept; the DeepCore release holds a k x n matrix. The first pick is the
sample nearest to the class mean, so that nothing is left to chance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataselect.features import Chosen, FeatureSelector
from dataselect.space_config import SpaceConfig


class KCenter(FeatureSelector):
    """Greedy k-center: covers the features of each class."""

    name = "kcenter"

    class Config(SpaceConfig):
        """Budget and features."""

    config: Config
    score = "distance to the nearest earlier pick; for the first, to the class mean"

    def pick(self, features: Tensor, count: int, *, seed: int) -> Chosen:
        return Chosen(*greedy_kcenter(features, count))


def greedy_kcenter(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pick `count` rows by greedy k-center.

    Ties go to the row with the lowest number, so duplicate features are picked last and never twice.

    Args:
        features: float32 (N, D), centred (their mean is 0).
        count: at most N.

    Returns:
        Row numbers int64 (count,) in the order picked, and their distances float32 (count,) to the nearest earlier
        pick (the first: to the mean).
    """
    to_mean = _distances(features, torch.zeros_like(features[0]))  # (N,)
    nearest = torch.full_like(to_mean, torch.inf)  # to the nearest pick
    picks = torch.empty(count, dtype=torch.int64, device=features.device)
    radii = torch.empty(count, device=features.device)
    place = to_mean.argmin()
    radius = to_mean[place]
    for turn in range(count):
        picks[turn], radii[turn] = place, radius
        nearest = torch.minimum(nearest, _distances(features, features[place]))
        nearest[place] = -torch.inf
        place = nearest.argmax()
        radius = nearest[place]
    return picks, radii


def _distances(features: Tensor, point: Tensor) -> Tensor:
    """||f(x) - point||_2 of every row: float32 (N,), from the differences.

    The shorter way by inner products, |a|^2 + |b|^2 - 2ab, leaves duplicates apart by its rounding, about 3e-4 of
    their norm; which of them is picked would depend on the order of summation.
    """
    return torch.cdist(features, point[None], compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
