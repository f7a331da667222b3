"""GradMatch: samples, and weights, whose gradients add up to the gradient of all.

    min over S of size k and w >= 0 of  || sum_{i in S} w_i g_i - sum_i g_i ||^2 + lambda ||w||^2

(Killamsetty et al., "GRAD-MATCH: Gradient Matching based Data Subset Selection", ICML 2021, algorithm 2).
The sum over i goes over the samples of a class, or of all classes with `per_class: false`; with `against: valid` it is
the gradient of the validation samples (of that class) times the number of samples over the number of those, so that in
either case a weight says how many samples a pick stands for. lambda is `ridge` times the mean of ||g_i||^2: it means
the same whatever the gradients' unit, and is the paper's 0.5 for gradients of length 1.

What we do differently: the paper takes the largest correlation of either sign and says nothing of weights below 0; the
DeepCore release solves all weights anew at every pick, O(k^4) operations in all, and sets those below 0 right at the
end. Here weights stay at 0 or above (dataselect/matching_pursuit.py), and a pick costs O(k^2).
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from dataselect.features import SpaceSelector
from dataselect.gradients import Against, GradientConfig, gradients_of, refuse_without_validation
from dataselect.matching_pursuit import matching_pursuit
from dataselect.space import FeatureSpace
from distill.contracts import Context, DistilledSet, Selection, Source, StepKind
from distill.errors import InputError
from distill.selection import Picks, class_budget, select, source_counts, whole_budget


class GradMatch(SpaceSelector):
    """GradMatch: weighted samples whose gradients add up to that of all."""

    name = "gradmatch"

    class Config(GradientConfig):
        """Budget and gradients; which split's gradient is matched (`against`), and how much large weights cost
        (`ridge`, in units of the mean squared length of a gradient). A class's picks are as many as `memory` has room
        for the matrix of their products."""

        against: Against = "train"
        ridge: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5

    config: Config

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        if self.config.against == "valid":
            refuse_without_validation(source, per_class=self.config.per_class)
        if self.config.per_class:
            largest = int(class_budget(source_counts(source), source.classes, self.config).max())
        else:
            largest = whole_budget(len(source.train), self.config)
        self._refuse_large(largest)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space = self.space(ctx, source)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            self._refuse_large(count)
            gradients = gradients_of(space, source.train, samples)
            if self.config.against == "train":
                target = gradients.total()
            else:
                target = self._validation(space, source, number, len(samples)).to(gradients.device)
            ridge = self.config.ridge * float(gradients.squares().double().mean())
            rows, weights, errors = matching_pursuit(gradients, target, count, ridge=ridge)
            if not weights.any():  # nothing to match: any samples will do
                weights = np.full(count, len(samples) / count)
            return Picks(samples[rows], errors, weights)

        score = (
            "what is not matched after this pick: root of the objective as a share of the gradient's length"
        )
        return select(source, previous, self.config, pick, meta={"score": score}, usable=space.finite)

    def _validation(self, space: FeatureSpace, source: Source, number: int, count: int) -> Tensor:
        """The gradient of the validation samples (of a class), as if there were `count` of them."""
        split = source.valid
        own = split.labels.numpy() == number if self.config.per_class else np.ones(len(split), dtype=bool)
        return gradients_of(space, split, np.flatnonzero(own)).total() * (count / int(own.sum()))

    def _refuse_large(self, count: int) -> None:
        """Refuse more picks of a class than `memory` has room for: the factor, and a copy while it is changed."""
        if 2 * 8 * count**2 > self.config.memory:
            raise InputError(
                f"{count} picks that compete with each other need a matrix of {2 * 8 * count**2} bytes",
                where="memory",
                found=f"{self.config.memory} bytes",
                allowed=f"at least {2 * 8 * count**2} bytes, or at most {int((self.config.memory / 16) ** 0.5)} picks",
                fix="lower the budget, pick within classes with per_class: true, or raise memory",
            )
