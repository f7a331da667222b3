"""k-means: cluster the features into as many clusters as samples are wanted, and keep one sample of each.

Minimise over k centroids c:  sum_x min_j ||f(x) - c_j||_2^2;  of each cluster the sample nearest to its centroid is
kept, or the medoid, argmin_{m in cluster} sum_{x in cluster} ||f(x) - f(m)||_2 (Kaufman and Rousseeuw, "Finding Groups
in Data", 1990, chapter 2). dataselect/clustering.py has the clusters and their sources. With squared distances the
medoid would be the sample nearest to the centroid; with plain ones it is less drawn to outliers, at a cost of the
sum of the squared cluster sizes.

With `weights: clusters` each sample counts for as many as its cluster has, which makes a weighted mean over the picks
an estimate of the mean over all.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from dataselect.clustering import Clusters, distances_to_own, kmeans, smallest_of_each
from dataselect.features import Chosen, FeatureSelector
from dataselect.space_config import SpaceConfig

_BLOCK_NUMBERS = 1 << 22  # distances held at once, 16 MiB as float32


class KMeans(FeatureSelector):
    """k-means: one sample of each cluster of features."""

    name = "kmeans"

    class Config(SpaceConfig):
        """Budget and features.

        Of each cluster `keep: nearest` keeps the sample nearest to the centroid, `medoid` the one with the smallest sum
        of distances to the others. `weights: clusters` weighs each by the size of its cluster. Clusters are made better
        until no sample changes its own, at most `iterations` times.
        """

        keep: Literal["nearest", "medoid"] = "nearest"
        weights: Literal["equal", "clusters"] = "equal"
        iterations: Annotated[int, Field(ge=1)] = 25

    config: Config
    score = "distance to the centroid of its cluster"

    def pick(self, features: Tensor, count: int, *, seed: int) -> Chosen:
        clusters = kmeans(features, count, seed=seed, iterations=self.config.iterations)
        gaps = distances_to_own(features, clusters)
        if self.config.keep == "nearest":
            rows = smallest_of_each(gaps, clusters.labels)
        else:
            rows = medoids(features, clusters)
        order = largest_first(clusters.sizes, rows)
        rows, sizes = rows[order], clusters.sizes[order]
        return Chosen(rows, gaps[rows], None if self.config.weights == "equal" else sizes)


def medoids(features: Tensor, clusters: Clusters) -> Tensor:
    """The row of each cluster with the smallest sum of distances to the others, the lowest of several: int64 (k,).

    Args:
        features: float32 (N, D).
        clusters: of the rows.
    """
    found = torch.empty_like(clusters.sizes)
    for number, members in enumerate(clusters.members()):
        # Of two each is as far from the other.
        found[number] = members[0] if len(members) <= 2 else members[_sums(features[members]).argmin()]
    return found


def largest_first(sizes: Tensor, rows: Tensor) -> Tensor:
    """The order of clusters by size, the largest first, then by row: int64 (k,)."""
    by_row = rows.argsort()
    return by_row[sizes[by_row].argsort(descending=True, stable=True)]


def _sums(features: Tensor) -> Tensor:
    """Sum of the distances of every row to all, from the differences, by blocks: float64 (N,)."""
    size = max(_BLOCK_NUMBERS // len(features), 1)
    parts = [
        torch.cdist(block, features, compute_mode="donot_use_mm_for_euclid_dist").sum(
            dim=1, dtype=torch.float64
        )
        for block in features.split(size)
    ]
    return torch.cat(parts)
