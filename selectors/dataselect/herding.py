"""Herding: pick samples whose running mean follows the mean of all.

With mu the mean feature of a class, the t-th pick is  argmin_x || t mu - (sum_{s in S} f(s) + f(x)) ||_2  over the
samples not yet picked (Welling, "Herding Dynamical Weights to Learn", ICML 2009; as exemplar choice: Rebuffi et al.,
"iCaRL", CVPR 2017, algorithm 4). The DeepCore release takes the argmax of the residual, which drives the mean away.

Features arrive centred, so mu = 0 and the residual is the sum of the picks alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataselect.features import Chosen, FeatureSelector
from dataselect.space_config import SpaceConfig


class Herding(FeatureSelector):
    """Herding: keeps the mean feature of each class."""

    name = "herding"

    class Config(SpaceConfig):
        """Budget and features."""

    config: Config
    score = "distance between the mean of the picks so far and the class mean"

    def pick(self, features: Tensor, count: int, *, seed: int) -> Chosen:
        return Chosen(*herd(features, count))


def herd(features: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pick `count` rows by herding.

    Args:
        features: float32 (N, D), centred (their mean is 0).
        count: at most N.

    Returns:
        Row numbers int64 (count,) in the order picked, and after each pick the distance float32 (count,) between the
        picks' mean and the mean of all rows.
    """
    squares = features.square().sum(dim=1)  # (N,)
    total = torch.zeros_like(features[0])  # (D,) sum of the picks
    taken = torch.zeros_like(squares)
    picks = torch.empty(count, dtype=torch.int64, device=features.device)
    errors = torch.empty(count, device=features.device)
    for turn in range(count):
        # || total + f(x) ||^2 up to the constant || total ||^2
        place = (squares + 2 * (features @ total) + taken).argmin()
        picks[turn] = place
        taken[place] = torch.inf
        total = total + features[place]
        errors[turn] = torch.linalg.vector_norm(total) / (turn + 1)
    return picks, errors
