"""How fast TAROT selects, against a plain form of it: whitening, the estimate of the size, and the selection itself.

    python tools/bench/transport.py [--candidates 4000] [--targets 1000] [--dims 512] [--threads N] [--seed 0]

Features are planted: the target is a mixture of modes in few directions, a share of the candidates comes from the same
modes and the rest from others, all seen through a random linear map and noise below what whitening leaves alone.

The plain form does what the released code does, with its faults mended so that it answers the same question: the full
matrix of scores, all neighbours sorted, and one transport from scratch for every size k = 1, 2, ... of every fold, by
the same solver at the same precision (POT's network simplex, exact). It stops `--patience` sizes after the best, which
it keeps; the release stops at the first increase, printed besides. What either selects is judged alike: the exact
transport distance from the selection, each sample alike, to the whole target, in the same whitened features.

Times are processor time, which other work on the machine changes least. Prints a table and, as the last line, JSON with
`ratio`, how many times faster the selection is.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import ot
import scipy.linalg
import torch
from numpy.typing import NDArray

from dataselect.distances import Distances
from dataselect.ratio_estimate import estimate_ratio
from dataselect.transport import Solver
from dataselect.whitening import whiten
from distill.randomness import generator

_EPS = 1e-4
_FOLDS = 10
_SEED = 0
_MEMORY = 4 << 30
_SHARE = 0.3  # of the candidates that resemble the target
_DIRECTIONS = 32  # that the modes lie in

Matrix = NDArray[np.float64]


class Selected(NamedTuple):
    """What one way selected."""

    rows: NDArray[np.int64]
    transports: int


def planted(candidates: int, targets: int, dims: int, seed: int) -> tuple[Matrix, Matrix]:
    """Features of candidates, the first `_SHARE` of which are drawn as the target is, and of the target."""
    rng = np.random.default_rng(seed)
    modes = rng.normal(size=(24, _DIRECTIONS)) * 4.0
    alike = round(_SHARE * candidates)
    shares = np.array([0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
    own = rng.choice(6, size=targets, p=shares)
    theirs = np.concatenate([rng.choice(6, size=alike, p=shares), rng.integers(6, 24, candidates - alike)])
    through = rng.normal(size=(_DIRECTIONS, dims)) / np.sqrt(dims)

    def seen(labels: NDArray[np.int64]) -> Matrix:
        inside = modes[labels] + rng.normal(size=(len(labels), _DIRECTIONS))
        return inside @ through + 1e-4 * rng.normal(size=(len(labels), dims))

    return seen(theirs), seen(own)


def ours(candidates: Matrix, target: Matrix) -> Selected:
    """The selector as `tarot: {size: estimate}` runs it."""
    x, y = (torch.from_numpy(each).float() for each in (candidates, target))
    whiten(x, y, eps=_EPS)
    found = estimate_ratio(
        x,
        y,
        folds=_FOLDS,
        tolerance=5e-3,
        seed=_SEED,
        solver=Solver(10_000_000, print),
        memory=_MEMORY,
        advance=lambda: None,
    )
    rows = (found.layer < found.depth).nonzero()[:, 0].numpy()
    return Selected(rows, sum(len(curve.points) for curve in found.curves))


def plain(candidates: Matrix, target: Matrix, patience: int) -> Selected:
    """Every size in turn, each from scratch."""
    x, y = plainly_white(candidates, target)
    costs = np.sqrt(np.clip(2 - 2 * (x @ y.T), 0, None))  # (N, M)
    order = np.argsort(costs, axis=0, kind="stable")
    chosen: set[int] = set()
    transports = 0
    for held in folds(len(y)):
        others = np.setdiff1d(np.arange(len(y)), held)
        taken: set[int] = set()
        best, best_cost, worse = set(taken), np.inf, 0
        for k in range(len(x)):
            before = len(taken)
            for sample in held:
                if costs[order[k, sample], sample] < np.sqrt(2):
                    taken.add(int(order[k, sample]))
            if len(taken) == before:
                continue
            rows = np.array(sorted(taken))
            cost = from_scratch(costs[np.ix_(rows, others)])
            transports += 1
            if cost < best_cost:
                best, best_cost, worse = set(taken), cost, 0
            else:
                worse += 1
            if worse == patience:
                break
        chosen |= best
    return Selected(np.array(sorted(chosen)), transports)


def folds(targets: int) -> list[NDArray[np.int64]]:
    """The cut into folds that the selector makes: another one would select otherwise, by chance."""
    order = torch.randperm(targets, generator=generator(_SEED, "folds"))
    return [part.numpy() for part in order.tensor_split(_FOLDS)]


def plainly_white(candidates: Matrix, target: Matrix) -> tuple[Matrix, Matrix]:
    """Whitened rows of length 1, in float64 and at once."""
    rows = np.concatenate([candidates, target])
    rows = rows - rows.mean(axis=0)
    covariance = rows.T @ rows / len(rows)
    covariance += _EPS * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    white = scipy.linalg.solve_triangular(np.linalg.cholesky(covariance), rows.T, lower=True).T
    white /= np.linalg.norm(white, axis=1, keepdims=True)
    return white[: len(candidates)], white[len(candidates) :]


def from_scratch(costs: Matrix) -> float:
    """The exact transport of uniform masses."""
    n, m = costs.shape
    return float(ot.emd2(np.full(n, 1 / n), np.full(m, 1 / m), costs, numItermax=10_000_000))


def timed(work: Callable[[], Selected]) -> tuple[Selected, float]:
    """The result, and seconds of processor time, which other work on the machine changes least."""
    start = time.process_time()
    return work(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--candidates", type=int, default=4000)
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = planted(options.candidates, options.targets, options.dims, options.seed)
    white = [torch.from_numpy(each).float() for each in plainly_white(*data)]

    def judged(rows: NDArray[np.int64]) -> float:
        costs = Distances(white[0][torch.from_numpy(rows)], white[1], memory=_MEMORY).whole()
        return from_scratch(costs.double().numpy())

    from_scratch(np.ones((2, 2)))  # POT is loaded
    ways: dict[str, Callable[[], Selected]] = {
        "distill": lambda: ours(*data),
        "plain, first increase": lambda: plain(*data, 1),
        f"plain, patience {options.patience}": lambda: plain(*data, options.patience),
    }
    alike = round(_SHARE * options.candidates)
    print(
        f"{options.candidates} candidates, {alike} of them alike, {options.targets} of the target, "
        f"{options.dims} dims, {options.threads} threads"
    )
    print(f"{'':24}{'seconds':>9}{'transports':>12}{'selected':>10}{'alike':>8}{'distance':>10}")
    results = {}
    for name, work in ways.items():
        found, seconds = timed(work)
        share = float((found.rows < alike).mean())
        results[name] = (seconds, judged(found.rows))
        print(
            f"{name:24}{seconds:>9.2f}{found.transports:>12}{len(found.rows):>10}{share:>8.1%}"
            f"{results[name][1]:>10.5f}",
            flush=True,
        )
    (seconds, distance), _, (plain_seconds, plain_distance) = results.values()
    print(
        json.dumps(
            {
                "ratio": plain_seconds / seconds,
                "ratio_first_increase": results["plain, first increase"][0] / seconds,
                "distance": distance,
                "plain_distance": plain_distance,
                "first_increase_distance": results["plain, first increase"][1],
                "seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main()
