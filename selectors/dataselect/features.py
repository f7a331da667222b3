"""Selectors that measure in a space of features: by features alone, or by resemblance to a target."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from pydantic import model_validator
from torch import Tensor

from dataselect.space import FeatureSpace
from dataselect.space_config import SpaceConfig
from distill.contracts import Context, DistilledSet, Estimate, Progress, Selection, Source, StepKind, Task
from distill.errors import InputError
from distill.randomness import derive_seed
from distill.selection import Picks, Selector, labelled_target, select


class SpaceSelector(Selector):
    """A selector that measures in a space of features."""

    config: SpaceConfig

    @property
    def uses_target(self) -> bool:
        return self.config.trained_on == "target"

    def check_files(self) -> None:
        self.config.check_files()

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        self.config.check_space(source)
        if self.config.features == "network" and self.config.trained_on == "target":
            _refuse_one_class(source)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        plain = super().estimate(train=train, classes=classes, before=before)
        return self.config.estimate_space(plain, train=train)

    def space(self, ctx: Context, source: Source) -> FeatureSpace:
        """The space, empty until something is read."""
        return FeatureSpace(ctx, source, self.config)


def _refuse_one_class(source: Source) -> None:
    """A network that learns one class learns nothing."""
    assert source.target is not None, "refused before the first step"
    if len(source.target.classes) == 1:
        raise InputError(
            "the network of the features is trained on the target, which has one class to tell apart",
            where="trained_on",
            found=f"target: {source.target.classes[0]!r}",
            allowed="a target of at least 2 classes",
            fix="set features: encoder, or trained_on: source",
        )


def _refuse_certain_labels(source: Source) -> None:
    """Of one class every label has the probability 1, and the loss no gradient: nothing would tell samples apart."""
    if len(source.classes) == 1:
        raise InputError(
            "the data have one class: the gradients of the loss are 0 for every image",
            where="features",
            found=f"one class, {source.classes[0]!r}",
            allowed="data of at least 2 classes",
            fix="give the data more classes, or choose a method and features without gradients",
        )


class TargetedConfig(SpaceConfig):
    """A budget over all samples, whatever their classes, and the space in which they should resemble the target."""

    per_class: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.ipc is not None:
            raise ValueError("the target decides how many images of each class: give fraction or count")
        if self.per_class:
            raise ValueError("the target decides how many images of each class: remove per_class")
        return self


class TargetedSelector(SpaceSelector):
    """A selector that picks what resembles the recipe's target."""

    config: TargetedConfig

    @property
    def uses_target(self) -> bool:
        return True

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        assert source.target is not None, "refused before the first step"
        if not len(source.target.train):
            raise InputError(
                "the target has no training images", where="target", fix="give the target some images"
            )
        if self.config.features in ("gradients", "last_layer"):
            labelled_target(source)  # refuses classes that the data lack
            _refuse_certain_labels(source)


class Chosen(NamedTuple):
    """What was picked from N rows of features.

    Attributes:
        rows: int64 (n,), in the order picked.
        scores: (n,).
        weights: (n,), how many rows each stands for; None where all alike.
    """

    rows: Tensor
    scores: Tensor
    weights: Tensor | None = None


class Picking:
    """A task of the progress that begins with the first pick: features, and their network, tell of themselves.

    Args:
        progress: of the run.
        name: of the method.
    """

    def __init__(self, progress: Progress, name: str) -> None:
        self._open = partial(progress.task, name.replace("_", " "), unit="pick")
        self._stack = ExitStack()
        self._task: Task | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def begin(self) -> Task:
        """The task, which has begun."""
        if self._task is None:
            self._task = self._stack.enter_context(self._open())
        return self._task

    def advance(self, count: int = 1) -> None:
        """So many more are picked."""
        self.begin().advance(count)


class FeatureSelector(SpaceSelector):
    """A selector that picks within each class, or among all, by features alone. A subclass sets `score` and `pick`."""

    score: ClassVar[str]  # what the scores of its picks mean

    @abstractmethod
    def pick(self, features: Tensor, count: int, *, seed: int) -> Chosen:
        """Pick `count` rows.

        Args:
            features: float32 (N, D) of one class, centred (their mean is 0); of all where classes have no say.
            count: at most N.
            seed: for whatever is left to chance, another for each class.
        """

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space = self.space(ctx, source)
        seed = ctx.derive(self.name)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            features = space.take(samples)
            task.begin()
            chosen = self.pick(features, count, seed=derive_seed(seed, number))
            task.advance(len(chosen.rows))
            rows, scores, weights = (None if each is None else each.cpu().numpy() for each in chosen)
            return Picks(samples[rows], scores, weights)  # type: ignore[arg-type]

        with Picking(ctx.progress, self.name) as task:
            return select(
                source, previous, self.config, pick, meta={"score": self.score}, usable=space.finite
            )
