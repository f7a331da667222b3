"""Optimal transport between two sets of points: exact while it is small, entropic above.

    min_P sum_ij P_ij c_ij,   P >= 0,  P 1 = a,  P^T 1 = b

Exact by the network simplex of POT (Flamary et al., "POT: Python Optimal Transport", JMLR 2021; Bonneel et al.,
"Displacement Interpolation Using Lagrangian Mass Transport", SIGGRAPH Asia 2011) on few arcs at a time: the simplex
is given those that potentials of a similar problem say are cheap, and then those that its own potentials leave too
dear, until no arc is (column generation: the answer is that of all arcs). Begun from potentials of the size before that
takes a third of the time of the simplex on all arcs, and no dense plan.
Entropic in dataselect/sinkhorn.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dataselect.distances import Distances, Transport
from dataselect.sinkhorn import TOLERANCE, sinkhorn

_ARCS = 8  # for each point, that the simplex begins with
_SAMPLE = 1 << 14  # of the distances, from which it is told what is cheap
_DEARER = 1e-9  # by which potentials may exceed a distance
_CACHED = 1 << 17  # distances looked at at once: what a processor keeps near
_PIVOTS = 1_000_000_000
_GOLDEN = (5**0.5 - 1) / 2  # its multiples fill an interval evenly, whatever the rows' length
_OPTIMAL = 1  # POT's word for it


@dataclass(frozen=True)
class Solver:
    """How transports are solved.

    Args:
        exact_entries: distances up to which they are exact.
        warn: told of a transport that did not converge.
    """

    exact_entries: int
    warn: Callable[[str], None]

    def solve(self, distances: Distances, *, start: Tensor | None = None) -> Transport:
        """Transport between all x and all y of the distances, each side's masses alike.

        Args:
            distances: (n, m).
            start: potentials g (m,) of a similar problem.
        """
        n, m = distances.shape
        device = distances.y.device
        return self.solve_masses(
            distances,
            torch.full((n,), 1 / n, dtype=torch.float64, device=device),
            torch.full((m,), 1 / m, dtype=torch.float64, device=device),
            start=start,
        )

    def solve_masses(
        self, distances: Distances, a: Tensor, b: Tensor, *, start: Tensor | None = None
    ) -> Transport:
        """Transport masses a (n,) to b (m,), float64, above 0, sum 1."""
        n, m = distances.shape
        if n * m <= self.exact_entries:
            return exact(distances, a, b, start=start)
        found = sinkhorn(distances, a, b, start=start)
        if not found.error < TOLERANCE:
            self.warn(
                f"the transport of {n} samples to {m} of the target has not converged: its masses are off by "
                f"{found.error:.1e} in all, {TOLERANCE:g} is wanted; the distance it gives is too low"
            )
        return found


def exact(distances: Distances, a: Tensor, b: Tensor, *, start: Tensor | None = None) -> Transport:
    """Transport masses a (n,) to b (m,), both above 0 and of sum 1, at the least cost.

    Args:
        distances: (n, m).
        a, b: float64.
        start: potentials g (m,), of any scale.
    """
    costs = distances.whole().cpu().numpy()
    supply, demand = (each.double().cpu().numpy() for each in (a, b))
    demand = demand * (supply.sum() / demand.sum())  # to the last bit
    g = np.zeros(costs.shape[1]) if start is None else start.double().cpu().numpy()
    # Some way to move all mass must be among the arcs.
    arcs = _together(costs.size, _cheap(costs, g), _staircase(supply, demand))
    while True:
        f, g, cost = _simplex(supply, demand, arcs, costs)
        dear = _too_dear(costs, f, g)
        if not len(dear):
            device = distances.y.device
            return Transport(cost, torch.from_numpy(f).to(device), torch.from_numpy(g).to(device))
        arcs = np.concatenate([arcs, dear])


# Arcs are int64 numbers of the entries of the (n, m) costs, row by row.


def _simplex(
    a: np.ndarray, b: np.ndarray, arcs: np.ndarray, costs: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Potentials f (n,) and g (m,), and the cost, of the transport along some arcs."""
    import ot  # takes a second, and is not always needed
    from scipy.sparse import coo_matrix

    along = coo_matrix((_values(costs, arcs), np.divmod(arcs, costs.shape[1])), shape=costs.shape)
    _, told = ot.emd(a, b, along, numItermax=_PIVOTS, log=True, center_dual=False)
    assert told["result_code"] == _OPTIMAL, f"the staircase is feasible: {told['warning']}"
    return told["u"], told["v"], float(told["cost"])


def _cheap(costs: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Arcs of little reduced cost c_ij - f_i - g_j, with f_i = min_j c_ij - g_j: about `_ARCS` for each point.

    How little is told by a sample of them, spread evenly; of many that are alike, at most twice as many are taken.
    """
    reduced = costs - g.astype(np.float32)
    reduced -= reduced.min(axis=1, keepdims=True)
    flat = reduced.reshape(-1)
    count = min(_ARCS * sum(costs.shape), flat.size)
    spread = np.arange(min(_SAMPLE, flat.size)) * _GOLDEN % 1
    sample = flat[(spread * flat.size).astype(np.int64)]
    place = min(count * len(sample) // flat.size, len(sample) - 1)
    most = np.partition(sample, place)[place]
    return np.flatnonzero(flat <= most)[: 2 * count]


def _too_dear(costs: np.ndarray, f: np.ndarray, g: np.ndarray) -> np.ndarray:
    """The arcs with f_i + g_j > c_ij: sifted in float32 with room for its rounding, and judged in float64."""
    rounding = 4 * np.finfo(np.float32).eps * (np.abs(f).max() + np.abs(g).max() + costs.max())
    f32, g32 = f.astype(np.float32), g.astype(np.float32)
    found = []
    size = max(1, _CACHED // costs.shape[1])
    for start in range(0, len(f), size):
        left = costs[start : start + size] - f32[start : start + size, None]
        left -= g32
        found.append(np.flatnonzero(left < rounding) + start * costs.shape[1])
    tight = np.concatenate(found)
    rows, columns = np.divmod(tight, costs.shape[1])
    return tight[_values(costs, tight) - f[rows] - g[columns] < -_DEARER]


def _staircase(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The arcs of the north-west corner rule, n + m - 1 of them."""
    steps = np.argsort(np.concatenate([a.cumsum()[:-1], b.cumsum()[:-1]]), kind="stable")
    down = np.concatenate([[False], steps < len(a) - 1])
    return down.cumsum() * len(b) + (~down).cumsum() - 1


def _together(entries: int, *parts: np.ndarray) -> np.ndarray:
    """The arcs of all parts, each once, in order; of so many entries."""
    there = np.zeros(entries, dtype=bool)
    for part in parts:
        there[part] = True
    return np.flatnonzero(there)


def _values(costs: np.ndarray, arcs: np.ndarray) -> np.ndarray:
    """float64 (len(arcs),)."""
    return costs.reshape(-1)[arcs].astype(np.float64)
