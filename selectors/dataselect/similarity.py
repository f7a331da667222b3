"""Similarities between candidates and references, computed by blocks from their features; nothing N x R is kept.

With x, y two rows of features, and s(x, y) >= 0 always:

    cosine          max(0, cos(x, y))                              what points elsewhere is worth nothing
    shifted_cosine  (1 + cos(x, y)) / 2                            what DeepCore takes
    rbf             exp(-||x - y||^2 / (2 h^2))                    h is the bandwidth
    distance        2 max_z ||z|| - ||x - y||                      CRAIG's (Mirzasoleiman et al., ICML 2020, eq. 8)

Features arrive centred, so that half of all directions have a negative cosine: (1 + cos) / 2 gives what is unrelated
half of the greatest worth, and a reference that no pick resembles counts nearly as much as one that is picked. `cosine`
is the default for that reason. A row of zeros has no direction: its cosine with every row, itself too, is 0.

Products are taken for at least `_LEAST` rows and columns and at most `_DEPTH` features at once: for others BLAS adds up
in another order, and a similarity would depend on what is computed beside it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.errors import NonFiniteError
from distill.randomness import generator

SimilarityKind = Literal["cosine", "shifted_cosine", "rbf", "distance"]

_LEAST = 16
# For more features at once BLAS adds up in another order for other shapes.
_DEPTH = 512
_SPAN = 1 << 14  # references at once
_TILE = 512  # candidates, and references, of a tile: it fits a core's cache
_BANDWIDTH_ROWS = 1000  # of whose distances the bandwidth is the median
_OWN_AT_ONCE = 64  # rows whose products with themselves stand among all of theirs
_ROWS_AT_ONCE = 4096  # to look at, or to scale


class Similarity(ABC):
    """s(candidate, reference) for N candidates and R references, all of them rows of the same features.

    Args:
        features: float32 (N, D).
        references: int64 (R,), rows; None takes all.
    """

    def __init__(self, features: Tensor, references: Tensor | None = None) -> None:
        self.features = features
        self.references = references
        self.others = features if references is None else features[references]  # (R, D)

    @property
    def size(self) -> tuple[int, int]:
        """(N, R)."""
        return len(self.features), len(self.others)

    @property
    def device(self) -> torch.device:
        return self.features.device

    def block(self, rows: Tensor | slice, span: slice, *, out: Tensor | None = None) -> Tensor:
        """float32 (b, r): of candidates `rows` to a span of the references.

        Args:
            rows: int64 (b,), or a slice.
            span: of the references.
            out: (b, r), where the result goes.
        """
        values = _products(self.features[rows], self.others[span], out)
        return self._finish_(values, self._terms(rows), self._reference_terms(span))

    def between(self, rows: Tensor, others: Tensor) -> Tensor:
        """float32 (b, m): of candidates `rows` to candidates `others`, int64 (b,) and (m,)."""
        values = _products(self.features[rows], self.features[others], None)
        return self._finish_(values, self._terms(rows), self._terms(others))

    @abstractmethod
    def own(self) -> Tensor:
        """float32 (N,): of each candidate to itself."""

    @abstractmethod
    def _finish_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        """Similarities from inner products (b, r), in place; `left` (b,) and `right` (r,) are terms of the rows."""

    def _terms(self, rows: Tensor | slice) -> Tensor | None:
        """What `_finish_` must know of candidates besides products."""
        return None

    def _reference_terms(self, span: slice) -> Tensor | None:
        return None


class Cosine(Similarity):
    """max(0, cos). Scales the rows of `features` to length 1 in place."""

    def __init__(self, features: Tensor, references: Tensor | None = None) -> None:
        _scale_rows_(features)
        super().__init__(features, references)

    def own(self) -> Tensor:
        return self.features.square().sum(dim=1)

    def _finish_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        return products.clamp_(min=0)


class ShiftedCosine(Cosine):
    """(1 + cos) / 2. Scales the rows of `features` to length 1 in place."""

    def own(self) -> Tensor:
        return (1 + super().own()) / 2

    def _finish_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        return products.add_(1).div_(2).clamp_(min=0)


class _OfDistances(Similarity):
    """What follows from distances: ||x - y||^2 = ||x||^2 + ||y||^2 - 2 <x, y>, never below 0.

    All three terms are products of one kind, so that the distance between equal rows is exactly 0; between others the
    square is off by some 1e-7 of ||x||^2.
    """

    def __init__(self, features: Tensor, references: Tensor | None = None) -> None:
        super().__init__(features, references)
        self.squares = _own_products(features)  # (N,)
        self.other_squares = self.squares if references is None else self.squares[references]

    def _terms(self, rows: Tensor | slice) -> Tensor:
        return self.squares[rows]

    def _reference_terms(self, span: slice) -> Tensor:
        return self.other_squares[span]

    def _squared_distances_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        assert left is not None and right is not None
        return products.mul_(-2).add_(left[:, None] + right).clamp_(min=0)


class Rbf(_OfDistances):
    """exp(-||x - y||^2 / (2 h^2)).

    Args:
        bandwidth: h, in units of the features.
    """

    def __init__(self, features: Tensor, references: Tensor | None = None, *, bandwidth: float) -> None:
        super().__init__(features, references)
        self.bandwidth = bandwidth

    def own(self) -> Tensor:
        return torch.ones_like(self.squares)

    def _finish_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        squares = self._squared_distances_(products, left, right)
        return squares.mul_(-1 / (2 * self.bandwidth**2)).exp_()


class Distance(_OfDistances):
    """2 max ||z|| - ||x - y||: no distance is greater than twice the greatest length."""

    def __init__(self, features: Tensor, references: Tensor | None = None) -> None:
        super().__init__(features, references)
        self.greatest = 2 * self.squares.max().sqrt()

    def own(self) -> Tensor:
        return self.greatest.expand(len(self.squares))

    def _finish_(self, products: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
        distances = self._squared_distances_(products, left, right).sqrt_()
        return distances.neg_().add_(self.greatest).clamp_(min=0)


def similarity_of(
    features: Tensor,
    kind: SimilarityKind,
    *,
    references: Tensor | None = None,
    bandwidth: float | Literal["median"] = "median",
    seed: int = 0,
) -> Similarity:
    """The similarity of this kind.

    Args:
        features: float32 (N, D), centred. The cosines scale its rows to length 1 in place.
        references: int64 (R,), rows; None takes all.
        bandwidth: of rbf; `median` takes `median_distance`.
        seed: draws the sample for it.
    """
    if kind == "rbf":
        width = median_distance(features, seed=seed) if bandwidth == "median" else bandwidth
        return Rbf(features, references, bandwidth=width)
    plain: dict[str, type[Similarity]] = {
        "cosine": Cosine,
        "shifted_cosine": ShiftedCosine,
        "distance": Distance,
    }
    return plain[kind](features, references)


def refuse_non_finite(features: Tensor) -> None:
    """Raise NonFiniteError where features (N, D) hold NaN or infinite values."""
    for start in range(0, len(features), _ROWS_AT_ONCE):
        wrong = ~features[start : start + _ROWS_AT_ONCE].isfinite().all(dim=1)
        if bool(wrong.any()):
            raise NonFiniteError(
                "features are NaN or infinite, and have no similarities",
                found=f"row {start + int(wrong.nonzero()[0])} of {len(features)}",
                fix="look at the images, or measure in other features",
            )


def median_distance(features: Tensor, *, seed: int) -> float:
    """The median distance between different rows of a random sample of 1,000; 1 where no rows differ."""
    order = torch.randperm(len(features), generator=generator(seed, "bandwidth"))[:_BANDWIDTH_ROWS]
    distances = F.pdist(features[order.to(features.device)])
    apart = distances[distances > 0]
    return float(apart.median()) if len(apart) else 1.0


def spans(references: int) -> list[slice]:
    """All references in parts that are large enough for speed and small enough for memory.

    Sums over references follow these parts, so that their rounding is the same wherever they are taken.
    """
    return [slice(start, min(start + _SPAN, references)) for start in range(0, references, _SPAN)]


def similarity_sums(similarity: Similarity, *, out: Tensor | None = None) -> Tensor:
    """sum_i s_ij of every candidate: float64 (N,).

    Where the references are the candidates, the half of all pairs is computed, and each tile counts for two.

    Args:
        similarity: of N candidates to R references.
        out: float32 (N, R), where the similarities are left.
    """
    candidates, references = similarity.size
    symmetric = similarity.references is None
    sums = torch.zeros(candidates, dtype=torch.float64, device=similarity.device)
    for top in range(0, candidates, _TILE):
        rows = slice(top, min(top + _TILE, candidates))
        for left in range(top if symmetric else 0, references, _TILE):
            columns = slice(left, min(left + _TILE, references))
            tile = similarity.block(rows, columns, out=None if out is None else out[rows, columns])
            sums[rows] += tile.sum(dim=1)
            if symmetric and left > top:
                sums[columns] += tile.sum(dim=0)
                if out is not None:
                    out[columns, rows] = tile.T
    return sums


def _products(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
    """(b, r): inner products of rows, summed over `_DEPTH` features at a time."""
    b, r = len(left), len(right)
    if b < _LEAST or r < _LEAST:
        products = _products(_filled(left), _filled(right), None)[:b, :r]
        return products if out is None else out.copy_(products)
    products = torch.mm(left[:, :_DEPTH], right[:, :_DEPTH].T, out=out)
    for start in range(_DEPTH, left.shape[1], _DEPTH):
        part = slice(start, start + _DEPTH)
        products.addmm_(left[:, part], right[:, part].T)
    return products


def _own_products(features: Tensor) -> Tensor:
    """<x, x> of every row (N,), to the bit what `_products` gives."""
    parts = [_products(part, part, None).diagonal() for part in features.split(_OWN_AT_ONCE)]
    return torch.cat(parts)


def _filled(rows: Tensor) -> Tensor:
    """At least `_LEAST` rows, by rows of zeros."""
    return F.pad(rows, (0, 0, 0, max(_LEAST - len(rows), 0)))


def _scale_rows_(features: Tensor) -> None:
    """Rows to length 1, in place; rows of zeros stay."""
    for start in range(0, len(features), _ROWS_AT_ONCE):
        part = features[start : start + _ROWS_AT_ONCE]
        lengths = torch.linalg.vector_norm(part, dim=1, keepdim=True)
        part.div_(torch.where(lengths > 0, lengths, 1))
