"""What methods share: budgets, the samples that may be chosen, where images come from, and a choice as a set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from distill.contracts import (
    Context,
    DistilledSet,
    Estimate,
    Method,
    MethodConfig,
    Preprocessing,
    Selection,
    Source,
    StepKind,
)
from distill.errors import InputError
from distill.randomness import generator
from distill.training.config import TrainConfig


class BudgetConfig(MethodConfig):
    """How many images to keep, balanced by class: `ipc` images a class, or a `fraction` of each class."""

    ipc: Annotated[int, Field(ge=1)] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.ipc is None) == (self.fraction is None):
            raise ValueError("give exactly one of ipc and fraction")
        return self


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Samples of each class: int64 (C,)."""
    return np.bincount(labels, minlength=classes).astype(np.int64)


def source_counts(source: Source) -> np.ndarray:
    """Training samples of each class of the source: int64 (C,)."""
    return class_counts(source.train.labels.numpy(), len(source.classes))


def class_budget(counts: np.ndarray, names: tuple[str, ...], config: BudgetConfig) -> np.ndarray:
    """How many samples of each class to keep: int64 (C,).

    A fraction keeps round(fraction * n) samples in all, shared among the classes by largest remainder, none left
    without one; it never asks a class for more than it has.

    Args:
        counts: int64 (C,), samples there are.
        names: class names, for messages.
        config: the budget.

    Raises:
        InputError: a class has fewer samples than the budget asks for, or the budget is below one a class.
    """
    _refuse_empty(counts, names)
    if config.ipc is not None:
        return fixed_budget(counts, names, config.ipc)
    assert config.fraction is not None
    total = round(config.fraction * int(counts.sum()))
    if total < len(counts):
        raise InputError(
            f"a fraction of {config.fraction:g} keeps {total} images, fewer than the {len(counts)} classes",
            allowed=f"a fraction of at least {len(counts) / int(counts.sum()):.6g}",
            fix="raise fraction, or set ipc",
        )
    return _share(counts * config.fraction, total)


def _refuse_empty(counts: np.ndarray, names: tuple[str, ...]) -> None:
    empty = [name for name, count in zip(names, counts, strict=True) if count == 0]
    if empty:
        raise InputError(
            f"{len(empty)} of {len(names)} classes have no image to pick from",
            found=_first(empty),
            fix="leave these classes out with data.classes, or have the step before keep some of each",
        )


def _share(exact: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers near `exact` (C,) that sum to `total`, none below 1, ties to the lower class number."""
    budget = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (short := total - int(budget.sum())) != 0:
        owed = exact - budget
        if short < 0:
            owed[budget == 1] = np.inf
        budget[int(np.argmax(owed) if short > 0 else np.argmin(owed))] += int(np.sign(short))
    return budget


def fixed_budget(counts: np.ndarray, names: tuple[str, ...], ipc: int) -> np.ndarray:
    """`ipc` samples of every class: int64 (C,); refused where a class has fewer."""
    small = [f"{name} ({count})" for name, count in zip(names, counts, strict=True) if count < ipc]
    if small:
        raise InputError(
            f"{ipc} images per class are asked for, and {len(small)} of {len(names)} classes have fewer",
            found=_first(small),
            allowed=f"at most {int(counts.min())} images per class",
            fix="lower ipc, leave these classes out with data.classes, or cut fewer off with data.valid",
        )
    return np.full(len(names), ipc, dtype=np.int64)


def _first(words: list[str], most: int = 5) -> str:
    return ", ".join([*words[:most], *(["..."] if len(words) > most else [])])


class Selector(Method):
    """What every selector with a `BudgetConfig` shares: where it may stand, and what its budget may be."""

    kind = "selector"
    config: BudgetConfig

    def check_place(self, follows: StepKind | None) -> None:
        if follows == "distiller":
            raise InputError(
                "a selector picks real images and cannot follow a distiller",
                fix="put the selector before the distiller in steps",
            )

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        class_budget(source_counts(source), source.classes, self.config)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        there = train if before is None else before
        if self.config.ipc is not None:
            return Estimate(images=self.config.ipc * classes)
        assert self.config.fraction is not None
        return Estimate(images=round(self.config.fraction * there))


class ImagesConfig(MethodConfig):
    """What a distiller begins with: `ipc` images a class, or, without it, the images of the step before."""

    ipc: Annotated[int, Field(ge=1)] | None = None


class Distiller(Method):
    """What every distiller with an `ImagesConfig` shares: where it may stand, and which images it draws.

    Class attributes: `lacks` follows the name where nothing says which images, `takes` where two things do.
    """

    kind = "distiller"
    lacks: ClassVar[str]
    takes: ClassVar[str]
    config: ImagesConfig

    def check_place(self, follows: StepKind | None) -> None:
        if follows is None and self.config.ipc is None:
            raise InputError(f"{self.name} {self.lacks}", fix="set ipc, or put a selector before it in steps")
        if follows is not None and self.config.ipc is not None:
            raise InputError(
                f"{self.name} {self.takes} the images of the step before, and ipc asks for others",
                found=f"ipc {self.config.ipc}",
                fix="remove ipc, or remove the step before",
            )

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        if self.config.ipc is not None:
            self.budget(source)

    def budget(self, source: Source) -> np.ndarray:
        """`ipc` for every class, int64 (C,); InputError where a class has fewer images."""
        assert self.config.ipc is not None, "refused by check_place"
        return fixed_budget(source_counts(source), source.classes, self.config.ipc)

    def images(self, *, classes: int, before: int | None) -> int:
        """How many images the result will have, for a dry run."""
        return (before if self.config.ipc is None else self.config.ipc * classes) or 0


def candidates(source: Source, previous: DistilledSet | Selection | None) -> np.ndarray:
    """Which train samples a selector may pick: those of the selection before, else all; int64, ascending."""
    if previous is None:
        return np.arange(len(source.train))
    assert isinstance(previous, Selection), "refused by check_place"
    return np.sort(previous.indices)


def by_class(indices: np.ndarray, labels: np.ndarray, classes: int) -> Iterator[np.ndarray]:
    """The samples of each class, in class order; int64 arrays that together are `indices`."""
    own = labels[indices]
    for number in range(classes):
        yield indices[own == number]


def select_by_class(
    source: Source,
    previous: DistilledSet | Selection | None,
    config: BudgetConfig,
    pick: Callable[[np.ndarray, int, int], tuple[np.ndarray, np.ndarray]],
    *,
    meta: Mapping[str, Any],
) -> Selection:
    """Run a selector class by class.

    Args:
        source, previous: as in `Method.run`.
        config: the budget.
        pick: (samples int64 (n,), count, class number) -> (chosen int64 (count,), scores float (count,)).
        meta: facts; `score` says what the scores mean.
    """
    labels, classes = source.train.labels.numpy(), len(source.classes)
    indices = candidates(source, previous)
    budget = class_budget(class_counts(labels[indices], classes), source.classes, config)
    picked = [
        pick(samples, int(count), number)
        for number, (samples, count) in enumerate(
            zip(by_class(indices, labels, classes), budget, strict=True)
        )
    ]
    chosen = np.concatenate([samples for samples, _ in picked]).astype(np.int64)
    scores = np.concatenate([values for _, values in picked]).astype(np.float32)
    assert len(np.unique(chosen)) == len(chosen) == int(budget.sum()), "budget kept, nothing twice"
    return Selection(chosen, np.ones(len(chosen), dtype=np.float32), scores, meta)


def random_pick(samples: np.ndarray, count: int, *, seed: int, name: str | int) -> np.ndarray:
    """`count` of `samples`, uniformly without replacement; int64 (count,) in drawn order."""
    order = torch.randperm(len(samples), generator=generator(seed, name)).numpy()
    return samples[order[:count]]


def random_subset(source: Source, budget: np.ndarray, *, seed: int) -> np.ndarray:
    """A uniform random subset of the train split with `budget` (C,) samples of each class: int64 (sum,)."""
    labels = source.train.labels.numpy()
    classes = by_class(np.arange(len(labels)), labels, len(source.classes))
    parts = [
        random_pick(samples, int(count), seed=seed, name=number)
        for number, (samples, count) in enumerate(zip(classes, budget, strict=True))
    ]
    return np.concatenate(parts)


def materialise(selection: Selection, source: Source, train: TrainConfig) -> DistilledSet:
    """The set of the selected real images with their hard labels."""
    indices = torch.from_numpy(selection.indices)
    return DistilledSet(
        images=source.train.images[indices],
        labels=source.train.labels[indices],
        classes=source.classes,
        preprocessing=Preprocessing(mean=source.mean, std=source.std),
        train=train,
        selection=selection,
    )


def images_before(
    method: Distiller, ctx: Context, source: Source, previous: DistilledSet | Selection | None
) -> DistilledSet:
    """The images that a distiller begins with, as a set: those of the step before, or random ones of its budget."""
    if isinstance(previous, DistilledSet):
        return previous
    if previous is None:
        chosen = random_subset(source, method.budget(source), seed=ctx.derive("images"))
        ones = np.ones(len(chosen), dtype=np.float32)
        previous = Selection(chosen, ones, np.zeros_like(ones), {"score": "none, always 0"})
    return materialise(previous, source, ctx.train)
