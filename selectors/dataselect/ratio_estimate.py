"""How many candidates resemble the target: sizes at which a part of the target is best moved to the rest of it.

The target is cut into K folds. The held fold proposes U_k, the k nearest candidates of each of its samples, as far as
their similarity is positive; the size of the fold is  k* = argmin_k OT(uniform(U_k), uniform(the other folds)).  The
union of U_{k*} over folds is the selection, and its share of the candidates the ratio (Feng et al., "TAROT: Targeted
Data Selection via Optimal Transport", ICML 2025, arXiv 2412.00420, section 3: optimal transport minimisation).

What we do differently: the release walks k = 1, 2, ..., solves each transport from scratch, and stops at the first
increase, one size too late and often too early: the curve is noisy. We keep the least of all k. Few of them have to be
solved: the transport is convex in the masses, and any feasible potentials (f, g) bound it for every k at once,

    OT_k >= mean_{i in U_k} f_i + mean_j g_j,

so that the k of the least bound is solved next, until no bound is below the best by more than a `tolerance`. Bounds of
one fold serve the others, since potentials extend to all samples of the target. That takes about 5 transports a fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dataselect.distances import Distances, feasible
from dataselect.target_neighbours import layers
from dataselect.transport import Solver
from distill.errors import InputError
from distill.randomness import generator

_DEPTH = 64  # neighbours looked at first; four times as many wherever the best is beyond half of them
_POSITIVE = 2.0  # squared distance of unit rows below which their similarity is positive


@dataclass(frozen=True)
class FoldCurve:
    """The transports solved for one fold.

    Args:
        neighbours: k* of the least distance; 0 where no candidate has a positive similarity to the fold.
        points: (k, samples proposed, distance), by k.
    """

    neighbours: int
    points: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Ratio:
    """What resembles the target.

    Args:
        layer: int64 (N,), the least rank of each candidate among the neighbours of any target, where a fold chose it;
            `depth` for those not chosen.
        depth: greatest k* of a fold.
        curves: one a fold.
    """

    layer: Tensor
    depth: int
    curves: tuple[FoldCurve, ...]


def estimate_ratio(
    candidates: Tensor,
    target: Tensor,
    *,
    folds: int,
    tolerance: float,
    seed: int,
    solver: Solver,
    memory: int,
    advance: Callable[[], None],
) -> Ratio:
    """Find the candidates that resemble the target, and so how many.

    Args:
        candidates: float32 (N, D), length 1.
        target: float32 (M, D), length 1, M at least `folds`.
        folds: K.
        tolerance: a size is not solved where it cannot be better by this share of the distance.
        seed: of the cut into folds.
        solver: of the transports.
        memory: as for `Distances`.
        advance: called after each fold.

    Raises:
        InputError: no candidate has a positive similarity to any sample of the target.
    """
    order = torch.randperm(len(target), generator=generator(seed, "folds")).to(target.device)
    held = [part.sort().values for part in order.tensor_split(folds)]
    depth = min(_DEPTH, len(candidates))
    known: list[Tensor] = []
    while True:
        by_fold = [layers(candidates, target[part], depth, within=_POSITIVE).int() for part in held]
        pool = (torch.stack(by_fold).amin(dim=0) < depth).nonzero()[:, 0]
        _refuse_unlike(len(pool))
        bounds = _Bounds(Distances(candidates[pool.to(candidates.device)], target, memory=memory), known)
        curves = []
        for part, layer in zip(held, by_fold, strict=True):
            curves.append(_search(bounds, part, layer[pool], depth, tolerance=tolerance, solver=solver))
            advance()
        deepest = max(curve.neighbours for curve in curves)
        if 2 * deepest <= depth or depth == len(candidates):
            break
        depth, known = min(4 * depth, len(candidates)), bounds.of_target
    layer = torch.full((len(candidates),), deepest, device=target.device)
    for own, curve in zip(by_fold, curves, strict=True):
        layer = torch.where(own < curve.neighbours, torch.minimum(layer, own), layer)
    return Ratio(layer, deepest, tuple(curves))


class _Bounds:
    """Lower bounds of transports between candidates and samples of the target, from potentials.

    Args:
        distances: (n, M), of candidates that some fold proposes to all of the target.
        known: potentials (M,) to begin with.
    """

    def __init__(self, distances: Distances, known: list[Tensor]) -> None:
        self.distances = distances
        self.of_candidates: list[Tensor] = []
        self.of_target: list[Tensor] = []
        for potentials in known:
            self.add(potentials)

    def add(self, potentials: Tensor) -> None:
        """Take potentials (M,) of the target, -inf where a sample had no part in a transport."""
        f, g = feasible(self.distances, potentials)
        self.of_candidates.append(f.double())
        self.of_target.append(g.double())

    def of_prefixes(self, order: Tensor, sizes: Tensor, others: Tensor) -> Tensor:
        """The greatest bound for the first `sizes` of `order`, each transported to `others`: (len(sizes),)."""
        found = torch.full(sizes.shape, -torch.inf, dtype=torch.float64, device=sizes.device)
        for f, g in zip(self.of_candidates, self.of_target, strict=True):
            found = torch.maximum(found, f[order].cumsum(dim=0)[sizes - 1] / sizes + g[others].mean())
        return found

    def nearest_potentials(self, others: Tensor) -> Tensor | None:
        """Potentials of the last transport."""
        return self.of_target[-1][others] if self.of_target else None


def _search(
    bounds: _Bounds, held: Tensor, layer: Tensor, depth: int, *, tolerance: float, solver: Solver
) -> FoldCurve:
    """The best k of one fold.

    Args:
        bounds: shared by all folds.
        held: the fold, int64.
        layer: (n,) of the pool's candidates, as the fold proposes them.
        depth: greatest k.
    """
    rest = torch.ones(bounds.distances.shape[1], dtype=torch.bool, device=held.device)
    rest[held] = False
    others = rest.nonzero()[:, 0]
    order = layer.argsort(stable=True)
    proposed = torch.bincount(layer, minlength=depth + 1)[:depth]
    ks = proposed.nonzero()[:, 0] + 1  # a k that proposes nobody new is the set before it
    if not len(ks):
        return FoldCurve(0, ())
    sizes = proposed.cumsum(dim=0)[ks - 1]
    lower = bounds.of_prefixes(order, sizes, others)
    open_ = torch.ones_like(ks, dtype=torch.bool)
    solved: dict[int, tuple[int, float]] = {}
    place = int(lower.argmin()) if bounds.of_target else len(ks) // 4
    while True:
        size = int(sizes[place])
        found = solver.solve(
            bounds.distances.part(order[:size], others), start=bounds.nearest_potentials(others)
        )
        solved[int(ks[place])] = (size, found.cost)
        open_[place] = False
        potentials = torch.full((len(rest),), -torch.inf, dtype=torch.float64, device=held.device)
        potentials[others] = found.g
        bounds.add(potentials)
        lower = bounds.of_prefixes(order, sizes, others).masked_fill(~open_, torch.inf)
        best = min(cost for _, cost in solved.values())
        place = int(lower.argmin())
        if float(lower[place]) >= best * (1 - tolerance):
            break
    points = tuple((k, *solved[k]) for k in sorted(solved))
    return FoldCurve(min(points, key=lambda point: point[2])[0], points)


def _refuse_unlike(proposed: int) -> None:
    if not proposed:
        raise InputError(
            "no sample of the data resembles the target: none has a positive similarity to any of it",
            where="size",
            found="size: estimate",
            fix="choose other features, or size: budget with fraction or count",
        )
