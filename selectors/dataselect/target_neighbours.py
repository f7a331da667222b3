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
_TILE = 4096  # candidates at once
_TARGETS = 256  # targets at once
_ENTRIES = 1 << 22  # of the rows of a tile, and of its keys with those held, at most; 8 bytes each


def nearest(
    candidates: Tensor, targets: Tensor, depth: int, *, among: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The nearest candidates of every target, by blocks of targets.

    What is held at once does not grow with N or M, and with `depth` only where that alone is more than `_ENTRIES`.

    Args:
        candidates: float32 (N, D), lengths at most 1; may lie in a file.
        targets: float32 (M, D), alike, on the device that computes.
        depth: how many of each target, at most N.
        among: rows of candidates, int64 (n,), that alone are there; found rows are places in it. None is all.

    Yields:
        A block of targets; its candidates' rows, int64 (B, depth), nearest first, ties to the lowest row; and their
        squared distances float64 (B, depth), to 2^-29.
    """
    there = len(candidates) if among is None else len(among)
    assert 1 <= depth <= there < 1 << _ROW_BITS
    tile = max(1, min(_TILE, _ENTRIES // candidates.shape[1]))
    size = max(1, min(_TARGETS, _ENTRIES // (2 * depth + tile), _ENTRIES // candidates.shape[1]))
    for start in range(0, len(targets), size):
        block = slice(start, min(start + size, len(targets)))
        keys = torch.empty(0)
        for first in range(0, there, tile):
            place = slice(first, min(first + tile, there))
            rows = candidates[place] if among is None else candidates[among[place].to(candidates.device)]
            found = _keys(rows, targets[block], first)
            keys = found if first == 0 else torch.cat([keys, found], dim=1)
            if keys.shape[1] >= 2 * depth or place.stop == there:  # sorted out once a depth, not once a tile
                keys = keys.topk(min(depth, keys.shape[1]), dim=1, largest=False).values
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


def times_near(candidates: Tensor, targets: Tensor, depth: int, *, among: Tensor | None = None) -> Tensor:
    """Of how many targets each candidate (or each `among` them) is one of the `depth` nearest: int64 (N,)."""
    there = len(candidates) if among is None else len(among)
    times = torch.zeros(there, dtype=torch.int64, device=targets.device)
    for _, rows, _ in nearest(candidates, targets, depth, among=among):
        times += torch.bincount(rows.flatten(), minlength=there)
    return times


def _keys(candidates: Tensor, targets: Tensor, first: int) -> Tensor:
    """int64 (M, N): the squared distance on the grid, then the row number, counted from `first`."""
    x, y = candidates.to(targets.device, torch.float64), targets.double()
    squares = torch.addmm(y.square().sum(dim=1)[:, None] + x.square().sum(dim=1), y, x.T, alpha=-2)
    rows = torch.arange(first, first + len(x), device=targets.device)
    return (squares.clamp_(min=0).mul_(_GRID).round_().long() << _ROW_BITS) | rows
