"""CRAIG: samples whose gradients, each counted for those nearest to it, are near the gradients of all.

With d_ij = ||g_i - g_j||, and every sample i assigned to the pick nearest to it, the weighted sum of the picks is near:

    || sum_i g_i - sum_{j in S} gamma_j g_j ||  <=  L(S) = sum_i min_{j in S} d_ij,    gamma_j = samples assigned to j

and the greatest fall of L is the greatest gain of facility location with the similarity s_ij = C - d_ij, C at least
every distance (Mirzasoleiman, Bilmes and Leskovec, "Coresets for Data-efficient Training of Machine Learning Models",
ICML 2020, section 3 and algorithm 1). Greedy is lazy and exact (dataselect/facility.py); a sample as near to several
picks is assigned to the earliest.

What we do differently: the released code of DeepCore gives weights of gamma_j + 1, and over all classes the gains of
its first batch alone; a gamma_j here is the number of samples, and they sum to all. Distances between gradients of the
last layer come from their two factors (dataselect/gradients.py), by blocks: N x C(D + 1) numbers are never formed, and
of N x N distances `matrix_bytes` are kept at most.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from torch import Tensor

from dataselect.facility import assignment_sizes, facility_location
from dataselect.features import Chosen, SpaceSelector
from dataselect.gradients import GradientConfig
from dataselect.similarity import Distance, Similarity
from dataselect.space import FeatureSpace
from distill.byte_sizes import AsBytes
from distill.contracts import Context, DistilledSet, Selection, Source
from distill.selection import Picks, select

# Squared distances are differences of squared lengths in float32, off by less than this share of those.
_ROUNDING = 2e-6


class Craig(SpaceSelector):
    """CRAIG: covers the gradients, each pick weighted by how many it stands for."""

    name = "craig"

    class Config(GradientConfig):
        """Budget and gradients; distances of up to `matrix_bytes` are kept in memory."""

        matrix_bytes: Annotated[int, AsBytes()] = 1 << 30

    config: Config

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space = self.space(ctx, source)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            similarity = self._distances(space, samples)
            chosen = craig(similarity, count, matrix_bytes=self.config.matrix_bytes)
            rows, scores, weights = (each.cpu().numpy() for each in chosen if each is not None)
            return Picks(samples[rows], scores, weights)

        score = "mean distance between a gradient and the nearest pick so far"
        return select(source, previous, self.config, pick, meta={"score": score}, usable=space.finite)

    def _distances(self, space: FeatureSpace, samples: np.ndarray) -> GradientDistance:
        if space.factored:
            return FactoredDistance(*space.factors(samples))
        return GradientDistance(space.take(samples))  # distances stay what they are where rows are centred


class InnerProduct(Similarity):
    """<x, y>."""

    def own(self) -> Tensor:
        return self.features.square().sum(dim=1)

    def _finish_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        return products


class GradientDistance(Distance):
    """C - ||g_i - g_j||, and C itself where the difference is rounding: a gradient is as near to itself as can be."""

    def _squared_distances_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        assert left is not None and right is not None
        squares = super()._squared_distances_(products, left, right)
        return squares.masked_fill_(squares <= _ROUNDING * (left[:, None] + right), 0.0)


class FactoredDistance(GradientDistance):
    """C - ||g_i - g_j|| of gradients that are outer products of the rows of `left` (N, C) and `right` (N, D + 1)."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__(right)
        self.factors = InnerProduct(left), InnerProduct(right)
        self.squares = self.other_squares = self.factors[0].own() * self.factors[1].own()
        self.greatest = 2 * self.squares.max().sqrt()

    def block(self, rows: Tensor | slice, span: slice, *, out: Tensor | None = None) -> Tensor:
        left, right = self.factors
        products = right.block(rows, span, out=out).mul_(left.block(rows, span))
        return self._finish_(products, self._terms(rows), self._reference_terms(span))

    def between(self, rows: Tensor, others: Tensor) -> Tensor:
        left, right = self.factors
        products = right.between(rows, others).mul_(left.between(rows, others))
        return self._finish_(products, self._terms(rows), self._terms(others))


def craig(similarity: GradientDistance, count: int, *, matrix_bytes: int = 1 << 30) -> Chosen:
    """Pick `count` rows by CRAIG. Ties go to the lowest row.

    Args:
        similarity: of N gradients.
        count: at most N.
        matrix_bytes: of distances that are kept; they change the time, not the picks.

    Returns:
        Rows; as scores the mean distance of all rows to the nearest pick so far, float64 (count,), which times N is the
        bound L; as weights how many rows are assigned to each pick, int64 (count,), N in all.
    """
    rows, gains = facility_location(similarity, count, matrix_bytes=matrix_bytes)
    means = float(similarity.greatest) - gains.cumsum(dim=0) / len(similarity.squares)
    return Chosen(rows, means.clamp(min=0), assignment_sizes(similarity, rows))
