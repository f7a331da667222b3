"""D2 pruning: messages on a graph of neighbours weigh how hard samples are against how alike they are.

On the undirected graph that joins every sample to its k nearest (`neighbours`), with hardness s shifted to begin at 0,

    u_i  = s_i + sum_{j ~ i} exp(-gamma_f d_ij^2) s_j                  forward, once for all i
    pick i = argmax u,  then  u_j -= exp(-gamma_r d_ij^2) max(u_i, 0)  for its neighbours j     reverse, after each pick

Maharana, Yadav and Bansal, "D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data Pruning", ICLR
2024; `gamma_forward` is gamma_f, `gamma_reverse` gamma_r. `mislabelled` leaves out the hardest first, as they do at
high rates of pruning: what is labelled wrong is hard, and is picked first otherwise.

What we decide. d is measured in units of the root mean square length of the graph's edges: in the raw units of most
features exp(-d^2) is 0, no message arrives and the hardest are picked; so measured, the options mean the same in every
space. A pick whose u is below 0, because its own neighbours were picked, sends nothing: by the formula as it is printed
its neighbours would rise, and be picked for being like it. Then u only falls, so a heap of old values holds upper
bounds, and all picks take O(n k log n). Equal u are ordered by the seed.

The released code has exp(-d) for the forward messages and exp(-gamma_r d) for the reverse ones, dense n x n matrices of
distances and edges, and in its precomputed form a directed graph.
"""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field
from torch import Tensor

from dataselect.features import SpaceSelector
from dataselect.hardness import By, Hardness, MislabelConfig, seeded, trusted
from dataselect.neighbours import nearest_neighbours
from dataselect.space_config import SpaceConfig
from distill.contracts import Context, DistilledSet, Estimate, Selection, Source, StepKind
from distill.selection import Picks, Selector, select
from distill.training.config import NonNegative


class MessagePassing(SpaceSelector):
    """D2 pruning: hard samples that are unlike each other, by messages between neighbours."""

    name = "d2"

    class Config(MislabelConfig, SpaceConfig):
        """Budget, score, the space of features, and how far messages reach in it.

        The network of the features is the first of those that score (`network`, `networks`).
        """

        always_used: ClassVar[tuple[str, ...]] = ("network",)

        by: By = "aum"
        neighbours: Annotated[int, Field(ge=1)] = 5
        gamma_forward: NonNegative = 1.0
        gamma_reverse: NonNegative = 0.1

    config: Config

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        self.config.check_cut(source)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        plain = Selector.estimate(self, train=train, classes=classes, before=before)
        scores = self.config.estimate_hardness(plain, train=train)
        space = self.config.estimate_space(plain, train=train)
        # A network trained on the source is the first of those that score.
        own = space.trainings if self.config.trained_on == "target" else ()
        return replace(scores, trainings=(*scores.trainings, *own), features=scores.features + space.features)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        config = self.config
        hardness, space = Hardness(ctx, source, config), self.space(ctx, source)
        seed = ctx.derive(self.name)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            left, values = trusted(hardness, config, samples, count, number=number, seed=seed)
            graph = neighbour_graph(space.take(left), config.neighbours)
            messages = forward(graph, values - values.min(), gamma=config.gamma_forward)
            ties = seeded(left, seed, draw=1)
            places, scores = reverse(graph, messages, count, gamma=config.gamma_reverse, ties=ties)
            return Picks(left[places], scores)

        meaning = (
            f"score of message passing when it was picked, from {hardness.meaning}, shifted to begin at 0"
        )
        return select(source, previous, config, pick, meta={"score": meaning}, usable=space.finite)


class Graph(NamedTuple):
    """An undirected graph of n samples, each edge from both of its ends; E entries, by sample and then neighbour.

    Attributes:
        starts: int64 (n + 1,), where the edges of each sample begin.
        ends: int64 (E,), the neighbours.
        squares: float64 (E,), squared distances in units of their mean; 0 where all are.
    """

    starts: np.ndarray
    ends: np.ndarray
    squares: np.ndarray


def neighbour_graph(features: Tensor, k: int) -> Graph:
    """The graph that joins rows of which at least one is among the other's k nearest.

    Args:
        features: float32 (n, D), centred.
        k: at least 1.
    """
    n = len(features)
    distances, numbers = (each.cpu().numpy() for each in nearest_neighbours(features, k))
    here = np.repeat(np.arange(n), numbers.shape[1])
    there = numbers.ravel()
    keys, first = np.unique(np.concatenate([here * n + there, there * n + here]), return_index=True)
    squares = np.tile(distances.ravel().astype(np.float64) ** 2, 2)[first]
    starts = np.searchsorted(keys, np.arange(n + 1) * n)
    if (unit := squares.sum()) > 0:
        squares *= len(squares) / unit
    return Graph(starts, keys % n, squares)


def forward(graph: Graph, scores: np.ndarray, *, gamma: float) -> np.ndarray:
    """u_i = s_i + sum_{j ~ i} exp(-gamma d_ij^2) s_j: float64 (n,).

    Args:
        scores: float64 (n,), 0 or more.
    """
    here = np.repeat(np.arange(len(scores)), np.diff(graph.starts))
    heard = np.exp(-gamma * graph.squares) * scores[graph.ends]
    return scores + np.bincount(here, weights=heard, minlength=len(scores))


def reverse(
    graph: Graph, messages: np.ndarray, count: int, *, gamma: float, ties: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Pick the greatest u, take its share from its neighbours' u, and again.

    Args:
        messages: float64 (n,), u after the forward messages.
        count: at most n.
        gamma: gamma_r.
        ties: int64 (n,), the lowest of which goes first among equal u; then the lowest place.

    Returns:
        Places int64 (count,) in the order picked, and u float64 (count,) as they were picked.
    """
    now, shares = messages.copy(), np.exp(-gamma * graph.squares)
    heap = list(zip((-now).tolist(), ties.tolist(), range(len(now)), strict=True))
    heapq.heapify(heap)
    places = np.empty(count, dtype=np.int64)
    scores = np.empty(count)
    done = 0
    while done < count:
        negative, tie, place = heapq.heappop(heap)
        value = now[place]
        if value < -negative:  # it fell since
            heapq.heappush(heap, (-float(value), tie, place))
            continue
        places[done], scores[done] = place, value
        done += 1
        if value > 0:
            near = slice(graph.starts[place], graph.starts[place + 1])
            now[graph.ends[near]] -= shares[near] * value
    return places, scores
