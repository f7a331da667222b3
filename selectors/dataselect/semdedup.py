"""SemDeDup: cluster the features, and in each cluster drop what has a near twin, a semantic duplicate.

In each cluster of spherical k-means, sorted by cosine to the centroid (the lowest first: `keep: hard`), drop sample j
if

    M_j = max_{i before j} cos(f(x_i), f(x_j)) > 1 - epsilon

(Abbas, Tirumala, Simig, Ganguli and Morcos, "SemDeDup: Data-efficient learning at web-scale through semantic
deduplication", 2023, section 3 and the pseudocode of its appendix). There, and here, earlier samples count whether they
were kept or not: of a chain of near twins the first alone is kept. So M does not depend on epsilon, and a budget is
the samples with the smallest M: exactly those that the epsilon which leaves so many would keep.

The pseudocode holds the cosines of a whole cluster; here they are met in blocks. It takes M for at least 0, which
with epsilon below 1 is all the same. Features are not centred; samples whose features are all 0 are twins of each other
and of nothing else. Cosines of float32 features are summed in float64 and rounded to 2^-20, so that exact duplicates
tie and blocks do not matter; ties go to the lowest row.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dataselect.clustering import kmeans, scale_to_length_one
from dataselect.features import SpaceSelector
from dataselect.space_config import SpaceConfig
from distill.contracts import Context, DistilledSet, Selection, Source
from distill.randomness import derive_seed
from distill.selection import Picks, select

_BLOCK = 2048  # rows of a cluster compared with as many at once
_STEPS = 1 << 20  # of a cosine from 0 to 1
_NONE_BEFORE = -1.0  # M of a cluster's first sample: less than any other


class SemDeDup(SpaceSelector):
    """Semantic de-duplication: drops near twins in the space of features."""

    name = "semdedup"

    class Config(SpaceConfig):
        """Features, and how near twins are.

        With `epsilon`, a sample is dropped if its cosine to an earlier one of its cluster exceeds 1 - epsilon; a budget
        is the most then, and may be left out. Without, the budget is kept exactly, by the epsilon that leaves so many.
        Of twins `keep: hard` keeps the one farthest from its cluster's centroid, `easy` the nearest. Only samples of
        one cluster are compared: clusters have `cluster_size` samples in the mean, and are made better at most
        `iterations` times.
        """

        epsilon: Annotated[float, Field(gt=0, lt=1)] | None = None
        keep: Literal["hard", "easy"] = "hard"
        cluster_size: Annotated[int, Field(ge=1)] = 1000
        iterations: Annotated[int, Field(ge=1)] = 25

        @property
        def finds_size(self) -> bool:
            return self.epsilon is not None

    config: Config
    score = "largest cosine to an earlier sample of its cluster; -1 for the first"

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space, config = self.space(ctx, source), self.config
        seed = ctx.derive(self.name)
        most = 1.0 if config.epsilon is None else 1 - config.epsilon

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            twins = nearest_earlier(
                space.raw(samples),
                clusters=-(-len(samples) // config.cluster_size),
                seed=derive_seed(seed, number),
                iterations=config.iterations,
                hard=config.keep == "hard",
            )
            rows = twins.argsort(stable=True)[:count]
            rows = rows[twins[rows] <= most]
            return Picks(samples[rows.cpu().numpy()], twins[rows].cpu().numpy())

        return select(source, previous, config, pick, meta={"score": self.score}, usable=space.finite)


def nearest_earlier(features: Tensor, *, clusters: int, seed: int, iterations: int, hard: bool) -> Tensor:
    """M of every row, the largest cosine to an earlier row of its cluster: float32 (N,), -1 where none is earlier.

    Args:
        features: float32 (N, D), brought to length 1 in place.
        clusters: how many.
        seed, iterations: of the clusters, as for `dataselect.clustering.kmeans`.
        hard: whether rows far from the centroid come first.
    """
    unit = scale_to_length_one(features)
    found = kmeans(unit, clusters, seed=seed, iterations=iterations, spherical=True)
    twins = torch.empty_like(unit[:, 0])
    for centroid, members in zip(found.centroids, found.members(), strict=True):
        near = torch.cat(
            [_rounded(unit[rows].double() @ centroid.double()) for rows in members.split(_BLOCK)]
        )
        order = members[near.argsort(descending=not hard, stable=True)]
        twins[order] = _largest_earlier(unit, order)
    blank = (~unit.any(dim=1)).nonzero()[:, 0]
    twins[blank[1:]] = 1.0
    return twins


def _largest_earlier(unit: Tensor, order: Tensor) -> Tensor:
    """The largest cosine of each row of `order` to those before it: float32 (len(order),)."""
    largest = torch.full_like(order, _NONE_BEFORE, dtype=torch.float32)
    blocks = order.split(_BLOCK)
    for number, (rows, most) in enumerate(zip(blocks, largest.split(_BLOCK), strict=True)):
        own = unit[rows].double()
        for other in range(number + 1):
            cosines = own @ (own if other == number else unit[blocks[other]].double()).T
            if other == number:
                later = torch.ones_like(cosines, dtype=torch.bool).triu_()
                cosines.masked_fill_(later, _NONE_BEFORE)
            torch.maximum(most, _rounded(cosines.amax(dim=1)), out=most)
    return largest


def _rounded(cosines: Tensor) -> Tensor:
    """float32, exact: multiples of 2^-20 up to 1."""
    return (cosines * _STEPS).round_().div_(_STEPS).clamp_(-1, 1).float()
