"""Greedy maximisation of a submodular function: lazily and exactly, or over random candidates.

Greedy adds, each time, the candidate of the greatest gain f(S + j) - f(S); for a monotone f its value is at least
(1 - 1/e) of the optimum (Nemhauser, Wolsey and Fisher 1978). Ties go to the lowest row.

- `lazy`: gains only fall as S grows, so a gain known from before is an upper bound. Candidates are evaluated from the
  greatest bound downwards until the best gain is no less than every bound left (Minoux 1978). They are evaluated in
  batches, which grow while a pick takes many; what is evaluated in vain costs time and changes nothing.
- `stochastic`: each time the best of ceil(N / k * ln(1 / epsilon)) candidates that are drawn by the seed, with
  repetition; its value is in expectation at least (1 - 1/e - epsilon) of the optimum (Mirzasoleiman et al., "Lazier
  Than Lazy Greedy", AAAI 2015, algorithm 1). Ours also remembers what it evaluated before: the few candidates of the
  greatest gains known compete each time, and of those drawn only the ones that may be better are evaluated. The
  guarantee stands, as the best of more is no worse, and what is lost is far less: a cluster's centre that was drawn
  beside a better one is not forgotten.

With costs, sum_{j in S} c_j <= limit takes the place of the count: greedy by gain per cost and greedy by gain, each
over what can still be afforded; the better of the two has at least (1 - 1/e) / 2 of the optimum (Leskovec et al.,
"Cost-effective Outbreak Detection in Networks", KDD 2007, theorem 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_LARGEST_BATCH = 512
_REMEMBERED = 16  # candidates that compete in stochastic greedy beside those drawn


COST_ROUNDING = 1e-12  # of sums of costs


class Objective(Protocol):
    """A submodular function of sets of candidates, and the set so far."""

    @property
    def batch(self) -> int:
        """So many candidates are evaluated in little more time than one."""
        ...

    def bounds(self) -> Tensor:
        """float64 (N,): no candidate's gain to the empty set, as `gains` finds it, is greater."""
        ...

    def gains(self, rows: Tensor) -> Tensor:
        """float64 (b,): gains of candidates `rows`, int64 (b,), to the set so far."""
        ...

    def add(self, row: int) -> Tensor | None:
        """Put a candidate into the set.

        Returns:
            By how much `bounds` may fall, float64 (N,): less all that was returned since, they are bounds of the gains
            to the set as it is now. None where nothing is known.
        """
        ...

    def clear(self) -> None:
        """Empty the set."""
        ...


class Picked(NamedTuple):
    """What greedy picked.

    Attributes:
        rows: int64 (n,), in the order picked, those it began with first.
        gains: float64 (n,), what each added to the function's value.
    """

    rows: Tensor
    gains: Tensor


@dataclass(frozen=True)
class Costs:
    """What candidates cost.

    Args:
        each: float64 (N,), above 0.
        limit: of the sum over the picks.
    """

    each: Tensor
    limit: float

    def too_dear(self, picked: list[int]) -> Tensor:
        """bool (N,): whose cost and those of the picks are more than the limit, but for rounding."""
        spent = math.fsum(self.each[picked].tolist())
        return self.each + spent > self.limit * (1 + COST_ROUNDING)


def untold() -> None:
    """Nobody wants to know of each pick."""


def lazy_greedy(
    objective: Objective,
    count: int,
    *,
    initial: Tensor | None = None,
    costs: Costs | None = None,
    advance: Callable[[], None] = untold,
) -> Picked:
    """Greedy, exactly.

    Args:
        objective: with the empty set.
        count: picks in all, at most N; fewer where `costs` allow no more.
        initial: int64 rows that are in the set from the beginning, at most `count`.
        costs: where a limit of costs holds.
        advance: called at each pick.
    """
    bounds = objective.bounds()
    if costs is None:
        return _lazy(objective, bounds, count, initial, None, None, advance)
    by_ratio = _lazy(objective, bounds.clone(), count, initial, costs, 1 / costs.each, advance)
    objective.clear()
    by_gain = _lazy(objective, bounds, count, initial, costs, None, advance)
    return max(by_ratio, by_gain, key=lambda picked: float(picked.gains.sum()))


def _lazy(
    objective: Objective,
    bounds: Tensor,
    count: int,
    initial: Tensor | None,
    costs: Costs | None,
    scale: Tensor | None,
    advance: Callable[[], None],
) -> Picked:
    """One run of lazy greedy by gain times `scale`; `bounds` (N,) are used up."""
    rows, gains = _begin(objective, initial)
    if scale is not None:
        bounds.mul_(scale)
    bounds[rows] = -torch.inf
    known = bounds.clone()  # gains when last evaluated
    while len(rows) < count:
        if costs is not None:
            bounds[costs.too_dear(rows)] = -torch.inf  # what is left only falls
            if not bool((bounds > -torch.inf).any()):
                break
        row, gain = _best(objective, torch.minimum(bounds, known), known, scale)
        rows.append(row)
        gains.append(gain if scale is None else gain / float(scale[row]))
        fallen = objective.add(row)
        if fallen is not None:
            bounds -= fallen if scale is None else fallen * scale
        bounds[row] = -torch.inf
        advance()
    return _picked(rows, gains, bounds.device)


def _best(objective: Objective, unknown: Tensor, known: Tensor, scale: Tensor | None) -> tuple[int, float]:
    """The row of the greatest gain (times `scale`), the lowest of several.

    Args:
        objective: with the set so far.
        unknown: float64 (N,), bounds; used up.
        known: float64 (N,), where gains that are evaluated go.
        scale: float64 (N,), of gains.
    """
    best, best_gain, batch = len(unknown), -math.inf, objective.batch
    while True:
        rows = _promising(unknown, best, best_gain, batch)
        if not len(rows):
            return best, best_gain
        gains = objective.gains(rows)
        if scale is not None:
            gains = gains * scale[rows]
        known[rows] = gains
        unknown[rows] = -torch.inf
        top = float(gains.max())
        row = int(rows[gains == top].min())
        if (top, -row) > (best_gain, -best):
            best, best_gain = row, top
        batch = min(2 * batch, _LARGEST_BATCH)


def _promising(unknown: Tensor, best: int, best_gain: float, batch: int) -> Tensor:
    """Candidates that may gain more than the best, or as much with a lower row; int64 (b,)."""
    greatest = float(unknown.max())
    if greatest == -math.inf or greatest < best_gain:
        return unknown.new_empty(0, dtype=torch.int64)
    if greatest == best_gain:
        return (unknown[:best] == best_gain).nonzero()[:, 0]
    values, rows = unknown.topk(min(batch, len(unknown)))
    if float(values[-1]) == greatest:  # of many alike the lowest rows: topk takes any
        return (unknown == greatest).nonzero()[:batch, 0]
    return rows[values > best_gain]


def stochastic_greedy(
    objective: Objective,
    count: int,
    *,
    size: int,
    epsilon: float,
    generator: torch.Generator,
    initial: Tensor | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[], None] = untold,
) -> Picked:
    """Greedy over random candidates.

    Args:
        objective: with the empty set.
        count: picks in all, at most N.
        size: N.
        epsilon: in (0, 1); what the guarantee loses.
        generator: of the CPU, which draws the candidates.
        initial: as in `lazy_greedy`.
        device: of the objective.
        advance: called at each pick.
    """
    rows, gains = _begin(objective, initial)
    known = torch.full(
        (size,), -torch.inf, dtype=torch.float64
    )  # gains when last evaluated, of who may be picked
    left = torch.ones(size, dtype=torch.bool)
    left[rows] = False
    pool = left.nonzero()[:, 0]  # the candidates not yet picked are its first `there`
    drawn = math.ceil(size / max(count - len(rows), 1) * math.log(1 / epsilon))
    for there in range(len(pool), len(pool) - count + len(rows), -1):
        places = torch.randint(there, (drawn,), generator=generator)
        row = _best_tried(objective, known, pool[places].unique(), device)
        objective.add(row)
        rows.append(row)
        gains.append(float(known[row]))
        advance()
        known[row] = -torch.inf
        pool[(pool[:there] == row).nonzero()[0]] = pool[there - 1].clone()
    return _picked(rows, gains, device)


def _best_tried(objective: Objective, known: Tensor, drawn: Tensor, device: torch.device | str) -> int:
    """The best of the candidates drawn, int64 (b,), and of those remembered, the lowest of several; updates `known`."""
    values, places = known.topk(min(_REMEMBERED, len(known)))
    tried = places[values > -torch.inf]
    best = -math.inf
    if len(tried):
        known[tried] = objective.gains(tried.to(device)).cpu()
        best = float(known[tried].max())
    may_be_better = (known[drawn] == -torch.inf) | (known[drawn] >= best)
    fresh = drawn[may_be_better & ~torch.isin(drawn, tried)]
    if len(fresh):
        known[fresh] = objective.gains(fresh.to(device)).cpu()
    tried = torch.cat([tried, fresh])
    found = known[tried]
    return int(tried[found == found.max()].min())


def _begin(objective: Objective, initial: Tensor | None) -> tuple[list[int], list[float]]:
    """The rows that are there from the beginning, and their gains, one after the other."""
    rows: list[int] = [] if initial is None else initial.tolist()
    gains = []
    for number, row in enumerate(rows):
        assert initial is not None
        gains.append(float(objective.gains(initial[number : number + 1])))
        objective.add(row)
    return rows, gains


def _picked(rows: list[int], gains: list[float], device: torch.device | str) -> Picked:
    return Picked(
        torch.tensor(rows, dtype=torch.int64, device=device),
        torch.tensor(gains, dtype=torch.float64, device=device),
    )
