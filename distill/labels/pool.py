"""Teachers by recipe: trained on the source and kept by the cache, or read from files of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import nn

from distill.cache.forward import logits_of
from distill.cache.networks import Network, definition
from distill.cache.teachers import (
    TeacherConfig,
    TeacherTraining,
    checkpoint_epochs,
    load_teacher,
    train_teachers,
)
from distill.contracts import Context, Preprocessing, Source, Split, Training
from distill.errors import InputError
from distill.models import ModelSpec, describe, model_config
from distill.training.config import Positive, Strict

_LOOKED_AT = 20  # images a class for the order of classes, and at least so many in all:
_LOOKED_AT_IN_ALL = 2000
_FEW = 5  # images a class below which single classes tell nothing
_CHANCE = 3.0  # standard deviations above what one class's images being taken for another would be by chance


class PoolTeacher(Strict):
    """A teacher: trained on the source as `train` says, or, with `train: null`, as the weights of its model's file are.

    `mean` and `std` are those that a file's weights were trained behind (in units of pixel value / 255), such as
    ImageNet's; left out, they are the source's.
    """

    model: ModelSpec = Field(
        default_factory=lambda: model_config({"name": "convnet", "width": 32, "norm": "batch"})
    )
    train: TeacherTraining | None = TeacherTraining()
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _statistics_belong_to_files(self) -> Self:
        if (self.mean is None) != (self.std is None):
            raise ValueError("give mean and std together")
        if self.mean is not None and self.train is not None:
            raise ValueError("mean and std belong to weights from a file: set train: null, or leave them out")
        return self


def estimated(teachers: Sequence[PoolTeacher], samples: int) -> tuple[Training, ...]:
    """The trainings of a pool, for a dry run."""
    return tuple(
        Training(teacher.model, teacher.train, samples) for teacher in teachers if teacher.train is not None
    )


def outlines(teachers: Sequence[PoolTeacher], source: Source) -> dict[str, nn.Module]:
    """The networks of a pool by name, without memory for their weights.

    Raises:
        InputError: images that a network cannot take.
    """
    return {
        describe(teacher.model): definition(
            teacher.model, image_shape=source.image_shape, classes=len(source.classes)
        ).to("meta")
        for teacher in teachers
    }


def open_pool(
    ctx: Context, source: Source, teachers: Sequence[PoolTeacher], *, checkpoints: int = 1
) -> list[Network]:
    """The networks of a pool, in order.

    Teachers of one configuration are trained from initial weights of their own.

    Args:
        ctx, source: of the run.
        teachers: the pool.
        checkpoints: how many networks along each training are kept, with the last.

    Raises:
        InputError: weights for another network or number of classes, or whose classes stand in another order.
    """
    networks: dict[int, Network] = {}
    for number, teacher in enumerate(teachers):
        if number in networks:
            continue
        alike = [place for place, other in enumerate(teachers) if other == teacher]
        if teacher.train is not None:
            made = train_teachers(
                ctx,
                source,
                TeacherConfig(model=teacher.model, train=teacher.train),
                count=len(alike),
                name="teacher",
                checkpoints=checkpoint_epochs(teacher.train, checkpoints),
            )
            networks |= dict(zip(alike, made, strict=True))
        else:
            network = _from_file(ctx, source, teacher)
            networks |= dict.fromkeys(alike, network)
    return [networks[number] for number in range(len(teachers))]


def _from_file(ctx: Context, source: Source, teacher: PoolTeacher) -> Network:
    behind = None
    if teacher.mean is not None and teacher.std is not None:
        channels = source.image_shape[0]
        if not len(teacher.mean) == len(teacher.std) == channels:
            raise InputError(
                "mean and std of a teacher do not fit the images",
                found=f"{len(teacher.mean)} and {len(teacher.std)} numbers",
                allowed=f"{channels}, one a channel",
            )
        behind = Preprocessing(mean=teacher.mean, std=teacher.std)
    network = load_teacher(ctx, source, teacher.model, name="teacher", preprocessing=behind)
    refuse_other_order(ctx, source, network)
    return network


def refuse_other_order(ctx: Context, source: Source, network: Network) -> None:
    """Raise InputError where the network knows the classes, in another order than the data's.

    The commonest failure with weights from elsewhere: an output that means another class than its number here. What
    images of each class are taken for tells, see `moved_classes`.
    """
    split = source.valid if len(source.valid) >= _FEW * len(source.classes) else source.train
    counts = _confusion(ctx, split, network)
    total = int(counts.sum())
    moved = moved_classes(counts)
    if not moved:
        return
    order = np.arange(len(counts))
    for row, column in moved:
        order[row] = column
    best, own = int(counts[np.arange(len(counts)), order].sum()) / total, int(np.trace(counts)) / total
    told = ", ".join(
        f"output {column} means {source.classes[row]!r}, class {row}" for row, column in moved[:3]
    )
    raise InputError(
        f"the classes of the teacher {describe(network.model)} stand in another order than the data's",
        found=f"{own:.1%} right as numbered, {best:.1%} in another order: {told}"
        + (", ..." if len(moved) > 3 else ""),
        allowed=f"the data's order: {', '.join(source.classes[:5])}{', ...' if len(source.classes) > 5 else ''}",
        fix="name the data's classes in the order of the weights (data.classes), or reorder the last layer's rows",
    )


def moved_classes(counts: np.ndarray) -> list[tuple[int, int]]:
    """Classes whose images are taken for another one, which then has moved, too: (class, output that means it).

    Of the assignment of outputs to classes that explains most, those pairs of class y and output o count that are no
    confusion of a weak network: y's images are said to be o twice as often as y's are said to be y, or o's to be o;
    they are a quarter of what is said to be o; and they are all of y's, or three standard deviations more than chance.
    Where such pairs are fewer than three and a tenth of all classes, they must be a permutation among themselves. Where
    there are fewer than five images a class, all of the assignment counts, if it explains half of the images more than
    the order as it is.

    Args:
        counts: how often images of a class (row) are taken for another (column), int64 (C, C).
    """
    rows, columns = linear_sum_assignment(-counts)
    images, said = counts.sum(axis=1), counts.sum(axis=0)
    total = max(int(counts.sum()), 1)
    pairs = [
        (row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True) if row != column
    ]
    if total < _FEW * len(counts):
        gain = int(counts[rows, columns].sum()) - int(np.trace(counts))
        return pairs if 2 * gain > total else []
    found = {}
    for row, column in pairs:
        seen, chance = int(counts[row, column]), said[column] / total
        expected = images[row] * chance
        deviation = max(float(expected * (1 - chance)) ** 0.5, 1.0)
        others = max(int(counts[row, row]), int(counts[column, column]))
        many = seen == images[row] or seen > expected + _CHANCE * deviation
        clear = seen > 2 * others and 4 * seen > said[column] and many
        if clear:
            found[row] = column
    if len(found) >= max(3, len(counts) / 10):
        return sorted(found.items())
    while dropped := [row for row in found if row not in found.values() or found[row] not in found]:
        for row in dropped:
            del found[row]
    return sorted(found.items())


def _confusion(ctx: Context, split: Split, network: Network) -> np.ndarray:
    """How often images of a class (row) are taken for another (column): int64 (C, C)."""
    wanted = max(_LOOKED_AT_IN_ALL, _LOOKED_AT * network.classes)
    rows = torch.arange(0, len(split), max(1, len(split) // wanted))
    part = Split(split.images[rows], split.labels[rows], fingerprint="")
    said, classes = logits_of(network, part, device=ctx.device).argmax(dim=1).cpu(), network.classes
    pairs = split.labels[rows] * classes + said
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()
