"""What is refused before the first step runs: places in the order of steps, and budgets that cannot be kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import numpy as np

from distill.contracts import DocumentSelector, Method, Source, StepKind
from distill.errors import DistillError, InputError
from distill.recipe import Recipe
from distill.selection import Selector, check_total, class_budget, source_counts, whole_budget
from distill.training.config import TrainConfig


@runtime_checkable
class FollowsImages(Protocol):
    """A step that can refuse the number of images of the step before."""

    def check_previous(self, images: int) -> None:
        """Raise InputError where so many images cannot serve."""


def check_places(steps: Sequence[Method], recipe: Recipe) -> None:
    """Let every step refuse its place in the order of steps, and refuse what asks for who is not there.

    Args:
        steps: of the recipe, in order.
        recipe: with its evaluation and its target.
    """
    follows: StepKind | None = None
    for number, step in enumerate(steps):
        with step_named(number, step):
            step.check_place(follows)
        follows = step.kind
    _check_target(steps, recipe)
    if "random_soft" in recipe.evaluate.against and not steps[-1].asks_teachers:
        raise InputError(
            "random_soft labels real images as the set is labelled, and no teacher labels the set",
            where="evaluate.against",
            found=f"the last step is {steps[-1].name}",
            allowed="soft_label, or committee with relabel",
            fix="leave random_soft out, or end with a step that labels",
        )


def _check_target(steps: Sequence[Method], recipe: Recipe) -> None:
    """Refuse a target that is wanted and absent, or there and not wanted."""
    asking = [f"steps.{number}.{step.name}" for number, step in enumerate(steps) if step.uses_target]
    asked = recipe.evaluate
    if asked.on in ("target", "transfer"):
        asking.append("evaluate.on")
    if "random_target" in asked.against and asked.on != "nothing":
        asking.append("evaluate.against")
    if recipe.target is None and asking:
        raise InputError(
            "this asks for a target, and the recipe names none",
            where=asking[0],
            fix="name the data to resemble beside data, for example target: {name: folder, folder: FOLDER}",
        )
    if recipe.target is not None and not asking:
        raise InputError(
            "neither a step nor the evaluation reads the target",
            where="target",
            found=", ".join(step.name for step in steps),
            fix="remove target, or add a targeted selector (tarot, simcore, importance, less, trak), "
            "or evaluate.on: target",
        )


def check_files(steps: Sequence[Method]) -> None:
    """Raise InputError where a file that a step needs is not there; costs nothing."""
    for number, step in enumerate(steps):
        with step_named(number, step):
            step.check_files()


def check_steps(steps: Sequence[Method], source: Source, train: TrainConfig) -> None:
    """Let every step refuse what it cannot do with this source, or with what the steps before will leave.

    Args:
        steps: in order.
        source: without its test split, or an `outline` of it.
        train: how students will be trained.
    """
    follows: StepKind | None = None
    for number, step in enumerate(steps):
        with step_named(number, step):
            step.check(source, follows)
            step.check_training(train, classes=len(source.classes))
        follows = step.kind
    _check_budgets(steps, source)
    _check_numbers(steps, source)


def _check_budgets(steps: Sequence[Method], source: Source) -> None:
    """Follow the images, and where it is known those of each class, through the selectors that begin the steps.

    A selector without regard to classes leaves nobody knows how many of each; one that finds its size, at most so many.
    """
    every = source_counts(source)
    counts: np.ndarray | None = every
    there = len(source.train)
    for number, step in enumerate(steps):
        if not isinstance(step, Selector):
            return
        config = step.config
        if step.picks_among_all:
            counts, there = every, len(source.train)
        with step_named(number, step), _fewer_before(number, among_all=step.picks_among_all):
            if not config.per_class:
                there = whole_budget(there, config)
                counts = None
            elif counts is not None:
                counts = class_budget(counts, source.classes, config)
                there = int(counts.sum())
            else:
                there = check_total(there, source.classes, config)
                counts = None if config.ipc is None else np.full(len(source.classes), config.ipc)
        if config.finds_size:
            counts = None


@contextmanager
def _fewer_before(number: int, *, among_all: bool) -> Iterator[None]:
    """Say what to do about a budget that the steps before have left too few images for."""
    try:
        yield
    except InputError as error:
        if number and not among_all:
            error.fix = "lower the budget, or have the step before keep more images"
        raise


def _check_numbers(steps: Sequence[Method], source: Source) -> None:
    """Tell each step that asks how many images the steps before it will leave."""
    before: int | None = None
    exactly = False
    for number, step in enumerate(steps):
        if before is not None and isinstance(step, FollowsImages):
            with step_named(number, step):
                step.check_previous(before)
        estimate = step.estimate(train=len(source.train), classes=len(source.classes), before=before)
        # A step that finds its size may leave fewer; what is too many then is refused when they are there.
        if before is not None and exactly and isinstance(step, Selector) and step.picks_among_all:
            with step_named(number, step):
                _refuse_full(before, estimate.images)
        before, exactly = estimate.images, not estimate.at_most


def _refuse_full(before: int, budget: int) -> None:
    """Raise InputError where a selector that adds to the step before has no room left."""
    if before >= budget:
        raise InputError(
            "the step before leaves no room in the budget, to which its images count",
            found=f"{before} images of the step before, and a budget of {budget}",
            fix="raise the budget, or have the step before keep fewer",
        )


@contextmanager
def step_named(number: int, step: Method | DocumentSelector) -> Iterator[None]:
    """Put the step's place in the recipe into an error that names none, or an option of the step."""
    try:
        yield
    except DistillError as error:
        if not error.where:
            error.where = f"steps.{number}.{step.name}"
        elif _is_option(error.where, step):
            error.where = f"steps.{number}.{error.where}"
        elif _is_option(f"{step.name}.{error.where}", step):
            error.where = f"steps.{number}.{step.name}.{error.where}"
        raise


def _is_option(where: str, step: Method | DocumentSelector) -> bool:
    """Whether it is NAME.OPTION of the step."""
    name, _, path = where.partition(".")
    return name == step.name and re.split("[.:]", path)[0] in type(step.config).model_fields
