"""What methods share: budgets, the samples that may be chosen, where images come from, and a choice as a set."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NoReturn, Self

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
    Split,
    StepKind,
)
from distill.errors import InputError
from distill.randomness import generator
from distill.training.config import TrainConfig

PER_CLASS = "per_class"  # in a selection's facts: False where classes had no say in it


class BudgetConfig(MethodConfig):
    """How many images to keep: `ipc` images a class, or a `fraction` of all or a `count`.

    A fraction and a count are shared among the classes by their sizes; with `per_class: false` classes have no say, and
    samples of all compete.
    """

    ipc: Annotated[int, Field(ge=1)] | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None
    per_class: bool = True

    @property
    def finds_size(self) -> bool:
        """Whether the method finds how many images to keep; a budget is the most then, and may be left out."""
        return False

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        given = sum(each is not None for each in (self.ipc, self.fraction, self.count))
        if given > 1 or not (given or self.finds_size):
            raise ValueError("give exactly one of ipc, fraction and count")
        if self.ipc is not None and not self.per_class:
            raise ValueError("ipc counts images of each class: with per_class: false give fraction or count")
        return self

    def images(self, *, there: int, classes: int) -> int:
        """How many of `there` samples of C classes are kept, at most where the method finds it."""
        if self.ipc is not None:
            return self.ipc * classes
        if self.fraction is not None:
            return round(self.fraction * there)
        return there if self.count is None else self.count


def class_counts(labels: np.ndarray, classes: int) -> np.ndarray:
    """Samples of each class: int64 (C,)."""
    return np.bincount(labels, minlength=classes).astype(np.int64)


def source_counts(source: Source) -> np.ndarray:
    """Training samples of each class of the source: int64 (C,)."""
    return class_counts(source.train.labels.numpy(), len(source.classes))


def class_budget(counts: np.ndarray, names: tuple[str, ...], config: BudgetConfig) -> np.ndarray:
    """How many samples of each class to keep: int64 (C,).

    A fraction keeps round(fraction * n) samples in all. It, or a count, is shared among the classes by largest
    remainder, none left without one; it never asks a class for more than it has.

    Args:
        counts: int64 (C,), samples there are.
        names: class names, for messages.
        config: the budget, which is per class.

    Raises:
        InputError: a class has fewer samples than the budget asks for, or the budget is below one a class.
    """
    assert config.per_class, "whole_budget is for the others"
    _refuse_empty(counts, names)
    if config.ipc is not None:
        return fixed_budget(counts, names, config.ipc)
    there = int(counts.sum())
    total = config.images(there=there, classes=len(counts))
    _refuse_more(total, there)
    if total < len(counts):
        _refuse_fewer(total, there, names, config)
    return _share(counts * (total / there if config.fraction is None else config.fraction), total)


def whole_budget(there: int, config: BudgetConfig) -> int:
    """How many of `there` samples to keep, whatever their classes.

    Raises:
        InputError: none, or more than there are.
    """
    total = config.images(there=there, classes=1)
    _refuse_more(total, there)
    if total < 1:
        raise InputError(
            f"a fraction of {config.fraction:g} keeps none of {there} images",
            allowed=f"a fraction of at least {1 / max(there, 1):.6g}",
            fix="raise fraction, or set count",
        )
    return total


def check_total(there: int, names: tuple[str, ...], config: BudgetConfig) -> int:
    """How many images a budget per class keeps, of so many whose classes are not known.

    Raises:
        InputError: more than there are, or fewer than classes.
    """
    total = config.images(there=there, classes=len(names))
    _refuse_more(total, there)
    if total < len(names):
        _refuse_fewer(total, there, names, config)
    return total


def proportional(counts: np.ndarray, total: int) -> np.ndarray:
    """`total` shared in the proportions of `counts` (C,) by largest remainder, ties to the lower class: int64 (C,)."""
    exact = counts * (total / counts.sum())
    shares = np.floor(exact).astype(np.int64)
    rest = total - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:rest]] += 1
    return shares


def _refuse_fewer(total: int, there: int, names: tuple[str, ...], config: BudgetConfig) -> NoReturn:
    """Refuse a budget below one image a class."""
    share = config.fraction is not None
    least = (
        f"a fraction of at least {len(names) / there:.6g}" if share else f"a count of at least {len(names)}"
    )
    asked = f"a fraction of {config.fraction:g}" if share else f"a count of {total}"
    raise InputError(
        f"{asked} keeps {total} images, fewer than the {len(names)} classes",
        allowed=least,
        fix="raise the budget, set ipc, or let samples of all classes compete with per_class: false",
    )


def _refuse_more(total: int, there: int) -> None:
    if total > there:
        raise InputError(
            f"{total} images are asked for, and there are {there}",
            allowed=f"a count of at most {there}",
            fix="lower count",
        )


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

    @property
    def picks_among_all(self) -> bool:
        """Whether it may pick samples that the selection before left out."""
        return False

    def check_place(self, follows: StepKind | None) -> None:
        if follows == "distiller":
            raise InputError(
                "a selector picks real images and cannot follow a distiller",
                fix="put the selector before the distiller in steps",
            )

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        if self.config.per_class:
            class_budget(source_counts(source), source.classes, self.config)
        else:
            whole_budget(len(source.train), self.config)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        there = train if before is None else before
        images = self.config.images(there=there, classes=classes)
        return Estimate(images=images, at_most=self.config.finds_size)


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


@dataclass(frozen=True)
class Picks:
    """What a selector picks from some samples.

    Args:
        samples: int64 (n,), in the order picked.
        scores: (n,).
        weights: (n,), 0 or more, how many samples each stands for; None where each stands for as many.
    """

    samples: np.ndarray
    scores: np.ndarray
    weights: np.ndarray | None = None


def select(
    source: Source,
    previous: DistilledSet | Selection | None,
    config: BudgetConfig,
    pick: Callable[[np.ndarray, int, int], Picks],
    *,
    meta: Mapping[str, Any],
    usable: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Selection:
    """Run a selector class by class, or, with `per_class: false`, on all samples at once.

    Args:
        source, previous: as in `Method.run`.
        config: the budget.
        pick: (samples int64 (n,) ascending, count, class number; 0 where all are at once) -> count of them.
        meta: facts; `score` says what the scores mean.
        usable: which of some samples can be picked; the others have no finite features. None: all.

    Raises:
        InputError: a budget that cannot be kept, or not by what is usable.
    """
    picks = []
    for samples, count, number in _groups(source, candidates(source, previous), config):
        left = samples if usable is None else usable(samples)
        if len(left) < count and not config.finds_size:
            name = f"class {source.classes[number]!r}" if config.per_class else "the data"
            raise unusable(len(left), len(samples), count, name=name)
        picks.append(pick(left, min(count, len(left)), number))
    return selection_of(picks, per_class=config.per_class, meta=meta)


def unusable(left: int, there: int, count: int, *, name: str) -> InputError:
    """The error for a budget of `count`, where `left` of the `there` samples of `name` have finite features."""
    return InputError(
        f"{there - left} of {there} images of {name} have NaN or infinite features, and {count} are asked for",
        found=f"{left} with finite features",
        allowed=f"a budget of at most {left}",
        fix="lower the budget, look at these images (the cache warns of them), or choose other features",
    )


def _groups(source: Source, indices: np.ndarray, config: BudgetConfig) -> list[tuple[np.ndarray, int, int]]:
    """The samples that compete with each other, how many of them to keep, and their class number."""
    if not config.per_class:
        return [(indices, whole_budget(len(indices), config), 0)]
    labels, classes = source.train.labels.numpy(), len(source.classes)
    budget = class_budget(class_counts(labels[indices], classes), source.classes, config)
    groups = zip(by_class(indices, labels, classes), budget, strict=True)
    return [(samples, int(count), number) for number, (samples, count) in enumerate(groups)]


def selection_of(picks: Sequence[Picks], *, per_class: bool, meta: Mapping[str, Any]) -> Selection:
    """The selection of what was picked from several groups; their weights, in common units, are brought to mean 1.

    Args:
        picks: of each group.
        per_class: whether each class has its share. Where it has not, that is a fact too: a random control of the set
            is then drawn without regard to classes.
        meta: facts; `score` says what the scores mean.
    """
    chosen = np.concatenate([each.samples for each in picks]).astype(np.int64)
    scores = np.concatenate([each.scores for each in picks]).astype(np.float32)
    weights = np.concatenate(
        [np.ones(len(each.samples)) if each.weights is None else each.weights for each in picks]
    ).astype(np.float64)
    assert len(np.unique(chosen)) == len(chosen) > 0, "nothing twice"
    assert (weights >= 0).all() and weights.sum() > 0, "weights of samples"
    facts = dict(meta) if per_class else {**meta, PER_CLASS: False}
    return Selection(chosen, (weights / weights.mean()).astype(np.float32), scores, facts)


def labelled_target(source: Source, *, why: str = "gradients need labels of the source's classes") -> Split:
    """The target's train split with class numbers of the source, by the names of the classes.

    Args:
        source: with a target.
        why: what needs them, where the source lacks some.

    Raises:
        InputError: the source lacks some of the target's classes.
    """
    assert source.target is not None, "refused before the first step"
    return _renumbered(source.target.train, source, why)


def evaluated_on_target(source: Source) -> Source:
    """The source with the target's test split in place of its own.

    Raises:
        InputError: the source lacks some of the target's classes.
    """
    assert source.target is not None, "refused before the first step"
    held_out = _renumbered(source.target.test, source, "students know the source's classes only")
    return replace(source, held_out=held_out)


def _renumbered(split: Split, source: Source, why: str) -> Split:
    """A split of the source's target with the source's class numbers."""
    target = source.target
    assert target is not None
    lacking = [name for name in target.classes if name not in source.classes]
    if lacking:
        raise InputError(
            f"the data lack {len(lacking)} of the {len(target.classes)} classes of the target, and {why}",
            where="target",
            found=_first(lacking),
            allowed=_first(list(source.classes)),
            fix="name the classes alike, or leave others out with target.classes",
        )
    if target.classes == source.classes:
        return split
    numbers = torch.tensor([source.classes.index(name) for name in target.classes])
    parts = (split.fingerprint, *source.classes, "target", *target.classes)
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return Split(split.images, numbers[split.labels], fingerprint)


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
    """The set of the selected real images with their hard labels; it knows where in the data they were found."""
    indices = torch.from_numpy(selection.indices)
    rows = source.train.rows
    found = None if rows is None else rows[indices].numpy()
    return DistilledSet(
        images=source.train.images[indices],
        labels=source.train.labels[indices],
        classes=source.classes,
        preprocessing=Preprocessing(mean=source.mean, std=source.std),
        train=train,
        selection=replace(selection, rows=found),
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
