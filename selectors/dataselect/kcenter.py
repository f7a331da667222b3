"""k-center greedy: pick the samples so that every sample is near a picked one.

Minimise over S of size k:  max_x min_{s in S} ||f(x) - f(s)||_2.

The greedy choice adds, each time, the sample farthest from those picked; its radius is at most twice the optimum
(Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985). For active learning and coresets it was
proposed by Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018,
algorithm 1. One running minimum (n,) is kept; the DeepCore release holds a k x n matrix. The first pick is the
sample nearest to the class mean, so that nothing is left to chance.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dataselect.features import FeatureConfig, FeatureSelector, FeatureSpace
from distill.contracts import Context, DistilledSet, Selection, Source
from distill.selection import select_by_class


class KCenter(FeatureSelector):
    """Greedy k-center: covers the features of each class."""

    name = "kcenter"

    class Config(FeatureConfig):
        """Budget and features."""

    config: Config

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space = FeatureSpace(ctx, source, self.config)

        def pick(samples: np.ndarray, count: int, number: int) -> tuple[np.ndarray, np.ndarray]:
            places, radii = greedy_kcenter(space.take(samples), count)
            return samples[places.cpu().numpy()], radii.cpu().numpy()

        meta = {"score": "distance to the nearest earlier pick; for the first, to the class mean"}
        return select_by_class(source, previous, self.config, pick, meta=meta)


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
    squares = features.square().sum(dim=1)  # (N,)
    nearest = torch.full_like(squares, torch.inf)
    picks = torch.empty(count, dtype=torch.int64, device=features.device)
    radii = torch.empty(count, device=features.device)
    place = squares.argmin()
    radius = squares[place]
    for turn in range(count):
        picks[turn], radii[turn] = place, radius
        to_pick = squares + squares[place] - 2 * (features @ features[place])
        nearest = torch.minimum(nearest, to_pick.clamp_(min=0))
        nearest[place] = -torch.inf
        place = nearest.argmax()
        radius = nearest[place]
    return picks, radii.clamp_(min=0).sqrt_()
