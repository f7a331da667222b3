"""Distances between two sets of rows, kept in memory where they fit and else computed block by block; and potentials.

A transport of masses a to b at cost c has the dual  max sum_i a_i f_i + sum_j b_j g_j,  f_i + g_j <= c_ij  (Peyré and
Cuturi, "Computational Optimal Transport", 2019, eq. 2.20). Any feasible pair bounds the cost of every transport between
these points from below, whatever the masses; at the optimum f_i is what more mass at i costs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ENTRIES = 1 << 24  # of a block at most, of float64 rows or of distances
_CACHED = 1 << 17  # of a block of distances that are kept: what a processor keeps near


@dataclass(frozen=True)
class Transport:
    """What moving masses a (n,) to b (m,) costs.

    Args:
        cost: the mean distance moved.
        f: potentials float64 (n,), the derivative of the cost by the masses a, up to a constant.
        g: potentials float64 (m,), by b; f_i + g_j <= c_ij.
        error: by how much the plan misses its marginals, the greater of sum_i |sum_j P_ij - a_i| and
            sum_j |sum_i P_ij - b_j|; 0 where it is exact.
    """

    cost: float
    f: Tensor
    g: Tensor
    error: float = 0.0


class Distances:
    """||x_i - y_j||_2, float32 (n, m), on the device of y.

    Computed in float64 from the rows, so that equal rows are no distance apart. Rows are gathered as they are needed:
    x and y may lie in files larger than memory.

    Args:
        x: (N, D).
        y: (M, D).
        memory: bytes that the distances, a part of them and a plan may take; beyond it nothing n x m is kept.
        rows: which of x, int64 (n,); None is all.
    """

    def __init__(self, x: Tensor, y: Tensor, *, memory: int, rows: Tensor | None = None) -> None:
        self.x, self.y, self.memory = x, y, memory
        self.rows = torch.arange(len(x)) if rows is None else rows.cpu()
        self.columns: Tensor | None = None
        self.shape = (len(self.rows), len(y))
        self.kept: Tensor | None = None
        if 3 * 4 * self.shape[0] * self.shape[1] <= memory:
            kept = torch.empty(self.shape, device=y.device)
            for rows_, block in self.blocks():
                kept[rows_] = block
            self.kept = kept

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows and their distances (rows, m): not to be changed in place."""
        for rows in self._slices():
            yield rows, self._between(rows) if self.kept is None else self.kept[rows]

    def part(self, rows: Tensor, columns: Tensor) -> Distances:
        """The distances of some rows x to some rows y: int64 numbers."""
        found = self._narrowed(self.rows[rows.cpu()], len(columns))
        found.columns = columns if self.columns is None else self.columns[columns]
        if self.kept is not None:
            found.kept = self.kept.new_empty(found.shape)
            for block in found._slices():
                found.kept[block] = self.kept.index_select(0, rows[block]).index_select(1, columns)
        return found

    def first(self, count: int) -> Distances:
        """The distances of the first rows x, which share the memory of these."""
        found = self._narrowed(self.rows[:count], self.shape[1])
        found.columns = self.columns
        found.kept = None if self.kept is None else self.kept[:count]
        return found

    def whole(self) -> Tensor:
        """(n, m), all at once: not to be changed in place."""
        return torch.cat([block for _, block in self.blocks()]) if self.kept is None else self.kept

    def _narrowed(self, rows: Tensor, columns: int) -> Distances:
        found = Distances.__new__(Distances)
        found.x, found.y, found.memory, found.rows = self.x, self.y, self.memory, rows
        found.shape = (len(rows), columns)
        found.kept = None
        return found

    def _slices(self) -> Iterator[slice]:
        width = self.shape[1] if self.kept is not None else max(self.shape[1], self.x.shape[1])
        fast = self.kept is not None and self.y.device.type == "cpu"
        size = max(1, (_CACHED if fast else _ENTRIES) // width)
        for start in range(0, self.shape[0], size):
            yield slice(start, min(start + size, self.shape[0]))

    def _between(self, rows: slice) -> Tensor:
        """float32 (rows, m): y, too, is turned to float64 in blocks."""
        device = self.y.device
        x = self.x[self.rows[rows].to(self.x.device)].to(device, torch.float64)
        lengths = x.square().sum(dim=1)[:, None]
        out = torch.empty(len(x), self.shape[1], device=device)
        size = max(1, _ENTRIES // x.shape[1])
        for start in range(0, self.shape[1], size):
            place = slice(start, min(start + size, self.shape[1]))
            y = (self.y[place] if self.columns is None else self.y[self.columns[place]]).double()
            squares = torch.addmm(lengths + y.square().sum(dim=1), x, y.T, alpha=-2)
            out[:, place] = squares.clamp_(min=0).sqrt_()
        return out


def feasible(distances: Distances, g: Tensor) -> tuple[Tensor, Tensor]:
    """The best potentials f for g, then the best g for them: f (n,) and g (m,), float32, feasible.

    Args:
        distances: (n, m).
        g: (m,), any.
    """
    f = torch.empty(distances.shape[0], device=g.device)
    best = torch.full(g.shape, torch.inf, device=g.device)
    g = g.float()
    for rows, block in distances.blocks():
        f[rows] = (block - g).amin(dim=1)
        best = torch.minimum(best, (block - f[rows, None]).amin(dim=0))
    return f, best


def of_rows(distances: Distances, g: Tensor) -> Tensor:
    """The best potentials f (n,) for g (m,), float32: f_i = min_j c_ij - g_j."""
    g = g.float()
    return torch.cat([(block - g).amin(dim=1) for _, block in distances.blocks()])


def of_columns(distances: Distances, f: Tensor) -> Tensor:
    """The best potentials g (m,) for f (n,), float32: g_j = min_i c_ij - f_i."""
    g = torch.full((distances.shape[1],), torch.inf, device=f.device)
    for rows, block in distances.blocks():
        g = torch.minimum(g, (block - f[rows, None].float()).amin(dim=0))
    return g
