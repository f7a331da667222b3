"""k-means by blocks: clusters that depend neither on blocks and threads nor, but for rounding, on the device.

Minimise over k centroids c:  sum_x min_j ||f(x) - c_j||_2^2,  by the rounds of Lloyd ("Least squares quantization in
PCM", IEEE Transactions on Information Theory, 1982): every row goes to its nearest centroid, every centroid to the mean
of its rows. The first centroids are rows drawn by k-means++, each with a probability proportional to its squared
distance to the nearest one drawn before (Arthur and Vassilvitskii, "k-means++", SODA 2007, section 2.2), in its greedy
form: of 2 + log k rows drawn the one that lowers the objective most is taken. Spherical k-means takes rows of length 1
and brings the centroids back to it, so that the nearest centroid is that of the largest cosine (Dhillon and Modha,
"Concept decompositions for large sparse text data", Machine Learning, 2001).

Written here, and not left to scikit-learn's KMeans, because that runs on the host alone and adds each thread's share
of the sums in an order of its own. Here rows and draws are summed as whole numbers in fixed point, of at least 40 bits
for a million rows: whole numbers have one sum, in whatever order and by whatever device they are added.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.randomness import generator

_BLOCK_NUMBERS = 1 << 22  # numbers held at once, 16 MiB as float32
_SAMPLE, _SAMPLE_PER_CLUSTER = (
    1 << 15,
    16,
)  # rows, the more of the two, among which the first centroids are sought
_ROUNDING = (
    1e-5  # of ||a||^2 + ||b||^2 - 2 <a, b> in float32, as a share of ||a||^2 + ||b||^2: twins are not apart
)


@dataclass(frozen=True)
class Clusters:
    """N rows in k clusters, none of them empty.

    Args:
        labels: int64 (N,), the cluster of each row.
        centroids: float32 (k, D), the mean of each cluster's rows; at length 1 where spherical.
    """

    labels: Tensor
    centroids: Tensor

    @property
    def sizes(self) -> Tensor:
        """Rows of each cluster: int64 (k,)."""
        return torch.bincount(self.labels, minlength=len(self.centroids))

    def members(self) -> Iterator[Tensor]:
        """The rows of each cluster, ascending, in the order of the clusters."""
        return iter(self.labels.argsort(stable=True).split(self.sizes.tolist()))


def kmeans(features: Tensor, count: int, *, seed: int, iterations: int, spherical: bool = False) -> Clusters:
    """Cluster rows by k-means, until no row changes its cluster or for `iterations` rounds.

    Ties go to the cluster with the lower number. A cluster that loses all its rows takes the one that is farthest from
    its own centroid; rows that are all alike are shared out in the same way, one to each cluster that would be empty.

    Args:
        features: float32 (N, D); rows of length 1, or 0, where spherical.
        count: k, at most N.
        seed: of the first centroids.
        iterations: at least 1.
        spherical: whether centroids are brought to length 1.
    """
    assert 1 <= count <= len(features) and iterations >= 1, "refused by the configuration"
    centroids = features[_first_rows(features, count, seed=seed)]
    labels = torch.full_like(features[:, 0], -1, dtype=torch.int64)
    for _ in range(iterations):
        found = _filled(features, centroids, nearest_centroids(features, centroids, spherical=spherical))
        if torch.equal(found, labels):
            break
        labels = found
        means = _means(features, labels, count)
        centroids = F.normalize(means, dim=1) if spherical else means
    return Clusters(labels, centroids)


def nearest_centroids(features: Tensor, centroids: Tensor, *, spherical: bool = False) -> Tensor:
    """The nearest centroid of every row, the lowest of several: int64 (N,).

    Args:
        features: float32 (N, D).
        centroids: float32 (k, D).
        spherical: whether near means a large inner product.
    """
    # ||f(x) - c||^2 = 2 (||c||^2 / 2 - <f(x), c>) + ||f(x)||^2
    halves = torch.zeros_like(centroids[:, 0]) if spherical else centroids.square().sum(dim=1) / 2
    labels = torch.empty_like(features[:, 0], dtype=torch.int64)
    for rows in _blocks(len(features), width=max(centroids.shape)):
        labels[rows] = torch.addmm(halves, features[rows], centroids.T, alpha=-1).argmin(dim=1)
    return labels


def distances_to_own(features: Tensor, clusters: Clusters) -> Tensor:
    """Distance of every row to the centroid of its cluster, from the differences: float32 (N,)."""
    gaps = torch.empty_like(features[:, 0])
    for rows in _blocks(len(features), width=features.shape[1]):
        gaps[rows] = torch.linalg.vector_norm(
            features[rows] - clusters.centroids[clusters.labels[rows]], dim=1
        )
    return gaps


def smallest_of_each(values: Tensor, labels: Tensor) -> Tensor:
    """The row with the smallest value in each cluster that has one, the lowest of several: int64 (clusters,).

    Args:
        values: (N,).
        labels: int64 (N,).
    """
    order = values.argsort(stable=True)
    order = order[labels[order].argsort(stable=True)]  # by cluster, in it by value, then by row
    sizes = torch.bincount(labels)
    return order[(sizes.cumsum(0) - sizes)[sizes > 0]]


def scale_to_length_one(features: Tensor) -> Tensor:
    """Bring every row of `features` (N, D) to length 1, in place; rows of zeros stay as they are."""
    for rows in _blocks(len(features), width=features.shape[1]):
        features[rows] = F.normalize(features[rows], dim=1)
    return features


def _first_rows(features: Tensor, count: int, *, seed: int) -> Tensor:
    """Rows drawn by greedy k-means++ from all, or from a sample of them: int64 (count,), distinct.

    Where those left are all twins of drawn ones, the lowest.
    """
    chance = generator(seed, "k-means++")
    most = max(_SAMPLE, _SAMPLE_PER_CLUSTER * count)
    if len(features) <= most:
        return _spread_rows(features, count, chance)
    sample = torch.randperm(len(features), generator=chance)[:most].sort().values.to(features.device)
    return sample[_spread_rows(features[sample], count, chance)]


def _spread_rows(features: Tensor, count: int, chance: torch.Generator) -> Tensor:
    """`_first_rows` among all rows."""
    tries = 2 + int(math.log(count))
    squares = features.square().sum(dim=1)
    drawn = torch.empty(count, dtype=torch.int64, device=features.device)
    free = torch.ones_like(squares, dtype=torch.bool)
    drawn[0] = torch.randint(len(features), (1,), generator=chance)[0]
    gaps = _squared_gaps(features, squares, drawn[:1])[0]  # to the nearest row drawn
    for turn in range(1, count):
        free[drawn[turn - 1]] = False
        if (largest := float(gaps.max())) == 0:
            drawn[turn] = free.to(torch.uint8).argmax()
            continue
        scale = _fixed_point(largest, len(gaps))
        places = _draws(gaps, scale, tries, chance)
        left = torch.minimum(gaps, _squared_gaps(features, squares, places))
        best = (left.double() * scale).long().sum(dim=1).argmin()
        drawn[turn], gaps = places[best], left[best]
    return drawn


def _draws(weights: Tensor, scale: float, count: int, chance: torch.Generator) -> Tensor:
    """Places drawn with probabilities proportional to their weights: int64 (count,), some perhaps twice.

    Args:
        weights: float32 (N,), at least 0, one of them greater.
        scale: what brings them to whole numbers.
        chance: a generator of the host, so that every device draws alike.
    """
    ends = (weights.double() * scale).long().cumsum(0)
    # A share of the total: whole numbers drawn below 2^62 would come from the 64 random bits unevenly.
    shares = torch.rand(count, dtype=torch.float64, generator=chance).to(weights.device)
    at = (shares * ends[-1]).long().clamp_(max=ends[-1] - 1)
    return torch.searchsorted(ends, at, right=True)


def _squared_gaps(features: Tensor, squares: Tensor, places: Tensor) -> Tensor:
    """||f(place) - f(x)||^2 of every place and row: float32 (places, N), 0 where that is less than its rounding."""
    sums = squares[places][:, None] + squares
    gaps = torch.addmm(sums, features[places], features.T, alpha=-2)
    return gaps.masked_fill_(gaps < _ROUNDING * sums, 0.0)


def _filled(features: Tensor, centroids: Tensor, labels: Tensor) -> Tensor:
    """The labels with a row for each cluster that had none: those farthest from their centroids.

    The row nearest to each centroid stays, so that none becomes empty.
    """
    empty = (torch.bincount(labels, minlength=len(centroids)) == 0).nonzero()[:, 0]
    if len(empty) == 0:
        return labels
    gaps = distances_to_own(features, Clusters(labels, centroids))
    stays = smallest_of_each(gaps, labels)
    gaps[stays] = -1.0
    labels[gaps.argsort(descending=True, stable=True)[: len(empty)]] = empty
    return labels


def _means(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """The mean of each cluster's rows, none of them empty: float32 (count, D)."""
    low, high = features.aminmax()
    scale = _fixed_point(max(-float(low), float(high)), len(features))
    sums = torch.zeros(count, features.shape[1], dtype=torch.int64, device=features.device)
    for rows in _blocks(len(features), width=features.shape[1]):
        sums.index_add_(0, labels[rows], (features[rows].double() * scale).round_().long())
    sizes = torch.bincount(labels, minlength=count)
    return (sums.double() / scale / sizes[:, None]).float()


def _fixed_point(largest: float, count: int) -> float:
    """A power of two that brings `count` numbers of at most `largest` to whole ones whose sum is below 2^62."""
    bits = 62 - count.bit_length() - math.frexp(largest)[1]
    return math.ldexp(1.0, min(bits, 1000))


def _blocks(count: int, *, width: int) -> Iterator[slice]:
    """Ranges of `count` rows of which each holds about _BLOCK_NUMBERS numbers, `width` a row."""
    size = max(_BLOCK_NUMBERS // width, 1)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
