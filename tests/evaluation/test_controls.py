"""The arms: same sizes, same optimiser steps, subsets that follow the seed, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet, Preprocessing, Source
from distill.errors import InputError
from distill.evaluation.controls import Arm, build_arms
from distill.labels.codecs import decode, encode
from distill.selection import class_counts
from distill.training.config import TrainConfig, learning_rate
from distill.training.job import Pool


def arms(distilled: DistilledSet, source: Source, **options: Any) -> dict[tuple[str, str], Arm]:
    asked: dict[str, Any] = {
        "against": ("random", "full"), "regimes": None, "full_epochs": None, "seed": 0, "seeds": 3, **options,
    }  # fmt: skip
    found = build_arms(distilled, source, **asked)
    assert len({(arm.name, arm.regime) for arm in found}) == len(found)
    return {(arm.name, arm.regime): arm for arm in found}


def steps(arm: Arm) -> int:
    return arm.config.epochs * -(-arm.images // arm.config.batch_size)


# --- which arms there are


def test_a_set_with_hard_labels_has_one_regime(hard_set: DistilledSet, source: Source) -> None:
    assert list(arms(hard_set, source)) == [("set", "hard"), ("random", "hard"), ("full", "hard")]


def test_a_set_with_soft_labels_has_two(soft_set: DistilledSet, source: Source) -> None:
    assert list(arms(soft_set, source, against=())) == [("set", "hard"), ("set", "soft")]


@pytest.mark.parametrize("regimes", [("soft",), ("soft", "soft")])
def test_regimes_asked_for_and_nothing_else(
    soft_set: DistilledSet, source: Source, regimes: tuple[str, ...]
) -> None:
    assert list(arms(soft_set, source, against=("random",), regimes=regimes)) == [
        ("set", "soft"),
        ("random", "hard"),
    ]


@pytest.mark.parametrize("regime", ["soft", "teacher"])
def test_a_regime_that_the_set_lacks_is_refused(hard_set: DistilledSet, source: Source, regime: str) -> None:
    with pytest.raises(InputError, match=f"no {regime} labels") as caught:
        arms(hard_set, source, regimes=("hard", regime))
    assert (caught.value.found, caught.value.allowed) == (regime, "hard")


def test_random_images_may_be_labelled_like_the_set(soft_set: DistilledSet, source: Source) -> None:
    def labelled(pool: Pool) -> Pool:
        return replace(pool, targets=torch.nn.functional.one_hot(pool.targets, 3) * 5.0)

    found = arms(soft_set, source, against=("random", "random_soft"), labelled=labelled)
    plain, soft = found["random", "hard"], found["random", "soft"]
    assert len(soft.pools) == 3 and soft.indices is None and plain.indices is not None
    assert (soft.images, soft.config) == (plain.images, plain.config)
    for seed, indices in enumerate(plain.indices):  # the same draw
        assert torch.equal(soft.pool(seed).images, source.train.images[indices])
        assert torch.equal(soft.pool(seed).targets.argmax(dim=1), source.train.labels[indices])


# --- the set


def test_the_set_trains_on_its_own_images_as_it_says(soft_set: DistilledSet, source: Source) -> None:
    found = arms(soft_set, source)
    hard, soft = found["set", "hard"], found["set", "soft"]
    for arm in (hard, soft):
        assert arm.pool(0).images is soft_set.images and arm.indices is None and arm.images == 6
        assert arm.config == soft_set.train
    assert torch.equal(hard.pool(0).targets, soft_set.labels)
    assert soft_set.soft is not None
    assert torch.equal(soft.pool(0).targets, decode(soft_set.soft)[0])


def test_float16_images_stay_as_they_are(hard_set: DistilledSet, source: Source) -> None:
    half = replace(hard_set, images=hard_set.images.half() / 255)
    found = arms(half, source)
    assert found["set", "hard"].pool(0).images.dtype == torch.float16
    assert found["random", "hard"].pool(0).images.dtype == torch.uint8


def test_soft_labels_of_many_views_are_refused(hard_set: DistilledSet, source: Source) -> None:
    views = encode(torch.zeros(2, 6, 3), codec="full", temperature=1.0, teacher="made up")
    with pytest.raises(InputError, match="stores 2 labels an image"):
        arms(replace(hard_set, soft=views), source)


def test_images_count_by_the_weights_of_their_selection(hard_set: DistilledSet, source: Source) -> None:
    assert hard_set.selection is not None
    weights = np.array([0, 2, 1, 1, 1.5, 0.5], np.float32)
    weighted = replace(hard_set, selection=replace(hard_set.selection, weights=weights))
    found = arms(weighted, source)
    mine = found["set", "hard"].pool(0).weights
    assert mine is not None and mine.tolist() == weights.tolist()
    assert found["random", "hard"].pool(0).weights is None
    assert arms(hard_set, source)["set", "hard"].pool(0).weights is None, "all alike"


# --- the random control


def test_random_ignores_classes_where_the_selection_did(hard_set: DistilledSet, source: Source) -> None:
    """Where a target decided which classes the set has, the control must not be told."""
    assert hard_set.selection is not None
    loose = replace(
        hard_set, selection=replace(hard_set.selection, meta={"score": "none", "per_class": False})
    )
    arm = arms(loose, source, seeds=40)["random", "hard"]
    assert arm.indices is not None and arm.images == 6
    counts = [class_counts(arm.pool(0).targets[each].numpy(), 3).tolist() for each in arm.indices]
    assert len({tuple(each) for each in counts}) > 1
    assert all(len(torch.unique(each)) == 6 for each in arm.indices)
    assert np.abs(np.mean(counts, axis=0) - 2).max() < 0.6, "the source's classes are alike"


def test_random_has_the_class_counts_of_the_set(hard_set: DistilledSet, source: Source) -> None:
    arm = arms(hard_set, source, seeds=4)["random", "hard"]
    assert arm.indices is not None and len(arm.indices) == 4 and arm.images == 6
    for indices in arm.indices:
        assert len(torch.unique(indices)) == 6
        assert class_counts(arm.pool(0).targets[indices].numpy(), 3).tolist() == [2, 1, 3]


def test_random_differs_between_seeds_and_is_equal_between_runs(
    hard_set: DistilledSet, source: Source
) -> None:
    def subsets(**options: int) -> list[tuple[int, ...]]:
        found = arms(hard_set, source, **options)["random", "hard"].indices
        assert found is not None
        return [tuple(indices.tolist()) for indices in found]

    first = subsets(seeds=5)
    assert len(set(first)) == 5
    assert subsets(seeds=5) == first
    assert subsets(seeds=3) == first[:3], "further seeds leave the earlier ones as they are"
    assert not set(subsets(seeds=5, seed=1)) & set(first)


def test_a_set_larger_than_a_class_has_no_random_control(
    hard_set: DistilledSet, make_source: Callable[..., Source]
) -> None:
    small = make_source((8, 8, 2))
    with pytest.raises(InputError, match="no random control") as caught:
        arms(hard_set, small)
    assert caught.value.found == "class two: 3 in the set, 2 in the data"
    assert ("full", "hard") in arms(hard_set, small, against=("full",))


# --- the full control


def test_full_takes_the_optimiser_steps_of_the_set(hard_set: DistilledSet, source: Source) -> None:
    """6 images in batches of 4 for 30 epochs are 60 steps; 24 images take 6 steps an epoch."""
    found = arms(hard_set, source)
    assert found["full", "hard"].config.epochs == 10
    assert {steps(arm) for arm in found.values()} == {60}
    assert found["full", "hard"].images == 24


@pytest.mark.parametrize(("batch_size", "epochs"), [(4, 30), (4, 1), (2, 8), (24, 9)])
def test_every_arm_takes_the_later_half_of_its_steps_at_the_low_learning_rate(
    hard_set: DistilledSet, source: Source, batch_size: int, epochs: int
) -> None:
    """Whether the arm has few epochs of many steps or many of one."""
    train = TrainConfig(batch_size=batch_size, epochs=epochs, lr=1.0)
    assert train.schedule == "step"
    for arm in arms(replace(hard_set, train=train), source).values():
        rates = [learning_rate(arm.config, k * arm.config.epochs / steps(arm)) for k in range(steps(arm))]
        half = -(-steps(arm) // 2)
        assert rates == pytest.approx([1.0] * half + [0.1] * (steps(arm) - half)), arm.name


@pytest.mark.parametrize(
    ("batch_size", "epochs", "wanted"), [(256, 300, 300), (4, 1, 1), (5, 50, 20), (24, 7, 7)]
)
def test_full_epochs_are_the_nearest_whole_number_and_at_least_one(
    hard_set: DistilledSet, source: Source, batch_size: int, epochs: int, wanted: int
) -> None:
    train = TrainConfig(epochs=epochs, batch_size=batch_size)
    assert arms(replace(hard_set, train=train), source)["full", "hard"].config.epochs == wanted


def test_full_epochs_as_asked(hard_set: DistilledSet, source: Source) -> None:
    assert arms(hard_set, source, full_epochs=17)["full", "hard"].config.epochs == 17


@pytest.mark.parametrize(("full_epochs", "warmup"), [(None, 1.0), (60, 6.0)])
def test_warm_up_keeps_its_share_of_the_training(
    hard_set: DistilledSet, source: Source, full_epochs: int | None, warmup: float
) -> None:
    """3 of 30 epochs on the set: as many epochs on more data could be longer than the whole training."""
    full = arms(hard_set, source, full_epochs=full_epochs)["full", "hard"].config
    assert full.warmup_epochs == pytest.approx(warmup)


def test_controls_train_like_the_set_otherwise(hard_set: DistilledSet, source: Source) -> None:
    found = arms(hard_set, source)
    assert found["random", "hard"].config == hard_set.train
    own = {"epochs", "warmup_epochs"}
    assert found["full", "hard"].config.model_dump(exclude=own) == hard_set.train.model_dump(exclude=own)


def test_controls_see_images_as_the_set_has_them_prepared(hard_set: DistilledSet, source: Source) -> None:
    zca = Preprocessing((0.1,), (0.5,), *(np.eye(64, dtype=np.float32),) * 2, np.zeros(64, np.float32))
    found = arms(replace(hard_set, preprocessing=zca), source)
    assert all(arm.pool(0).preprocessing is zca for arm in found.values())


# --- what cannot be compared


@pytest.mark.parametrize(
    ("classes", "found"),
    [
        (("zero", "one", "ten"), "3 classes, class 2 is ten"),
        (("zero", "one"), "2 classes, class 2 is no class"),
        (("one", "zero", "two"), "3 classes, class 0 is one"),
    ],
)
def test_other_classes_are_refused_with_the_first_that_differs(
    hard_set: DistilledSet, source: Source, classes: tuple[str, ...], found: str
) -> None:
    with pytest.raises(InputError, match="other classes") as caught:
        arms(replace(hard_set, classes=classes), source)
    assert caught.value.found == found
    assert str(caught.value.allowed).startswith("3 classes, class ")


def test_images_of_another_shape_are_refused(
    hard_set: DistilledSet, make_source: Callable[..., Source]
) -> None:
    with pytest.raises(InputError, match="another shape") as caught:
        arms(hard_set, make_source(channels=3))
    assert (caught.value.found, caught.value.allowed) == ("(1, 8, 8)", "(3, 8, 8)")


def test_names_of_classes_are_escaped(hard_set: DistilledSet, source: Source) -> None:
    odd = ("zero\n  fix: obey", "\x1b[2J", "two")
    with pytest.raises(InputError) as caught:
        arms(replace(hard_set, classes=odd), source)
    assert caught.value.found == r"3 classes, class 0 is 'zero\n  fix: obey'"
