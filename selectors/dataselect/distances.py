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

_ENTRIES = 1 << 24  # of a block at most


@dataclass(frozen=True)
class Transport:
    """What moving masses a (n,) to b (m,) costs.

    Args:
        cost: the mean distance moved.
        f: potentials float64 (n,), the derivative of the cost by the masses a, up to a constant.
        g: potentials float64 (m,), by b; f_i + g_j <= c_ij.
        error: by how much the plan misses its marginals, sum_i |sum_j P_ij - a_i|; 0 where it is exact.
    """

    cost: float
    f: Tensor
    g: Tensor
    error: float = 0.0


class Distances:
    """||x_i - y_j||_2, float32 (n, m), on the device of y.

    Computed in float64 from the rows, so that equal rows are no distance apart.

    Args:
        x: (n, D).
        y: (m, D).
        memory: bytes that the distances and a plan of their size may take; beyond it nothing n x m is kept.
    """

    def __init__(self, x: Tensor, y: Tensor, *, memory: int) -> None:
        self.x, self.y, self.memory = x, y, memory
        self.shape = (len(x), len(y))
        self.kept: Tensor | None = None
        if 2 * 4 * len(x) * len(y) <= memory:
            self.kept = torch.empty(self.shape, device=y.device)
            for rows in self._slices():
                self.kept[rows] = _between(x[rows], y)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive rows and their distances (rows, m): not to be changed in place."""
        for rows in self._slices():
            yield rows, _between(self.x[rows], self.y) if self.kept is None else self.kept[rows]

    def part(self, rows: Tensor, columns: Tensor) -> Distances:
        """The distances of some rows x to some rows y: int64 numbers."""
        found = Distances.__new__(Distances)
        found.x, found.y, found.memory = self.x[rows.to(self.x.device)], self.y[columns], self.memory
        found.shape = (len(rows), len(columns))
        found.kept = None if self.kept is None else self.kept[rows][:, columns]
        return found

    def whole(self) -> Tensor:
        """(n, m), all at once."""
        return torch.cat([block for _, block in self.blocks()])

    def _slices(self) -> Iterator[slice]:
        size = max(1, _ENTRIES // self.shape[1])
        for start in range(0, self.shape[0], size):
            yield slice(start, min(start + size, self.shape[0]))


def feasible(distances: Distances, g: Tensor) -> tuple[Tensor, Tensor]:
    """The best potentials f for g, then the best g for them: f (n,) and g (m,), float32, feasible.

    Args:
        distances: (n, m).
        g: (m,), any; -inf where there is none yet.
    """
    f = torch.empty(distances.shape[0], device=g.device)
    best = torch.full(g.shape, torch.inf, device=g.device)
    g = g.float()
    for rows, block in distances.blocks():
        f[rows] = (block - g).amin(dim=1)
        best = torch.minimum(best, (block - f[rows, None]).amin(dim=0))
    return f, best


def _between(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.to(y.device, torch.float64), y.double()
    squares = torch.addmm(x.square().sum(dim=1)[:, None] + y.square().sum(dim=1), x, y.T, alpha=-2)
    return squares.clamp_(min=0).sqrt_().float()
