"""Budgets add up, errors name the class and both numbers, and a choice becomes a set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from distill.contracts import Context, DistilledSet, Estimate, Selection, Source
from distill.errors import InputError
from distill.selection import (
    BudgetConfig,
    Picks,
    Selector,
    by_class,
    candidates,
    class_budget,
    class_counts,
    fixed_budget,
    materialise,
    proportional,
    random_pick,
    random_subset,
    select,
    selection_of,
    source_counts,
    whole_budget,
)
from distill.step_checks import check_steps
from distill.training.config import TrainConfig

COUNTS = st.lists(st.integers(1, 300), min_size=1, max_size=12).map(lambda counts: np.array(counts))
FRACTIONS = st.floats(0, 1, exclude_min=True, allow_subnormal=False)


def names(counts: np.ndarray) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(len(counts)))


def budget(counts: list[int] | np.ndarray, **options: float) -> list[int]:
    counts = np.array(counts)
    return class_budget(counts, names(counts), BudgetConfig.model_validate(options)).tolist()


def first(samples: np.ndarray, count: int, number: int) -> Picks:
    """A selector that takes the samples as they come; the score is the class number."""
    return Picks(samples[:count], np.full(count, number))


class TakeFirst(Selector):
    """Takes the samples as they come."""

    name = "take_first"
    Config = BudgetConfig

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        return select(source, previous, self.config, first, meta={"score": "class number"})


# --- budgets


@pytest.mark.parametrize("options", [{}, {"ipc": 1, "fraction": 0.5}, {"count": 3, "fraction": 0.5}])
def test_exactly_one_budget_is_given(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="exactly one of ipc, fraction and count"):
        BudgetConfig.model_validate(options)


def test_ipc_is_the_same_for_every_class() -> None:
    assert budget([9, 5, 7], ipc=5) == [5, 5, 5]


@pytest.mark.parametrize(
    ("counts", "fraction", "wanted"),
    [
        ([10, 10, 10], 0.5, [5, 5, 5]),
        ([10, 20, 30], 0.1, [1, 2, 3]),
        ([5, 5, 5], 0.5, [3, 3, 2]),  # 7.5 rounds to 8; equal remainders go to the lower class number
        ([1, 1, 98], 0.1, [1, 1, 8]),  # none left without one, at the expense of the largest
        ([7, 3], 1.0, [7, 3]),
    ],
)
def test_fraction_by_largest_remainder(counts: list[int], fraction: float, wanted: list[int]) -> None:
    assert budget(counts, fraction=fraction) == wanted


@given(counts=COUNTS, fraction=FRACTIONS)
def test_a_fraction_gives_its_total_exactly_and_every_class_its_share(
    counts: np.ndarray, fraction: float
) -> None:
    total = round(fraction * int(counts.sum()))
    assume(total >= len(counts))
    shares = np.array(budget(counts, fraction=fraction))
    assert shares.sum() == total
    assert (shares >= 1).all() and (shares <= counts).all()
    exact = fraction * counts
    assert (shares < exact + 1).all()
    if (exact >= 1).all():  # nobody had to be lifted to one image
        assert (shares > exact - 1).all()


@given(counts=COUNTS, fraction=FRACTIONS)
def test_a_fraction_below_one_image_a_class_names_a_fraction_that_works(
    counts: np.ndarray, fraction: float
) -> None:
    total = round(fraction * int(counts.sum()))
    assume(total < len(counts))
    with pytest.raises(
        InputError, match=f"keeps {total} images, fewer than the {len(counts)} classes"
    ) as caught:
        budget(counts, fraction=fraction)
    allowed = float(str(caught.value.allowed).rsplit(" ", 1)[-1])
    assert sum(budget(counts, fraction=min(allowed, 1.0))) >= len(counts)


def test_a_class_smaller_than_the_budget_is_named_with_both_numbers() -> None:
    with pytest.raises(InputError) as caught:
        fixed_budget(np.array([9, 4, 7]), ("cat", "dog", "owl"), 5)
    error = caught.value
    assert "5 images per class" in error.what and "1 of 3 classes" in error.what
    assert (error.found, error.allowed) == ("dog (4)", "at most 4 images per class")


def test_many_small_classes_are_counted_and_the_first_five_named() -> None:
    counts = np.full(9, 2)
    with pytest.raises(InputError, match="9 of 9 classes") as caught:
        fixed_budget(counts, names(counts), 3)
    assert str(caught.value.found).count("(2)") == 5
    assert str(caught.value.found).endswith(", ...")


@pytest.mark.parametrize("options", [{"ipc": 1}, {"fraction": 0.5}])
def test_a_class_without_any_sample_is_named(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="1 of 3 classes have no image") as caught:
        class_budget(np.array([4, 0, 4]), ("cat", "dog", "owl"), BudgetConfig.model_validate(options))
    assert caught.value.found == "dog"


@pytest.mark.parametrize(
    ("counts", "count", "wanted"),
    [([10, 20, 30], 6, [1, 2, 3]), ([5, 5, 5], 4, [2, 1, 1]), ([7, 3], 10, [7, 3])],
)
def test_a_count_is_shared_by_largest_remainder(counts: list[int], count: int, wanted: list[int]) -> None:
    assert budget(counts, count=count) == wanted


def test_a_count_below_one_a_class_or_above_all_is_refused_with_what_is_allowed() -> None:
    with pytest.raises(InputError, match="fewer than the 3 classes") as caught:
        budget([5, 5, 5], count=2)
    assert caught.value.allowed == "a count of at least 3"
    with pytest.raises(InputError, match="16 images are asked for, and there are 15") as caught:
        budget([5, 5, 5], count=16)
    assert caught.value.allowed == "a count of at most 15"


def test_ipc_needs_classes() -> None:
    with pytest.raises(ValidationError, match="give fraction or count"):
        BudgetConfig(ipc=1, per_class=False)


def test_a_whole_budget_does_not_look_at_classes(make_source: Callable[..., Source]) -> None:
    assert whole_budget(10, BudgetConfig(fraction=0.25, per_class=False)) == 2
    with pytest.raises(InputError, match="keeps none of 10"):
        whole_budget(10, BudgetConfig(fraction=0.01, per_class=False))
    source = make_source((5, 9))
    seen = []

    def pick(samples: np.ndarray, count: int, number: int) -> Picks:
        seen.append((samples.tolist(), count, number))
        return Picks(samples[-count:], np.zeros(count))

    found = select(source, None, BudgetConfig(count=3, per_class=False), pick, meta={})
    assert seen == [(list(range(14)), 3, 0)]
    assert found.indices.tolist() == [11, 12, 13]
    assert found.meta == {"per_class": False}


def test_weights_of_several_groups_keep_their_proportions_and_have_mean_1() -> None:
    parts = [
        Picks(np.array([4, 2]), np.zeros(2), np.array([6.0, 2.0])),
        Picks(np.array([1]), np.zeros(1)),
    ]
    found = selection_of(parts, per_class=True, meta={})
    assert found.indices.tolist() == [4, 2, 1]
    np.testing.assert_allclose(found.weights, np.array([6, 2, 1]) / 3)


# --- what may be picked


def test_class_counts_know_classes_without_samples() -> None:
    assert class_counts(np.array([0, 2, 2]), 4).tolist() == [1, 0, 2, 0]


def test_candidates_are_all_or_those_of_the_selection_before(source: Source) -> None:
    assert candidates(source, None).tolist() == list(range(24))
    before = Selection(np.array([9, 3, 17]), np.ones(3, np.float32), np.zeros(3, np.float32))
    assert candidates(source, before).tolist() == [3, 9, 17]


def test_by_class_gives_every_index_once_to_its_class() -> None:
    labels = np.array([1, 0, 1, 3, 0])
    parts = list(by_class(np.array([4, 0, 3, 1]), labels, 4))
    assert [part.tolist() for part in parts] == [[4, 1], [0], [], [3]]


# --- selecting


def test_select_keeps_order_scores_and_meta(source: Source) -> None:
    found = select(source, None, BudgetConfig(ipc=2), first, meta={"score": "class number"})
    labels = source.train.labels.numpy()
    wanted = np.concatenate([np.flatnonzero(labels == number)[:2] for number in range(3)])
    assert found.indices.tolist() == wanted.tolist()
    assert found.scores.tolist() == [0, 0, 1, 1, 2, 2]
    assert (found.indices.dtype, found.weights.dtype, found.scores.dtype) == (
        np.int64,
        np.float32,
        np.float32,
    )
    assert found.weights.tolist() == [1] * 6
    assert found.meta == {"score": "class number"}


@pytest.mark.parametrize("options", [{"ipc": 1}, {"ipc": 5}, {"fraction": 0.3}, {"fraction": 1.0}])
def test_a_selection_is_distinct_inside_the_source_and_as_large_as_asked(
    make_source: Callable[..., Source], options: dict[str, float]
) -> None:
    source = make_source((20, 5, 9))
    config = BudgetConfig.model_validate(options)
    found = select(source, None, config, first, meta={})
    wanted = class_budget(source_counts(source), source.classes, config)
    assert len(np.unique(found.indices)) == len(found.indices) == wanted.sum()
    assert found.indices.min() >= 0 and found.indices.max() < len(source.train)
    assert class_counts(source.train.labels.numpy()[found.indices], 3).tolist() == wanted.tolist()


def test_a_selector_that_gives_a_sample_twice_is_caught(source: Source) -> None:
    def twice(samples: np.ndarray, count: int, number: int) -> Picks:
        return Picks(np.repeat(samples[:1], count), np.zeros(count))

    with pytest.raises(AssertionError, match="nothing twice"):
        select(source, None, BudgetConfig(ipc=2), twice, meta={})


def test_select_then_select_counts_within_the_first_selection(source: Source) -> None:
    before = select(source, None, BudgetConfig(ipc=6), first, meta={})
    after = select(source, before, BudgetConfig(fraction=0.5), first, meta={})
    assert len(after.indices) == 9
    assert set(after.indices) <= set(before.indices)
    with pytest.raises(InputError) as caught:
        select(source, before, BudgetConfig(ipc=7), first, meta={})
    assert str(caught.value.found).startswith("zero (6)")


def test_a_selection_before_that_dropped_a_class_is_refused(source: Source) -> None:
    rows = np.flatnonzero(source.train.labels.numpy() != 1)
    before = Selection(rows, np.ones(len(rows), np.float32), np.zeros(len(rows), np.float32))
    with pytest.raises(InputError) as caught:
        select(source, before, BudgetConfig(fraction=0.5), first, meta={})
    assert caught.value.found == "one"


# --- the step


def test_a_selector_may_begin_or_follow_a_selector_but_no_distiller(source: Source) -> None:
    step = TakeFirst(BudgetConfig(ipc=2))
    step.check(source, None)
    step.check(source, "selector")
    with pytest.raises(InputError, match="cannot follow a distiller"):
        step.check(source, "distiller")


def test_check_refuses_a_budget_that_the_source_cannot_give(source: Source) -> None:
    with pytest.raises(InputError, match="9 images per class"):
        TakeFirst(BudgetConfig(ipc=9)).check(source, None)


@pytest.mark.parametrize(
    ("options", "before", "images"),
    [
        ({"ipc": 4}, None, 12),
        ({"ipc": 4}, 30, 12),
        ({"fraction": 0.5}, None, 50),
        ({"fraction": 0.5}, 30, 15),
    ],
)
def test_estimate(options: dict[str, float], before: int | None, images: int) -> None:
    step = TakeFirst(BudgetConfig.model_validate(options))
    assert step.estimate(train=100, classes=3, before=before) == Estimate(images=images)


# --- random choices


def test_random_pick_is_a_draw_without_replacement_that_its_names_decide() -> None:
    samples = np.arange(100, 150)
    chosen = random_pick(samples, 20, seed=1, name=0)
    assert len(set(chosen)) == 20 and set(chosen) <= set(samples)
    assert chosen.tolist() == random_pick(samples, 20, seed=1, name=0).tolist()
    assert chosen.tolist() != random_pick(samples, 20, seed=2, name=0).tolist()
    assert chosen.tolist() != random_pick(samples, 20, seed=1, name=1).tolist()
    assert chosen[:5].tolist() == random_pick(samples, 5, seed=1, name=0).tolist(), (
        "smaller budgets are nested"
    )


def test_random_subset_has_the_class_counts_asked_for(make_source: Callable[..., Source]) -> None:
    source = make_source((20, 5, 9))
    wanted = np.array([7, 0, 9])
    chosen = random_subset(source, wanted, seed=4)
    labels = source.train.labels.numpy()
    assert class_counts(labels[chosen], 3).tolist() == wanted.tolist()
    assert len(np.unique(chosen)) == 16
    assert random_subset(source, wanted, seed=5).tolist() != chosen.tolist()


# --- the set


def test_materialise_takes_images_labels_and_statistics_of_the_source(
    make_source: Callable[..., Source],
) -> None:
    source = make_source(channels=3)
    chosen = Selection(np.array([5, 2]), np.ones(2, np.float32), np.zeros(2, np.float32))
    train = TrainConfig(epochs=7)
    made = materialise(chosen, source, train)
    assert torch.equal(made.images[0], source.train.images[5])
    assert torch.equal(made.images[1], source.train.images[2])
    assert made.images.dtype == torch.uint8
    assert made.labels.tolist() == source.train.labels[[5, 2]].tolist()
    assert made.selection is not None and made.selection.rows is None, "the source does not tell"
    assert (made.preprocessing.mean, made.preprocessing.std) == (source.mean, source.std)
    assert (made.classes, made.train, made.selection, made.soft) == (source.classes, train, chosen, None)


def test_materialise_keeps_where_the_images_were_found(make_source: Callable[..., Source]) -> None:
    source = make_source()
    rows = torch.arange(len(source.train)) * 3 + 1
    chosen = Selection(np.array([5, 2]), np.ones(2, np.float32), np.zeros(2, np.float32))
    made = materialise(chosen, replace(source, train=replace(source.train, rows=rows)), TrainConfig())
    assert made.selection is not None and made.selection.rows is not None
    assert (made.selection.rows.dtype, made.selection.rows.tolist()) == (np.int64, [16, 7])


# --- budgets of several selectors


@pytest.mark.parametrize(
    ("first_step", "second_step", "what"),
    [
        ({"count": 9, "per_class": False}, {"ipc": 4}, "12 images are asked for, and there are 9"),
        ({"count": 9, "per_class": False}, {"count": 10, "per_class": False}, "10 images are asked for"),
        ({"ipc": 2}, {"count": 7, "per_class": False}, "7 images are asked for, and there are 6"),
        ({"count": 9, "per_class": False}, {"count": 2}, "fewer than the 3 classes"),
        ({"ipc": 3}, {"ipc": 4}, "4 images per class"),
    ],
)
def test_a_budget_beyond_what_the_step_before_leaves_is_refused_before_any_step(
    source: Source, first_step: dict[str, Any], second_step: dict[str, Any], what: str
) -> None:
    steps = [TakeFirst(BudgetConfig.model_validate(each)) for each in (first_step, second_step)]
    with pytest.raises(InputError, match=what) as caught:
        check_steps(steps, source, TrainConfig())
    assert str(caught.value.where).startswith("steps.1")


def test_budgets_that_fit_one_into_the_other_pass(source: Source) -> None:
    budgets = [{"count": 20, "per_class": False}, {"ipc": 5}, {"count": 9, "per_class": False}, {"count": 9}]
    check_steps([TakeFirst(BudgetConfig.model_validate(each)) for each in budgets], source, TrainConfig())


@given(counts=COUNTS, total=st.integers(0, 500))
def test_proportions_are_kept_as_well_as_whole_numbers_can(counts: np.ndarray, total: int) -> None:
    shares = proportional(counts, total)
    assert shares.sum() == total
    assert (np.abs(shares - counts * total / counts.sum()) < 1).all()
