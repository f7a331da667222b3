"""Which candidates are nearest to each target: exact, by tiles, equal however the tiles are cut.

Distances are those of float32 rows computed in float64 and brought to a grid of 2^-28 in the square, on which ties go
to the lowest row number: duplicates are the same distance away, whatever the order of summation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_GRID = 1 << 28
_ROW_BITS = 32  # of a key: below the square's, so that keys are sorted by distance, then by row
_TILE = 4096  # candidates at once, or as many as are asked for
_ENTRIES = 1 << 22  # of a tile at most, 8 bytes each


def nearest(candidates: Tensor, targets: Tensor, depth: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The nearest candidates of every target, by blocks of targets.

    Args:
        candidates: float32 (N, D), lengths at most 1.
        targets: float32 (M, D), alike, on the device that computes.
        depth: how many of each target, at most N.

    Yields:
        A block of targets; its candidates' rows, int64 (B, depth), nearest first, ties to the lowest row; and their
        squared distances float64 (B, depth), to 2^-29.
    """
    assert 1 <= depth <= len(candidates) < 1 << _ROW_BITS
    tile = max(_TILE, depth)
    size = max(1, min(256, _ENTRIES // tile))
    for start in range(0, len(targets), size):
        block = slice(start, min(start + size, len(targets)))
        keys = None
        for first in range(0, len(candidates), tile):
            found = _keys(candidates[first : first + tile], targets[block], first)
            keys = found if keys is None else torch.cat([keys, found], dim=1)
            keys = keys.topk(min(depth, keys.shape[1]), dim=1, largest=False).values
        assert keys is not None
        yield block, keys & ((1 << _ROW_BITS) - 1), (keys >> _ROW_BITS).double() / _GRID


def layers(candidates: Tensor, targets: Tensor, depth: int, *, within: float | None = None) -> Tensor:
    """How near each candidate is to the target that it is nearest to, in ranks: int64 (N,).

    Layer i holds the candidates that are the i-th nearest (from 0) of some target and in no layer before.

    Args:
        candidates, targets, depth: as for `nearest`.
        within: squared distance from which a candidate is nobody's neighbour; None is any.

    Returns:
        The layer of every candidate; `depth` for those in no layer before `depth`.
    """
    layer = torch.full((len(candidates),), depth, device=targets.device)
    for _, rows, squares in nearest(candidates, targets, depth):
        ranks = torch.arange(depth, device=targets.device).expand_as(rows)
        if within is not None:
            ranks = ranks.masked_fill(squares >= within, depth)
        layer.scatter_reduce_(0, rows.flatten(), ranks.flatten(), "amin")
    return layer


def times_near(candidates: Tensor, targets: Tensor, depth: int) -> Tensor:
    """Of how many targets each candidate is one of the `depth` nearest: int64 (N,)."""
    times = torch.zeros(len(candidates), dtype=torch.int64, device=targets.device)
    for _, rows, _ in nearest(candidates, targets, depth):
        times += torch.bincount(rows.flatten(), minlength=len(candidates))
    return times


def _keys(candidates: Tensor, targets: Tensor, first: int) -> Tensor:
    """int64 (M, N): the squared distance on the grid, then the row number, counted from `first`."""
    x, y = candidates.to(targets.device, torch.float64), targets.double()
    squares = torch.addmm(y.square().sum(dim=1)[:, None] + x.square().sum(dim=1), y, x.T, alpha=-2)
    rows = torch.arange(first, first + len(x), device=targets.device)
    return (squares.clamp_(min=0).mul_(_GRID).round_().long() << _ROW_BITS) | rows
