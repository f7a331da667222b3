"""The arms of a comparison: what each trains on, in which regime, for how long.

Every arm is given, seed by seed, the same initial weights and counters. The set and a random arm take the same
optimiser steps; the full data, which are the training split without what was cut off for validation, take about as
many, in whole epochs, and at least one. A random arm draws another subset for each seed, so that its interval holds the
luck of the draw. Where a selector gave weights, the set's images count by them. `random` has hard labels, and so has
`random_target`, which is drawn among the target's classes: what a target's labels say without any resemblance;
`random_soft` has those that the set's own teachers give to the same views: what is left of a difference to it, the
images make.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from distill.contracts import DistilledSet, Preprocessing, Selection, SoftLabels, Source
from distill.errors import InputError
from distill.labels.codecs import CODECS, decode, is_stored, refuse_distances, refuse_loss, refuse_unmixed
from distill.labels.view_labels import plan_of
from distill.randomness import derive_seed
from distill.selection import (
    PER_CLASS,
    class_counts,
    labelled_target,
    proportional,
    random_pick,
    random_subset,
    source_counts,
)
from distill.training.config import TrainConfig
from distill.training.job import Pool, ViewLabels, ViewPlan
from distill.yaml_lines import quoted


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm in one regime.

    Args:
        name: `set`, `random` or `full`.
        regime: `hard`, `soft` or `teacher`.
        pools: images and targets: one pool, or one a seed.
        config: training, with the arm's epochs.
        indices: one int64 (n,) a seed, or None where every seed trains on the whole pool.
    """

    name: str
    regime: str
    pools: tuple[Pool, ...]
    config: TrainConfig
    indices: tuple[Tensor, ...] | None = None

    def pool(self, seed: int) -> Pool:
        """What the networks of the seed of this number learn from."""
        return self.pools[seed if len(self.pools) > 1 else 0]

    @property
    def images(self) -> int:
        return len(self.pools[0]) if self.indices is None else len(self.indices[0])


def build_arms(
    distilled: DistilledSet,
    source: Source,
    *,
    against: tuple[str, ...],
    regimes: tuple[str, ...] | None,
    full_epochs: int | None,
    seed: int,
    seeds: int,
    views: ViewLabels | None = None,
    labelled: Callable[[Pool], Pool] | None = None,
) -> list[Arm]:
    """The set in its regimes, then its controls.

    Args:
        distilled: the set.
        source: where controls come from.
        against: controls, of `random`, `random_target` and `full`, which have hard labels, and `random_soft`.
        regimes: labels that students of the set see; None is every one that the set has.
        full_epochs: epochs on the full data; None gives it about the optimiser steps of the others, at least one
            epoch.
        seed: the root of the random subsets.
        seeds: how many there are.
        views: labels of the set's views, None where it has none.
        labelled: labels real images as the set is labelled; not None where `random_soft` is asked for.

    Raises:
        InputError: a regime that the set has no labels for, or a class too small for a random control.
    """
    _refuse_other_classes(distilled, source)
    check_labels(distilled, regimes, against)
    arms = [_set_arm(distilled, regime, views) for regime in _regimes(distilled, regimes)]
    real = Pool(source.train.images, source.train.labels, distilled.preprocessing)
    config = distilled.train
    if "random_target" in against:
        arms.append(
            Arm("random_target", "hard", (real,), config, _target_indices(distilled, source, seed, seeds))
        )
    if {"random", "random_soft"} & set(against):
        indices = _random_indices(distilled, source, seed, seeds)
    if "random_soft" in against:
        assert labelled is not None and distilled.soft is not None, "somebody who labels"
        pools = (labelled(_real_part(source, each, distilled.preprocessing)) for each in indices)
        arms.append(Arm("random", _soft_regime(distilled.soft), tuple(pools), config))
    if "random" in against:
        arms.append(Arm("random", "hard", (real,), config, indices))
    if "full" in against:
        epochs = full_epochs or _equal_epochs(config, len(distilled), len(source.train))
        arms.append(Arm("full", "hard", (real,), _lasting(config, epochs)))
    return arms


def check_labels(distilled: DistilledSet, regimes: tuple[str, ...] | None, against: tuple[str, ...]) -> None:
    """Raise InputError where students cannot learn from the set's labels as they are asked to; costs nothing."""
    plan = None if distilled.soft is None else plan_of(distilled.soft)
    asked = _regimes(distilled, regimes)
    if set(asked) == {"hard"} and "random_soft" not in against:
        return
    if plan is not None:
        _refuse_other_views(distilled, plan)
    else:
        refuse_distances(distilled.train.loss, fix="change train.loss, or evaluate in the regime hard")


def _refuse_other_classes(distilled: DistilledSet, source: Source) -> None:
    if distilled.classes != source.classes:
        names = (map(quoted, classes) for classes in (distilled.classes, source.classes))
        pairs = list(zip_longest(*names, fillvalue="no class"))
        number = next(number for number, (a, b) in enumerate(pairs) if a != b)
        raise InputError(
            "the set was made for other classes than the data have",
            found=f"{len(distilled.classes)} classes, class {number} is {pairs[number][0]}",
            allowed=f"{len(source.classes)} classes, class {number} is {pairs[number][1]}",
            fix="evaluate on the data that the set was made from (data.* options)",
        )
    if tuple(distilled.images.shape[1:]) != source.image_shape:
        raise InputError(
            "the set's images have another shape than the data's",
            found=str(tuple(distilled.images.shape[1:])),
            allowed=str(source.image_shape),
            fix="give the data the same resize and channels as in the set's recipe",
        )


def _regimes(distilled: DistilledSet, asked: tuple[str, ...] | None) -> tuple[str, ...]:
    has = ("hard",) if distilled.soft is None else ("hard", _soft_regime(distilled.soft))
    for regime in asked or ():
        if regime not in has:
            raise InputError(
                f"the set has no {regime} labels",
                found=regime,
                allowed=", ".join(has),
                fix="name another regime, or add a step that labels the set, such as soft_label",
            )
    return tuple(dict.fromkeys(asked or has))


def _soft_regime(soft: SoftLabels) -> str:
    """`soft` where labels are stored, `teacher` where the set's teachers are asked."""
    return "soft" if is_stored(soft) else "teacher"


def _set_arm(distilled: DistilledSet, regime: str, views: ViewLabels | None) -> Arm:
    plain = Pool(
        distilled.images, distilled.labels, distilled.preprocessing, weights=_weights(distilled.selection)
    )
    if regime == "hard":
        return Arm("set", regime, (plain,), distilled.train)
    if views is not None:
        return Arm("set", regime, (replace(plain, views=views),), distilled.train)
    assert distilled.soft is not None
    logits = decode(distilled.soft)  # (V, N, C)
    if len(logits) != 1:
        raise InputError(
            f"the set stores {len(logits)} labels an image and not of which views they are",
            fix="evaluate in the regime hard",
        )
    return Arm("set", regime, (replace(plain, targets=torch.as_tensor(logits[0])),), distilled.train)


def _weights(selection: Selection | None) -> Tensor | None:
    """How much each image of a set counts; None where a selector gave all the same weight, or none chose them."""
    if selection is None or np.all(selection.weights == 1):
        return None
    return torch.from_numpy(selection.weights)


def _refuse_other_views(distilled: DistilledSet, plan: ViewPlan) -> None:
    """Labels belong to the views that were labelled: students must look at the images in the same way."""
    train, soft = distilled.train, distilled.soft
    assert soft is not None, "whose views are labelled"
    refuse_loss(soft.codec, train.loss, fix="change train.loss, or evaluate in the regime hard")
    views = "the set's labels belong to other views than its students would see"
    training = "the set's labels were made for another training than its students would have"
    names = ("batch_size", "augment", "crop_scale", "mix", "mix_alpha")
    wanted = [(views, name, getattr(plan, name)) for name in names]
    if soft.attributes.get("batch_norm") == "batch":
        wanted.append((training, "micro_batches", soft.attributes.get("micro_batches", 1)))
    if soft.codec in CODECS and CODECS[soft.codec].belongs_to_temperature:
        wanted.append((training, "temperature", soft.attributes["temperature"]))
    for what, name, value in wanted:
        if getattr(train, name) != value:
            raise InputError(
                what,
                where=f"train.{name}",
                found=str(getattr(train, name)),
                allowed=str(value),
                fix="leave it as the set has it, or evaluate in the regime hard",
            )
    refuse_unmixed(train, soft.codec, fix="change train.loss, or evaluate in the regime hard")


def _random_indices(distilled: DistilledSet, source: Source, seed: int, seeds: int) -> tuple[Tensor, ...]:
    """For each seed, as many real images of every class as the set has; where the set's were picked without regard to
    classes, as many of all."""
    seeds_of = [derive_seed(seed, "random control", k) for k in range(seeds)]
    selection = distilled.selection
    if selection is not None and selection.meta.get(PER_CLASS) is False:
        every = np.arange(len(source.train))
        _refuse_larger(len(distilled), len(every))
        draws = (random_pick(every, len(distilled), seed=each, name="all") for each in seeds_of)
        return tuple(map(torch.from_numpy, draws))
    budget = class_counts(distilled.labels.numpy(), len(source.classes))
    there = source_counts(source)
    if (budget > there).any():
        number = int((budget - there).argmax())
        raise InputError(
            "the set has more images of a class than the data, so there is no random control of its size",
            found=f"class {quoted(source.classes[number])}: {budget[number]} in the set, {there[number]} in the data",
            fix="leave random and random_soft out of evaluate.against",
        )
    return tuple(torch.from_numpy(random_subset(source, budget, seed=each)) for each in seeds_of)


def _target_indices(distilled: DistilledSet, source: Source, seed: int, seeds: int) -> tuple[Tensor, ...]:
    """For each seed, as many real images as the set has, of the target's classes in its proportions."""
    there = source_counts(source)
    wanted = proportional(class_counts(labelled_target(source).labels.numpy(), len(there)), len(distilled))
    if (wanted > there).any():
        number = int((wanted - there).argmax())
        raise InputError(
            "the data have too few images of the target's classes for a random control of the set's size",
            found=f"class {quoted(source.classes[number])}: {there[number]}, of which {wanted[number]} are wanted",
            fix="leave random_target out of evaluate.against",
        )
    draws = (derive_seed(seed, "random target", k) for k in range(seeds))
    return tuple(torch.from_numpy(random_subset(source, wanted, seed=each)) for each in draws)


def _refuse_larger(images: int, there: int) -> None:
    if images > there:
        raise InputError(
            "the set has more images than the data, so there is no random control of its size",
            found=f"{images} in the set, {there} in the data",
            fix="leave random and random_soft out of evaluate.against",
        )


def _real_part(source: Source, indices: Tensor, preprocessing: Preprocessing) -> Pool:
    return Pool(source.train.images[indices], source.train.labels[indices], preprocessing)


def _lasting(config: TrainConfig, epochs: int) -> TrainConfig:
    """The training stretched or shortened to `epochs`; its warm-up keeps its share."""
    warmup = config.warmup_epochs * epochs / config.epochs
    return config.model_copy(update={"epochs": epochs, "warmup_epochs": warmup})


def _equal_epochs(config: TrainConfig, small: int, large: int) -> int:
    """Epochs over `large` samples that take about the optimiser steps of `config.epochs` over `small`."""
    steps = config.epochs * -(-small // config.batch_size)
    return max(1, round(steps / -(-large // config.batch_size)))
