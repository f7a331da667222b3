"""How much likelier the target makes a sample than the source does, by counts of both in buckets of the feature space.

    log w(x) = beta sum_t ln p_t(b_t(x)) - ln q_t(b_t(x)),   q_t = c'_t / N,   p_t = (c_t + s B q_t) / (M + s B)

with b_t(x) the bucket of x in table t, of B; c and c' the counts of the M samples of the target and the N of the
source; s pseudo-counts a bucket. It is the sum over n-grams of dataselect/importance.py, where the n-grams of an image
are its buckets (Xie et al., NeurIPS 2023, section 3).

Two kinds of tables. One whose buckets are the cells of k-means on both, with beta = 1. Or T whose buckets are the
signs of `bits` random projections: two samples at the angle a share a bucket with the probability (1 - a / pi)^bits
(Charikar, "Similarity Estimation Techniques from Rounding Algorithms", STOC 2002, section 3). The tables of one sample
say much the same, unlike the words of a text: beta = 1 counts it T times, so that a few samples have all the weight,
and beta = 1 / T takes the geometric mean of T coarse estimates, so that hardly any has more than another. We fit beta
in [0, 1]: the slope of the logistic regression that tells target and source apart by their sums, each sample's with
counts that it is left out of (dataselect/calibration.py).

Pseudo-counts are spread as the source is, and not evenly as in text: they draw all ratios towards 1 alike, whatever the
sizes of the buckets,  p_t / q_t = (1 - k) c_t / (M q_t) + k  with  k = s B / (M + s B).  So of one table a share of
about k of what is drawn comes from the source as it is (a defensive mixture: Hesterberg, "Weighted Average Importance
Sampling and Defensive Mixture Distributions", Technometrics 1995).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataselect.calibration import calibrate
from dataselect.clustering import kmeans, nearest_centroids
from dataselect.importance import log_ratio
from dataselect.standard_features import blocks
from distill.errors import InputError
from distill.randomness import generator

_ROWS_A_CELL = 64  # of source and of target each, among which centroids are sought

Combine = Literal["fitted", "sum", "mean"]
Counts = NDArray[np.int64]


class Tables(Protocol):
    """Buckets of samples in T tables of B each."""

    @property
    def shape(self) -> tuple[int, int]:
        """(T, B)."""
        ...

    def codes(self, block: Tensor) -> Tensor:
        """The bucket of each row in each table, int64 (b, T), of float64 (b, D)."""
        ...


@dataclass(frozen=True)
class Cells:
    """One table, of the nearest of B centroids.

    Args:
        centroids: float64 (B, D), on the device that computes.
    """

    centroids: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return 1, len(self.centroids)

    def codes(self, block: Tensor) -> Tensor:
        return nearest_centroids(block, self.centroids)[:, None]


@dataclass(frozen=True)
class Signs:
    """T tables of the signs of random projections.

    Args:
        planes: float64 (D, T bits), on the device that computes.
        bits: of a table.
    """

    planes: Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.planes.shape[1] // self.bits, 1 << self.bits

    def codes(self, block: Tensor) -> Tensor:
        signs = (block @ self.planes > 0).view(len(block), -1, self.bits)
        return (signs.long() << torch.arange(self.bits, device=block.device)).sum(dim=2)


def cells(
    candidates: Tensor, target: Tensor, count: int, *, seed: int, iterations: int, memory: int = 4 << 30
) -> Cells:
    """The cells of k-means on source and target, on 64 rows of each for every cell where there are more.

    Args:
        candidates: float32 (N, D), on any device, or in a file.
        target: float32 (M, D), on the device that computes.
        count: B.
        seed, iterations: as for `dataselect.clustering.kmeans`.
        memory: bytes that these rows may take.

    Raises:
        InputError: fewer samples than cells, or rows that take more.
    """
    refuse_few(len(candidates) + len(target), count)
    parts = [(candidates, "source"), (target, "target")]
    most = _ROWS_A_CELL * count
    needed = 4 * target.shape[1] * sum(min(len(part), most) for part, _ in parts)
    if needed > memory:
        raise InputError(
            f"k-means of {count} buckets takes {needed:,} bytes for its rows",
            where="memory",
            found=f"{memory:,} bytes",
            allowed=f"at least {needed:,} bytes",
            fix="raise memory, lower buckets, or choose ratio: hashed",
        )
    rows = []
    for part, name in parts:
        chosen = torch.randperm(len(part), generator=generator(seed, name, "rows"))[:most].sort().values
        rows.append(part[chosen.to(part.device)].to(target.device))
    found = kmeans(torch.cat(rows), count, seed=seed, iterations=iterations)
    return Cells(found.centroids.double())


def refuse_few(there: int, count: int) -> None:
    """Raise InputError where samples are fewer than the cells."""
    if there < count:
        raise InputError(
            f"{there} images of the data and the target cannot be cut into {count} buckets",
            where="buckets",
            found=f"{count}",
            allowed=f"at most {there}",
            fix="lower buckets",
        )


def signs(width: int, *, tables: int, bits: int, seed: int, device: torch.device) -> Signs:
    """Tables of random hyperplanes through the origin of D = `width` features."""
    drawn = torch.randn(width, tables * bits, generator=generator(seed, "hyperplanes"), dtype=torch.float64)
    return Signs(drawn.to(device), bits)


class BucketRatio:
    """Counts of source and target in tables of buckets, and what they say of a sample.

    Args:
        tables: the buckets.
        candidates: float32 (N, D), on any device, or in a file.
        target: float32 (M, D), on the device that computes.
        smoothing: s.
        combine: what beta is: `fitted`, 1 for `sum`, 1 / T for `mean`.

    Attributes:
        scale: beta.
        source, target: counts, int64 (T, B).

    Raises:
        InputError: no sample of the source has a bucket with one of the target.
    """

    def __init__(
        self,
        tables: Tables,
        candidates: Tensor,
        target: Tensor,
        *,
        smoothing: float,
        combine: Combine = "sum",
    ) -> None:
        self.tables = tables
        self.device = target.device
        self.source = self._counts(candidates)
        self.target = self._counts(target)
        if not self.target[self.source > 0].any():
            raise InputError(
                "no image of the data shares a bucket with one of the target: nothing tells which resemble it",
                where="target",
                found=f"{(self.target > 0).sum()} buckets of the target, {(self.source > 0).sum()} of the data",
                fix="ask for fewer buckets (or bits), set ratio: logistic, or look whether the features suit both",
            )
        self._model = self._logs(smoothing)
        self._left_out = self._logs(smoothing, out_of_target=1)
        if combine == "fitted":
            own = self._sums(target, self._left_out)
            others = self._sums(candidates, self._logs(smoothing, out_of_source=1))
            _, self.scale = calibrate(others.cpu().numpy(), own.cpu().numpy(), most=1.0)
        else:
            self.scale = 1.0 if combine == "sum" else 1 / tables.shape[0]

    def log_weights(self, features: Tensor) -> Tensor:
        """log w of each row: float64 (N,), on the device that computes."""
        return self.scale * self._sums(features, self._model)

    def target_log_weights(self, target: Tensor) -> Tensor:
        """log w of each row of the target, with counts that it is left out of: float64 (M,)."""
        return self.scale * self._sums(target, self._left_out)

    def _sums(self, features: Tensor, model: Tensor) -> Tensor:
        """Sums over tables of a model (T, B): float64 (N,)."""
        out = torch.empty(len(features), dtype=torch.float64, device=self.device)
        for place, block in blocks(features, self.device):
            out[place] = model.T.gather(0, self.tables.codes(block)).sum(dim=1)
        return out

    def _logs(self, smoothing: float, *, out_of_target: int = 0, out_of_source: int = 0) -> Tensor:
        """ln p - ln q: float64 (T, B); with a 1, as one sample of that side meets it that is left out of the counts."""
        size = self.tables.shape[1]
        there = np.maximum(self.source - out_of_source, 0) / max(int(self.source[0].sum()) - out_of_source, 1)
        left = np.maximum(self.target - out_of_target, 0)
        drawn = smoothing * size
        total = int(self.target[0].sum()) - out_of_target + drawn or 1.0
        return torch.from_numpy(log_ratio((left + drawn * there) / total, there)).to(self.device)

    def _counts(self, features: Tensor) -> Counts:
        """How many rows fall in each bucket: int64 (T, B)."""
        tables, size = self.tables.shape
        counts = torch.zeros(tables * size, dtype=torch.int64, device=self.device)
        first = torch.arange(tables, device=self.device) * size
        for _, block in blocks(features, self.device):
            counts += torch.bincount((self.tables.codes(block) + first).flatten(), minlength=len(counts))
        return counts.view(tables, size).cpu().numpy()
