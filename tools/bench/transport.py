"""How fast TAROT selects, against a plain form of it: whitening, the estimate of the size, and the selection itself.

    python tools/bench/transport.py [--candidates 4000] [--targets 1000] [--dims 512] [--threads 1] [--seeds 3]

Features are planted: the target is a mixture of modes in few directions, a share of the candidates comes from the same
modes and the rest from others, all seen through a random linear map and noise below what whitening leaves alone.

The plain form does what the released code does, with its faults mended so that it answers the same question: the full
matrix of scores, all neighbours sorted, and one transport from scratch for every size k = 1, 2, ... of every fold, by
the same solver at the same precision (POT's network simplex, exact). Two rows of it are printed: one stops at the first
increase, as the release does, and one `--patience` sizes after the best, which it keeps.

Two things make the difference. The plain form solves every k up to where it stops. Ours solves few: sizes less than 2%
apart are not told apart, others are left unsolved where a bound says that they cannot be better by the tolerance
(0.5%), and of those within the tolerance of the best the smallest is taken. And ours begins each transport from
potentials it knows. What either selects is judged alike: the exact transport distance from the selection, each sample
alike, to the whole target, in the same whitened features.

Times are processor time, which other work on the machine changes least, of all threads together. Prints a table for
each seed of the planted features and, as the last line, JSON with medians over the seeds: `ratio` is the time of the
plain form with patience over ours, `ratio_first_increase` that of the plain form that stops at the first increase.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
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


def options_of() -> argparse.Namespace:
    """The command's options; with as many threads as they say.

    Libraries read that as they are loaded: where the environment says otherwise, the command is begun anew.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--candidates", type=int, default=4000)
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--dims", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    wanted = {f"{library}_NUM_THREADS": str(options.threads) for library in ("OMP", "OPENBLAS", "MKL")}
    if not wanted.items() <= os.environ.items():
        os.environ.update(wanted)
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return options


def measured(seed: int, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Seconds and distance of every way for one seed of the features, in a table."""
    data = planted(options.candidates, options.targets, options.dims, seed)
    white = [torch.from_numpy(each).float() for each in plainly_white(*data)]
    alike = round(_SHARE * options.candidates)

    def judged(rows: NDArray[np.int64]) -> float:
        costs = Distances(white[0][torch.from_numpy(rows)], white[1], memory=_MEMORY).whole()
        return from_scratch(costs.double().numpy())

    ways: dict[str, Callable[[], Selected]] = {
        "distill": lambda: ours(*data),
        "plain, first increase": lambda: plain(*data, 1),
        "plain, patience": lambda: plain(*data, options.patience),
    }
    print(f"{f'seed {seed}':24}{'seconds':>9}{'transports':>12}{'selected':>10}{'alike':>8}{'distance':>10}")
    results = {}
    for name, work in ways.items():
        found, seconds = timed(work)
        share = float((found.rows < alike).mean())
        results[name] = seconds, judged(found.rows)
        print(
            f"{name:24}{seconds:>9.2f}{found.transports:>12}{len(found.rows):>10}{share:>8.1%}"
            f"{results[name][1]:>10.5f}",
            flush=True,
        )
    return results


def main() -> None:
    options = options_of()
    torch.set_num_threads(options.threads)
    print(
        f"{options.candidates} candidates, {round(_SHARE * options.candidates)} of them alike, "
        f"{options.targets} of the target, {options.dims} dims, {options.threads} threads, "
        f"patience {options.patience}"
    )
    warm = planted(60, 40, 8, 0)  # libraries are loaded, for all ways
    ours(*warm)
    plain(*warm, 1)
    runs = [measured(seed, options) for seed in range(options.seeds)]

    def median(of: Callable[[dict[str, tuple[float, float]]], float]) -> float:
        return statistics.median(of(run) for run in runs)

    print(
        json.dumps(
            {
                "ratio": median(lambda run: run["plain, patience"][0] / run["distill"][0]),
                "ratio_first_increase": median(
                    lambda run: run["plain, first increase"][0] / run["distill"][0]
                ),
                "distance": median(lambda run: run["distill"][1]),
                "plain_distance": median(lambda run: run["plain, patience"][1]),
                "first_increase_distance": median(lambda run: run["plain, first increase"][1]),
                "seconds": median(lambda run: run["distill"][0]),
                "seeds": options.seeds,
            }
        )
    )


if __name__ == "__main__":
    main()
