"""Exact k nearest neighbours among the rows of a matrix, block by block on its device.

Distances are ||a - b||_2 of the differences in the features' own precision; of equal ones the row with the lowest
number is nearer, and no row is its own neighbour. Neither depends on the block size, and no n x n matrix exists.

All distances from differences cost some 30 times a matrix product. So each block first ranks all rows by

    l_ij = (1 - c) |b_j|^2 - 2 <a_i, b_j>,    c = 4 (D + 8) eps,

which with (1 - c) |a_i|^2 added is below ||a_i - b_j||^2 however the product rounds: a sum of D terms is off by at most
D eps / 2 times the sum of their sizes (Higham, "Accuracy and Stability of Numerical Algorithms", 2002, eq. 3.5), and
the rounding of the distances that are compared is counted in. The few rows that rank first are measured by their
differences, and taken where the k-th of them is nearer than any other row can be. Where it is not, as among more
duplicates than are measured, the row is measured against all.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SPARE = 8  # rows measured beyond k
_PAIR_BYTES = 20  # of a pair in a block: its bound, its distance, two masks and a running count


def nearest_neighbours(features: Tensor, k: int, *, block_bytes: int = 256 << 20) -> tuple[Tensor, Tensor]:
    """The k nearest other rows of every row; all others where there are fewer.

    Args:
        features: float (N, D), finite; centred ones are found soonest.
        k: at least 1.
        block_bytes: of what is computed at once, as far as one row allows.

    Returns:
        Distances (N, min(k, N - 1)), ascending, and the numbers of the rows, int64 of that shape; of equal distances
        the lowest number first.
    """
    assert k >= 1, "neighbours are asked for"
    n, width = features.shape
    k = min(k, n - 1)
    distances = features.new_empty(n, k)
    numbers = torch.empty(n, k, dtype=torch.int64, device=features.device)
    if k < 1:
        return distances, numbers
    squares = features.square().sum(dim=1)  # (N,)
    row_bytes = _PAIR_BYTES * n + (k + _SPARE) * width * features.element_size()
    size = max(1, block_bytes // row_bytes)
    for start in range(0, n, size):
        rows = torch.arange(start, min(start + size, n), device=features.device)
        found, places, sure = _ranked(features, squares, rows, k)
        if not sure.all():
            found[~sure], places[~sure] = _measured(features, rows[~sure], k)
        distances[rows], numbers[rows] = found, places
    return distances, numbers


def _ranked(features: Tensor, squares: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbours of `rows` (B,) among those that rank first: distances (B, k), numbers (B, k), which are sure (B,)."""
    n, width = features.shape
    kept = 1 - 4 * (width + 8) * torch.finfo(features.dtype).eps
    own = features[rows]
    bounds = torch.addmm(kept * squares, own, features.T, alpha=-2)  # (B, N)
    bounds.scatter_(1, rows[:, None], torch.inf)
    few = min(k + _SPARE, n - 1)
    lowest, places = bounds.topk(few, largest=False)
    places = places.sort(dim=1).values
    # One measure for both roads: of equal rows both give equal bits.
    found = _differences(own[:, None], features[places])[:, 0]  # (B, few)
    order = found.argsort(dim=1, stable=True)[:, :k]
    found, places = found.gather(1, order), places.gather(1, order)
    if few == n - 1:
        return found, places, torch.ones_like(rows, dtype=torch.bool)
    rest = lowest.amax(dim=1) + kept * squares[rows]
    return found, places, found[:, -1].square() < rest


def _measured(features: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbours of `rows` (B,) by their distances to all: distances (B, k), numbers (B, k)."""
    found = _differences(features[rows], features)  # (B, N)
    found.scatter_(1, rows[:, None], torch.inf)
    last = found.kthvalue(k, dim=1, keepdim=True).values
    nearer, equal = found < last, found == last
    equal &= equal.cumsum(dim=1) <= k - nearer.sum(dim=1, keepdim=True)
    places = (nearer | equal).nonzero()[:, 1].view(len(rows), k)  # ascending in each row
    found = found.gather(1, places)
    order = found.argsort(dim=1, stable=True)
    return found.gather(1, order), places.gather(1, order)


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """||a_i - b_j||_2 from the differences."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
