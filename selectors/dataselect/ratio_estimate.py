"""How many candidates resemble the target: sizes at which a part of the target is best moved to the rest of it.

The target is cut into K folds. The held fold proposes U_k, the k nearest candidates of each of its samples, as far as
their similarity is positive; the size of the fold is  k* = argmin_k OT(uniform(U_k), uniform(the other folds)).  The
union of U_{k*} over folds is the selection, and its share of the candidates the ratio (Feng et al., "TAROT: Targeted
Data Selection via Optimal Transport", ICML 2025, arXiv 2412.00420, section 3: optimal transport minimisation).

What we do differently: the release walks k = 1, 2, ..., solves each transport from scratch, stops at the first increase
and keeps what increased it. The curve is flat and noisy about its least, so that where it first rises is chance, and so
is where it is least. We take the smallest k whose distance is within a `tolerance` of the best of all k (up to
the tolerance itself; sizes that differ by less than 2% are not told apart). Few have to be solved: any feasible
potentials (f, g) bound the transports of every k at once,

    OT_k >= mean_{i in U_k} f_i + mean_j g_j,

so that the k of the least bound is solved next, until no bound says that another may be better by the tolerance. The
bounds of one fold serve the others, since potentials extend to all samples of the target: about 5 transports a fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dataselect.distances import Distances, feasible, of_columns, of_rows
from dataselect.target_neighbours import layers
from dataselect.transport import Solver
from distill.errors import InputError
from distill.randomness import generator

_DEPTH = 256  # neighbours looked at first; four times as many wherever the best is beyond half of them
_STEP = 0.02  # by which share sizes differ that are told apart
_POSITIVE = 2.0  # squared distance of unit rows below which their similarity is positive


@dataclass(frozen=True)
class FoldCurve:
    """The transports solved for one fold.

    Args:
        neighbours: k*; 0 where no candidate has a positive similarity to the fold.
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
        tolerance: by which share of the least distance that of a smaller size may exceed it.
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
        bounds = _Bounds(Distances(candidates, target, memory=memory, rows=pool), known)
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
        """Take potentials (M,) of the target, any."""
        self._keep(*feasible(self.distances, potentials))

    def extend(self, fold: _Fold, g: Tensor) -> None:
        """Take potentials (m,) of the samples that a fold does not hold; those that it holds get the best there are."""
        f = of_rows(fold.to_others, g)
        of_target = torch.empty(self.distances.shape[1], dtype=torch.float32, device=f.device)
        of_target[fold.others] = g.float()
        of_target[fold.held] = of_columns(fold.to_held, f)
        of_candidates = torch.empty_like(f)
        of_candidates[fold.order] = f
        self._keep(of_candidates, of_target)

    def _keep(self, f: Tensor, g: Tensor) -> None:
        self.of_candidates.append(f.double())
        self.of_target.append(g.double())

    def of_prefixes(self, number: int, order: Tensor, sizes: Tensor, others: Tensor) -> Tensor:
        """What potentials `number` say of the first `sizes` of `order`, each moved to `others`: (len(sizes),)."""
        f, g = self.of_candidates[number], self.of_target[number]
        return f[order].cumsum(dim=0)[sizes - 1] / sizes + g[others].mean()


class _Fold:
    """One fold of the target, and its distances: gathered once, of which every size takes the first rows.

    Args:
        distances: (n, M), of all that some fold proposes to all of the target.
        held: the samples of the fold, int64.
        layer: (n,) as the fold proposes the candidates.
    """

    def __init__(self, distances: Distances, held: Tensor, layer: Tensor) -> None:
        rest = torch.ones(distances.shape[1], dtype=torch.bool, device=held.device)
        rest[held] = False
        self.held, self.others = held, rest.nonzero()[:, 0]
        self.order = layer.argsort(stable=True)
        self.to_others = distances.part(self.order, self.others)
        self.to_held = distances.part(self.order, held)


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
    proposed = torch.bincount(layer, minlength=depth + 1)[:depth]
    ks, sizes = _told_apart(proposed.cumsum(dim=0))
    if not len(ks):
        return FoldCurve(0, ())
    fold = _Fold(bounds.distances, held, layer)
    lower = torch.full(ks.shape, -torch.inf, dtype=torch.float64, device=ks.device)
    tightest = torch.zeros_like(ks)  # whose bound it is
    solved: dict[int, float] = {}  # by place in ks

    def bound(number: int) -> None:
        nonlocal lower
        found = bounds.of_prefixes(number, fold.order, sizes, fold.others)
        tightest[found > lower] = number
        lower = torch.maximum(lower, found)

    for number in range(len(bounds.of_target)):
        bound(number)
    place: int | None = int(lower.argmin()) if bounds.of_target else len(ks) // 4
    while place is not None:
        start = bounds.of_target[int(tightest[place])][fold.others] if bounds.of_target else None
        found = solver.solve(fold.to_others.first(int(sizes[place])), start=start)
        solved[place] = found.cost
        bounds.extend(fold, found.g)
        bound(len(bounds.of_target) - 1)
        place = _next(lower, solved, tolerance)
    points = tuple((int(ks[place]), int(sizes[place]), solved[place]) for place in sorted(solved))
    return FoldCurve(int(ks[_smallest(solved, tolerance)]), points)


def _told_apart(sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The k at which the size has grown by `_STEP` since the k before, and their sizes."""
    kept: list[tuple[int, int]] = []
    for k, size in enumerate(sizes.tolist(), start=1):
        if size > (kept[-1][1] * (1 + _STEP) if kept else 0):
            kept.append((k, size))
    ks, found = torch.tensor(kept, dtype=torch.int64, device=sizes.device).reshape(-1, 2).unbind(dim=1)
    return ks, found


def _next(lower: Tensor, solved: dict[int, float], tolerance: float) -> int | None:
    """The place to solve next, None where the answer is known.

    As long as some size may be better by the tolerance than the best, it is the one of the least bound. Then it is
    half-way among the smaller sizes than the answer so far that may be within the tolerance of the best.
    """
    left = lower.clone()
    left[list(solved)] = torch.inf
    best = min(solved.values())
    place = int(left.argmin())
    if float(left[place]) < best * (1 - tolerance):
        return place
    smaller = (left[: _smallest(solved, tolerance)] <= best * (1 + tolerance)).nonzero()[:, 0]
    return int(smaller[len(smaller) // 2]) if len(smaller) else None


def _smallest(solved: dict[int, float], tolerance: float) -> int:
    """The first place whose distance is within the tolerance of the best."""
    most = min(solved.values()) * (1 + tolerance)
    return min(place for place, cost in solved.items() if cost <= most)


def _refuse_unlike(proposed: int) -> None:
    if not proposed:
        raise InputError(
            "no sample of the data resembles the target: none has a positive similarity to any of it",
            where="size",
            found="size: estimate",
            fix="choose other features, or size: budget with fraction or count",
        )
