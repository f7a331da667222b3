"""Submodular selection: facility location serves every sample by a similar one, graph cut also shuns similar picks.

    facility_location   f(S) = sum_i max(0, max_{j in S} s_ij)                                   dataselect/facility.py
    graph_cut           f(S) = lambda sum_{i in V, j in S} s_ij - sum_{i, j in S} s_ij           dataselect/graph_cut.py

maximised by greedy (dataselect/greedy.py) over similarities of features (dataselect/similarity.py). In DeepCore (Guo
et al. 2022) facility location in batches sees its first batch only; apricot and DeepCore set epsilon of stochastic
greedy to 0.9, with which nothing is guaranteed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dataselect.costs import CostConfig, read_costs, refuse_absent_costs
from dataselect.facility import FacilityLocation
from dataselect.features import Picking, SpaceSelector
from dataselect.graph_cut import GraphCut
from dataselect.greedy import COST_ROUNDING, Costs, Objective, Picked, lazy_greedy, stochastic_greedy, untold
from dataselect.similarity import Similarity, SimilarityKind, refuse_non_finite, similarity_of
from dataselect.space_config import SpaceConfig
from distill.byte_sizes import AsBytes
from distill.contracts import Context, DistilledSet, Estimate, Selection, Source, StepKind
from distill.errors import InputError
from distill.randomness import derive_seed, generator
from distill.selection import (
    Picks,
    candidates,
    class_budget,
    class_counts,
    select,
    source_counts,
    whole_budget,
)
from distill.training.config import Positive

EPSILON = 0.01

# Stochastic greedy takes ln(1 / epsilon) passes over all pairs, lazy greedy three to ten and keeps none of so many.
_PAIRS_FOR_LAZY = 50_000**2


class SubmodularConfig(SpaceConfig):
    """Budget, features, and how greedy goes about it.

    - `similarity`: cosine (negative ones count as 0), shifted_cosine ((1 + cos) / 2), rbf with its `bandwidth` (in
      units of the features, or their median distance), or distance (the greatest possible less the distance).
    - `references`: the samples over which the function is summed: all of them, or so many at random.
    - `optimizer`: lazy is exact; stochastic loses at most `epsilon` of the optimum in expectation; auto is lazy up to
      2.5e9 pairs of candidates and references, then stochastic.
    - `extend`: keep the selection of the step before, as part of the budget, and add to it from all samples.
    - `costs`: a limit of costs instead of a budget, or beside a count or fraction, which is the most then.
    """

    similarity: SimilarityKind = "cosine"
    bandwidth: Positive | Literal["median"] = "median"
    references: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    optimizer: Literal["auto", "lazy", "stochastic"] = "auto"
    epsilon: Annotated[float, Field(gt=0, lt=1)] = EPSILON
    extend: bool = False
    costs: CostConfig | None = None

    @property
    def finds_size(self) -> bool:
        return self.costs is not None

    @model_validator(mode="after")
    def _greedy_uses_all(self) -> Self:
        if self.bandwidth != "median" and self.similarity != "rbf":
            raise ValueError("bandwidth would be ignored: it belongs to similarity: rbf")
        exact = self.optimizer == "lazy" or self.costs is not None
        if self.epsilon != EPSILON and exact:
            raise ValueError("epsilon would be ignored: it belongs to optimizer: stochastic")
        if self.costs is not None and self.optimizer == "stochastic":
            raise ValueError("with costs greedy is lazy: leave optimizer out")
        if self.costs is not None and self.per_class:
            raise ValueError("the limit of costs is one for samples of all classes: give per_class: false")
        return self


class SubmodularSelector(SpaceSelector):
    """A selector that maximises a submodular function greedily. A subclass sets `score` and `objective`."""

    score: ClassVar[str]
    config: SubmodularConfig

    @property
    def picks_among_all(self) -> bool:
        return self.config.extend

    @abstractmethod
    def objective(self, similarity: Similarity) -> Objective:
        """The function of sets of candidates."""

    def check_place(self, follows: StepKind | None) -> None:
        super().check_place(follows)
        if self.config.extend and follows is None:
            raise InputError(
                "extend keeps the selection of the step before, and there is none",
                where=f"{self.name}.extend",
                found="true in the first step",
                fix="remove extend, or put a selector before it in steps",
            )

    def check_files(self) -> None:
        super().check_files()
        if self.config.costs is not None:
            refuse_absent_costs(self.config.costs)

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        if self.config.costs is not None:
            read_costs(self.config.costs, source.train)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        before = None if self.config.extend else before
        return super().estimate(train=train, classes=classes, before=before)

    def pick(
        self,
        features: Tensor,
        count: int,
        *,
        seed: int,
        initial: Tensor | None = None,
        costs: Costs | None = None,
        advance: Callable[[], None] = untold,
    ) -> Picked:
        """Pick `count` rows.

        Args:
            features: float32 (N, D), which are overwritten.
            count: at most N; the most where `costs` hold.
            seed: for whatever is left to chance.
            initial: int64, rows that are in the set from the beginning.
            costs: where a limit of costs holds.
            advance: called at each pick.

        Raises:
            NonFiniteError: features are not numbers.
        """
        refuse_non_finite(features)
        objective = self.objective(self._similarity(features, seed))
        if self._lazy(len(features)):
            return lazy_greedy(objective, count, initial=initial, costs=costs, advance=advance)
        return stochastic_greedy(
            objective,
            count,
            size=len(features),
            epsilon=self.config.epsilon,
            generator=generator(seed, "candidates"),
            initial=initial,
            device=features.device,
            advance=advance,
        )

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        config = self.config
        kept = self._kept(source, previous)
        costs = None if config.costs is None else read_costs(config.costs, source.train)
        if costs is not None:
            self._refuse_too_dear(costs, candidates(source, None if config.extend else previous), kept)
        space = self.space(ctx, source)
        seed = ctx.derive(self.name)
        if len(kept) and len(space.finite(kept)) < len(kept):
            raise InputError(
                f"{len(kept) - len(space.finite(kept))} images of the step before have NaN or infinite features",
                where=f"{self.name}.extend",
                fix="measure in the features of the step before, or look at these images (the cache warns of them)",
            )

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            features = space.take(samples)
            task.begin()
            initial = np.searchsorted(samples, kept[np.isin(kept, samples)])
            found = self.pick(
                features,
                count,
                seed=derive_seed(seed, number),
                initial=torch.from_numpy(initial).to(features.device),
                costs=None if costs is None else self._costs(costs[samples], features.device),
                advance=task.advance,
            )
            return Picks(samples[found.rows.cpu().numpy()], found.gains.cpu().numpy())

        among = None if config.extend else previous
        with Picking(ctx.progress, self.name) as task:
            chosen = select(source, among, config, pick, meta={"score": self.score}, usable=space.finite)
        if costs is None:
            return chosen
        return replace(chosen, meta={**chosen.meta, "cost": float(costs[chosen.indices].sum())})

    def _refuse_too_dear(self, costs: np.ndarray, samples: np.ndarray, kept: np.ndarray) -> None:
        """Raise InputError where the samples that stay cost more than the limit, or nothing else can be afforded."""
        assert self.config.costs is not None
        least = math.fsum(costs[kept]) if len(kept) else costs[samples].min()
        if least > self.config.costs.limit * (1 + COST_ROUNDING):
            what = "the images of the step before cost" if len(kept) else "the cheapest image costs"
            raise InputError(
                f"{what} more than the limit",
                where=f"{self.name}.costs.limit",
                found=f"{self.config.costs.limit:g}",
                allowed=f"at least {least:g}",
                fix="raise the limit",
            )

    def _costs(self, each: np.ndarray, device: torch.device) -> Costs:
        assert self.config.costs is not None
        return Costs(torch.from_numpy(each).to(device), self.config.costs.limit)

    def _kept(self, source: Source, previous: DistilledSet | Selection | None) -> np.ndarray:
        """Samples of the step before that stay, int64, in the order they were picked; none without `extend`.

        Raises:
            InputError: they are more than the budget.
        """
        if not self.config.extend:
            return np.empty(0, dtype=np.int64)
        assert isinstance(previous, Selection), "refused by check_place"
        labels, names = source.train.labels.numpy(), source.classes
        if self.config.per_class:
            budget = class_budget(source_counts(source), names, self.config)
            there = class_counts(labels[previous.indices], len(names))
        else:
            budget = np.array([whole_budget(len(labels), self.config)])
            there = np.array([len(previous.indices)])
        if (there > budget).any():
            worst = int(np.argmax(there - budget))
            whose = f" of class {names[worst]}" if self.config.per_class else ""
            raise InputError(
                f"the step before kept {there[worst]} images{whose}, more than the budget to which they count",
                where=f"{self.name}.extend",
                found=f"a budget of {budget[worst]}",
                fix="raise the budget, or have the step before keep fewer",
            )
        return previous.indices

    def _lazy(self, candidates: int) -> bool:
        wanted = self.config.references
        references = candidates if wanted == "all" else min(wanted, candidates)
        if self.config.optimizer == "auto":
            return self.config.costs is not None or candidates * references <= _PAIRS_FOR_LAZY
        return self.config.optimizer == "lazy"

    def _similarity(self, features: Tensor, seed: int) -> Similarity:
        wanted, there = self.config.references, len(features)
        references = None
        if wanted != "all" and wanted < there:
            order = torch.randperm(there, generator=generator(seed, "references"))
            references = order[:wanted].sort().values.to(features.device)
        return similarity_of(
            features,
            self.config.similarity,
            references=references,
            bandwidth=self.config.bandwidth,
            seed=seed,
        )


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
