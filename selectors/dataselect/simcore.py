"""SimCore: pick, round by round, what is most similar to the centroids of the target's features.

    f(S) = sum_{x in target} max_{u in S} w(x, u),  w the cosine of features, S within the source

(Kim, Bae and Yun, "Coreset Sampling from Open-Set for Fine-Grained Self-Supervised Learning", CVPR 2023, equation 2 and
algorithm 1). The target is replaced by k centroids, k-means' on its features at length 1, themselves at length 1; with
k of at least the target's size every sample is its own. In a round each centroid takes its most similar sample that no
earlier round took; one that several take counts once. With `stop`, sampling ends before the round whose mean similarity
is below tau times that of a reference round: the first in the paper. The released code looks at another, its
`patience`, which is `reference_round` here.

The round that exceeds the budget is cut to its most similar picks, where the released code keeps random ones. Nor is
the source sorted once a centroid: each has a queue of its best candidates, and all queues are filled anew, by one pass
over the source, when one is used up. Between two passes as many samples are taken as a queue is long, so that passes
are few. Centroids come from spherical k-means. Cosines of float32 features are summed in float64 and
rounded to 2^-20, so that exact duplicates tie and blocks do not matter; ties go to the lowest row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dataselect.clustering import kmeans, scale_to_length_one
from dataselect.features import TargetedConfig, TargetedSelector
from distill.contracts import Context, DistilledSet, Selection, Source
from distill.selection import Picks, candidates, selection_of, unusable, whole_budget

_BLOCK_NUMBERS = 1 << 22  # cosines held at once
_QUEUES_NUMBERS = 1 << 24  # candidates in all queues
_QUEUE = 4096  # candidates in a queue, at most
_STEPS = 1 << 20  # of a cosine from 0 to 1
_ROW_BITS = 40


class SimCore(TargetedSelector):
    """SimCore: what is most like the centroids of the target."""

    name = "simcore"

    class Config(TargetedConfig):
        """A budget, the space in which samples are alike, and when to stop.

        The target is replaced by `centroids` centroids, made better at most `iterations` times. With `stop` the budget
        is the most, and may be left out: sampling ends where the mean similarity of a round falls below `tau` times
        that of round `reference_round`.
        """

        trained_on: Literal["source", "target"] = "target"
        centroids: Annotated[int, Field(ge=1)] = 100
        iterations: Annotated[int, Field(ge=1)] = 25
        stop: bool = False
        tau: Annotated[float, Field(gt=0, le=1)] = 0.95
        reference_round: Annotated[int, Field(ge=1)] = 1

        @property
        def finds_size(self) -> bool:
            return self.stop

        @model_validator(mode="after")
        def _a_rule_that_is_used(self) -> Self:
            if not self.stop and (self.tau, self.reference_round) != (0.95, 1):
                raise ValueError("tau and reference_round say when to stop: set stop: true, or remove them")
            return self

    config: Config
    score = "cosine to the centroid of the target that took it"

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        config = self.config
        samples = candidates(source, previous)
        count = whole_budget(len(samples), config)
        space = self.space(ctx, source)
        left = space.finite(samples)
        if len(left) < count and not config.finds_size:
            raise unusable(len(left), len(samples), count, name="the data")
        samples, count = left, min(count, len(left))
        centroids = target_centroids(
            space.target(), config.centroids, seed=ctx.derive(self.name), iterations=config.iterations
        )
        found = retrieve(
            scale_to_length_one(space.raw(samples)),
            centroids,
            count,
            tau=config.tau if config.stop else None,
            reference_round=config.reference_round,
        )
        if config.stop:
            ctx.progress.note(_ended(found, count, config))
        facts = {"centroids": len(centroids), "rounds": found.rounds, "stopped": found.stopped}
        picks = Picks(samples[found.rows], found.similarities)
        return selection_of([picks], per_class=False, meta={"score": self.score, **facts})


def _ended(found: Retrieval, count: int, config: SimCore.Config) -> str:
    """Which of the two ended the sampling: similarity, or the budget of `count` images."""
    if not found.stopped:
        return f"SimCore ended after {found.rounds} rounds with all {count} images it may keep, before similarity fell"
    return (
        f"SimCore stopped after {found.rounds} rounds with {len(found.rows)} of at most {count} images: "
        f"the next are less than {config.tau:g} times as similar as those of round {config.reference_round}"
    )


@dataclass(frozen=True)
class Retrieval:
    """What was retrieved.

    Args:
        rows: int64 (n,), round by round, in a round the most similar first.
        similarities: float64 (n,), the cosine to the nearest centroid that took it.
        rounds: how many were kept.
        stopped: whether similarity ended it, and not the budget.
    """

    rows: np.ndarray
    similarities: np.ndarray
    rounds: int
    stopped: bool


def target_centroids(target: Tensor, count: int, *, seed: int, iterations: int) -> Tensor:
    """Centroids of length 1 of the target's features: float32 (min(count, M), D).

    Args:
        target: float32 (M, D), brought to length 1 in place.
        count: k.
        seed, iterations: as for `dataselect.clustering.kmeans`.
    """
    unit = scale_to_length_one(target)
    if count >= len(unit):
        return unit
    return kmeans(unit, count, seed=seed, iterations=iterations, spherical=True).centroids


def retrieve(
    features: Tensor, centroids: Tensor, count: int, *, tau: float | None, reference_round: int = 1
) -> Retrieval:
    """Pick rows round by round, `count` in all or fewer where similarity falls first.

    Args:
        features: float32 (N, D), rows of length 1, or 0.
        centroids: float32 (k, D), likewise; on the device that computes.
        count: at most N.
        tau: the share of the reference round's mean similarity below which no round is kept; None keeps all.
        reference_round: counted from 1.
    """
    queues = _Queues(features, centroids, length=max(2 * count // len(centroids), 256))
    taken = np.zeros(len(features), dtype=bool)
    rows: list[np.ndarray] = []
    similarities: list[np.ndarray] = []
    left, rounds, reference = count, 0, -np.inf
    while left:
        best, cosines = queues.heads(taken)
        if tau is not None and rounds >= reference_round and cosines.mean() < tau * reference:
            break
        rounds += 1
        if rounds == reference_round:
            reference = float(cosines.mean())
        order = np.lexsort((best, -cosines))
        _, first = np.unique(best[order], return_index=True)
        kept = order[np.sort(first)][:left]
        rows.append(best[kept])
        similarities.append(cosines[kept])
        taken[best[kept]] = True
        left -= len(kept)
    return Retrieval(np.concatenate(rows), np.concatenate(similarities), rounds, stopped=left > 0)


class _Queues:
    """For each centroid its most similar rows that were not taken when it was filled, and a place in it.

    Args:
        features, centroids: as for `retrieve`.
        length: rows a queue, where memory allows.
    """

    def __init__(self, features: Tensor, centroids: Tensor, *, length: int) -> None:
        self.features = features
        self.centroids = centroids
        self.length = max(min(length, _QUEUE, _QUEUES_NUMBERS // len(centroids)), 1)
        self.rows = np.empty((len(centroids), 0), dtype=np.int64)
        self.cosines = np.empty((len(centroids), 0))
        self.places = np.zeros(len(centroids), dtype=np.int64)

    def heads(self, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The most similar row of each centroid that is not taken, int64 (k,), and their cosines, float64 (k,)."""
        each = np.arange(len(self.rows))
        while True:
            if (self.places == self.rows.shape[1]).any():
                self._fill(taken)
            found = self.rows[each, self.places]
            if not (late := taken[found]).any():
                return found, self.cosines[each, self.places]
            self.places += late

    def _fill(self, taken: np.ndarray) -> None:
        device = self.centroids.device
        most = min(self.length, int((~taken).sum()))
        keys = torch.empty(len(self.centroids), 0, dtype=torch.int64, device=device)
        centroids = self.centroids.double()
        size = max(_BLOCK_NUMBERS // max(centroids.shape), 1)
        for start in range(0, len(taken), size):
            free = torch.from_numpy(np.flatnonzero(~taken[start : start + size]) + start)
            block = self.features[free.to(self.features.device)].to(device)
            keys = torch.cat([keys, _keys(centroids @ block.double().T, free.to(device))], dim=1)
            keys = keys.topk(min(most, keys.shape[1]), dim=1).values
        found = keys.cpu().numpy()
        self.rows = (1 << _ROW_BITS) - 1 - (found & ((1 << _ROW_BITS) - 1))
        self.cosines = (found >> _ROW_BITS) / _STEPS
        self.places[:] = 0


def _keys(cosines: Tensor, rows: Tensor) -> Tensor:
    """Whole numbers, no two alike, of which the largest is the best candidate: the largest cosine, the lowest row.

    Args:
        cosines: float64 (k, rows).
        rows: int64 (rows,), below 2^40.
    """
    steps = (cosines * _STEPS).round_().long()
    return (steps << _ROW_BITS) + ((1 << _ROW_BITS) - 1 - rows)
