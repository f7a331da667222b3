"""What is refused before the first step runs: places in the order of steps, and budgets that cannot be kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from distill.contracts import Method, Source, StepKind
from distill.errors import InputError
from distill.selection import Selector, class_budget, source_counts


def check_places(steps: Sequence[Method]) -> None:
    """Let every step refuse its place in the order of steps."""
    follows: StepKind | None = None
    for number, step in enumerate(steps):
        with step_named(number, step):
            step.check_place(follows)
        follows = step.kind


def check_steps(steps: Sequence[Method], source: Source) -> None:
    """Let every step refuse what it cannot do with this source, or with what the steps before will leave.

    Args:
        steps: in order.
        source: without its test split, or an `outline` of it.
    """
    follows: StepKind | None = None
    for number, step in enumerate(steps):
        with step_named(number, step):
            step.check(source, follows)
        follows = step.kind
    _check_budgets(steps, source)


def _check_budgets(steps: Sequence[Method], source: Source) -> None:
    """Follow the images of each class through the selectors that begin the steps."""
    counts = source_counts(source)
    for number, step in enumerate(steps):
        if not isinstance(step, Selector):
            return  # only a selector's budget tells how many images of each class it leaves
        with step_named(number, step):
            counts = class_budget(counts, source.classes, step.config)


@contextmanager
def step_named(number: int, step: Method) -> Iterator[None]:
    """Put the step's place in the recipe into an InputError that names none."""
    try:
        yield
    except InputError as error:
        error.where = error.where or f"steps.{number}.{step.name}"
        raise
