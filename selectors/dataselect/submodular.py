"""Submodular selection: facility location serves every sample by a similar one, graph cut also shuns similar picks.

    facility_location   f(S) = sum_i max(0, max_{j in S} s_ij)                                   dataselect/facility.py
    graph_cut           f(S) = lambda sum_{i in V, j in S} s_ij - sum_{i, j in S} s_ij           dataselect/graph_cut.py

maximised by greedy (dataselect/greedy.py) over similarities of features (dataselect/similarity.py). In DeepCore (Guo
et al. 2022) facility location in batches sees its first batch only; apricot and DeepCore set epsilon of stochastic
greedy to 0.9, with which nothing is guaranteed.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dataselect.facility import FacilityLocation
from dataselect.features import Chosen, SpaceConfig, SpaceSelector
from dataselect.graph_cut import GraphCut
from dataselect.greedy import Objective, lazy_greedy, stochastic_greedy
from dataselect.similarity import Similarity, SimilarityKind, similarity_of
from distill.byte_sizes import AsBytes
from distill.contracts import Context, DistilledSet, Selection, Source
from distill.randomness import derive_seed, generator
from distill.selection import Picks, select
from distill.training.config import Positive

# Lazy greedy takes a few passes over all pairs, stochastic greedy ln(1 / epsilon).
_PAIRS_FOR_LAZY = 200_000**2


class SubmodularConfig(SpaceConfig):
    """Budget, features, and how greedy goes about it.

    `similarity` is cosine (negative ones count as 0), shifted_cosine ((1 + cos) / 2), rbf with its `bandwidth` (a
    distance of features, or their median), or distance. `references` are the samples over which the function is
    summed: all, or so many at random, so that time is candidates x references. `optimizer` is lazy (exact) or
    stochastic, which loses at most `epsilon` in expectation; auto is lazy up to 4e10 pairs.
    """

    similarity: SimilarityKind = "cosine"
    bandwidth: Positive | Literal["median"] = "median"
    references: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    optimizer: Literal["auto", "lazy", "stochastic"] = "auto"
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _greedy_uses_all(self) -> Self:
        if self.bandwidth != "median" and self.similarity != "rbf":
            raise ValueError("bandwidth would be ignored: it belongs to similarity: rbf")
        if self.epsilon != 0.1 and self.optimizer == "lazy":
            raise ValueError("epsilon would be ignored: optimizer: lazy is exact")
        return self


class SubmodularSelector(SpaceSelector):
    """A selector that maximises a submodular function greedily. A subclass sets `score` and `objective`."""

    score: ClassVar[str]
    config: SubmodularConfig

    @abstractmethod
    def objective(self, similarity: Similarity) -> Objective:
        """The function of sets of candidates."""

    def pick(self, features: Tensor, count: int, *, seed: int) -> Chosen:
        """Pick `count` rows of features (N, D), which are overwritten."""
        config = self.config
        references = self._references(len(features), seed)
        similarity = similarity_of(
            features,
            config.similarity,
            references=None if references is None else references.to(features.device),
            bandwidth=config.bandwidth,
            seed=seed,
        )
        objective = self.objective(similarity)
        pairs = similarity.candidates * len(similarity.others)
        if config.optimizer == "lazy" or (config.optimizer == "auto" and pairs <= _PAIRS_FOR_LAZY):
            return Chosen(*lazy_greedy(objective, count))
        return Chosen(
            *stochastic_greedy(
                objective,
                count,
                size=len(features),
                epsilon=config.epsilon,
                generator=generator(seed, "candidates"),
                device=features.device,
            )
        )

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space = self.space(ctx, source)
        seed = ctx.derive(self.name)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            chosen = self.pick(space.take(samples), count, seed=derive_seed(seed, number))
            return Picks(samples[chosen.rows.cpu().numpy()], chosen.scores.cpu().numpy())

        return select(source, previous, self.config, pick, meta={"score": self.score})

    def _references(self, there: int, seed: int) -> Tensor | None:
        """Rows over which the function is summed, int64 ascending; None for all."""
        wanted = self.config.references
        if wanted == "all" or wanted >= there:
            return None
        return torch.randperm(there, generator=generator(seed, "references"))[:wanted].sort().values


class FacilityLocationSelector(SubmodularSelector):
    """Facility location: every sample has a similar one among the picks."""

    name = "facility_location"

    class Config(SubmodularConfig):
        """Budget, features, similarity and greedy; similarities of up to `matrix_bytes` are kept in memory."""

        matrix_bytes: Annotated[int, AsBytes()] = 1 << 30

    config: Config
    score = "gain of facility location: how much better the pick serves all samples"

    def objective(self, similarity: Similarity) -> Objective:
        return FacilityLocation(similarity, matrix_bytes=self.config.matrix_bytes)


class GraphCutSelector(SubmodularSelector):
    """Graph cut: picks resemble all samples, and not each other."""

    name = "graph_cut"

    class Config(SubmodularConfig):
        """Budget, features, similarity and greedy; `relevance` is lambda, monotone from 2."""

        relevance: Positive = 2.0

    config: Config
    score = "gain of graph cut: resemblance to all samples less that to earlier picks"

    def objective(self, similarity: Similarity) -> Objective:
        return GraphCut(similarity, relevance=self.config.relevance)
