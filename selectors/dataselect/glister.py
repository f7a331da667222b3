"""GLISTER: samples one step on which lowers the loss of the validation samples most.

With L_V the mean cross-entropy of the validation samples and theta_S = theta - (eta / k) sum_{i in S} g_i, one step on
the picks of a budget of k, the greedy choice adds the sample that lowers L_V most, to first order:

    argmax_i  (eta / k) <g_i, grad L_V(theta_S)>

(Killamsetty et al., "GLISTER: Generalization based Data Subset Selection for Efficient and Robust Learning", AAAI 2021,
algorithm 2). theta is the last layer, whose gradients have a closed form (dataselect/gradients.py) and which is linear:
the logits of the validation samples after the step are  z_V - (eta / k) R_V (sum_S l_i (x) r_i)^T,  exactly, and the
gradient of their loss follows. As in the paper it is taken anew whenever some have been picked (`refresh`); in the
DeepCore release a misspelt keyword keeps it at the first one for ever, which makes the choice a ranking by one product.

What we do differently: the paper's step is eta times the sum over S, which grows with the budget until it leaves the
range where the first order means anything; here it is that of a step on the mean loss of the picks. With classes, all
compete with each other until a class has its share: the step is one for all, and no class goes first.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dataselect.features import SpaceSelector
from dataselect.gradients import (
    Against,
    FactoredGradients,
    GradientConfig,
    gradients_of,
    in_levels,
    matched_split,
    refuse_without_validation,
)
from dataselect.space import FeatureSpace
from distill.contracts import Context, DistilledSet, Selection, Source, Split, StepKind
from distill.selection import (
    Picks,
    candidates,
    class_budget,
    class_counts,
    selection_of,
    unusable,
    whole_budget,
)

_BLOCK = 4096  # validation samples computed at once


class Glister(SpaceSelector):
    """GLISTER: samples that lower the validation loss in one step."""

    name = "glister"

    class Config(GradientConfig):
        """Budget and network; whose loss is to fall (`against`), the learning rate of the step (`lr`), and the share of
        the budget that is picked between two gradients of that loss (`refresh`; 1 never takes a second)."""

        features: Literal["last_layer"] = "last_layer"
        checkpoints: Annotated[int, Field(ge=1, le=1)] = 1
        against: Against = "valid"
        lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
        refresh: Annotated[float, Field(gt=0, le=1)] = 0.05

    config: Config

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        if self.config.against == "valid":
            refuse_without_validation(source, per_class=False)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        config, samples = self.config, candidates(source, previous)
        groups, quotas = self._quotas(source, samples)
        space = self.space(ctx, source)
        left = np.isin(samples, space.finite(samples))
        self._refuse_few(source, groups, groups[left], quotas)
        samples, groups = samples[left], groups[left]
        gradients = gradients_of(space, source.train, samples)
        assert isinstance(gradients, FactoredGradients), "of one network's last layer"
        head = _head(ctx, space, matched_split(source, config.against))
        every = math.ceil(config.refresh * int(quotas.sum()))
        rows, gains = glister(gradients, head, groups, quotas, lr=config.lr, every=every)
        score = (
            "fall of the mean validation loss by the step on this sample, to first order, when it was picked"
        )
        picked = Picks(samples[rows.cpu().numpy()], gains.cpu().numpy())
        return selection_of([picked], per_class=config.per_class, meta={"score": score})

    def _quotas(self, source: Source, samples: np.ndarray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The group of each sample, (n,), and how many of each group to pick: classes, or one group of all."""
        if not self.config.per_class:
            return np.zeros(len(samples), np.int64), np.array([whole_budget(len(samples), self.config)])
        labels, classes = source.train.labels.numpy()[samples], len(source.classes)
        return labels, class_budget(class_counts(labels, classes), source.classes, self.config)

    def _refuse_few(
        self,
        source: Source,
        groups: NDArray[np.int64],
        left: NDArray[np.int64],
        quotas: NDArray[np.int64],
    ) -> None:
        """Refuse quotas that samples with finite gradients cannot fill."""
        there, usable = (np.bincount(each, minlength=len(quotas)) for each in (groups, left))
        for number in np.flatnonzero(usable < quotas):
            name = f"class {source.classes[number]!r}" if self.config.per_class else "the data"
            raise unusable(int(usable[number]), int(there[number]), int(quotas[number]), name=name)


class Head(NamedTuple):
    """A linear last layer, as the samples whose loss is to fall see it.

    Attributes:
        inputs: float32 (M, D + 1), features with a 1; rows of zeros have no say.
        logits: float32 (M, C), before any step.
        labels: int64 (M,).
    """

    inputs: Tensor
    logits: Tensor
    labels: Tensor

    def slope(self, step: Tensor) -> Tensor:
        """The gradient of the mean loss by the layer, after `step` was subtracted from it: both float64 (C, D + 1)."""
        slope = torch.zeros_like(step)
        for start in range(0, len(self.labels), _BLOCK):
            rows = slice(start, start + _BLOCK)
            inputs = self.inputs[rows].to(step)
            moved = self.logits[rows].to(step) - inputs @ step.T
            wrong = F.softmax(moved, dim=1) - F.one_hot(self.labels[rows].to(moved.device), moved.shape[1])
            slope += wrong.T @ inputs
        return slope / max(int((self.inputs[:, -1] != 0).sum()), 1)


def glister(
    gradients: FactoredGradients,
    head: Head,
    groups: NDArray[np.int64],
    quotas: NDArray[np.int64],
    *,
    lr: float,
    every: int,
) -> tuple[Tensor, Tensor]:
    """Pick rows by GLISTER. Equal gains go to the lowest row.

    Args:
        gradients: of N samples.
        head: of the samples whose loss is to fall, on the same device.
        groups: (N,), the group of each row.
        quotas: (groups,), how many rows of each group, at most as many as there are.
        lr: eta.
        every: picks between two gradients of that loss.

    Returns:
        Row numbers int64 and gains float64 (sum of the quotas,), in the order picked.
    """
    left = torch.from_numpy(quotas).to(gradients.device)
    own = torch.from_numpy(groups).to(gradients.device)
    free = torch.ones_like(own, dtype=torch.bool)
    rate = lr / int(quotas.sum())
    step = torch.zeros(gradients.shape, dtype=torch.float64, device=gradients.device)
    picks: list[Tensor] = []
    gains: list[Tensor] = []
    while left.any():
        gain = rate * gradients.products(head.slope(step))
        rows = _best(gain, free, own, left, every)
        step += rate * gradients.combined(rows, torch.ones_like(gain[rows]))
        free[rows] = False
        left -= torch.bincount(own[rows], minlength=len(left))
        picks.append(rows)
        gains.append(gain[rows])
    return torch.cat(picks), torch.cat(gains)


def _best(gain: Tensor, free: Tensor, groups: Tensor, left: Tensor, count: int) -> Tensor:
    """The `count` free rows of the largest gains, the lowest of equals, within the quotas left."""
    rows = free.nonzero()[:, 0]
    levels = in_levels(gain, float(gain.abs().max()))[rows]
    order = rows[torch.argsort(levels, descending=True, stable=True)]
    allowed = rank_in_group(groups[order]) < left[groups[order]]
    return order[allowed][:count]


def rank_in_group(groups: Tensor) -> Tensor:
    """How many earlier entries are of the same group: int64 (n,)."""
    order = torch.argsort(groups, stable=True)
    counts = torch.bincount(groups)
    starts = counts.cumsum(dim=0) - counts
    ranks = torch.empty_like(groups)
    ranks[order] = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    return ranks


def _head(ctx: Context, space: FeatureSpace, split: Split) -> Head:
    """The last layer of the space's network, for all samples of a split."""
    samples = np.arange(len(split))
    (network,) = space.networks
    _, inputs = space.factors(samples, split=split)
    logits = ctx.cache.logits(split, network).take(samples)
    return Head(inputs, logits.to(inputs.device), split.labels.to(inputs.device))
