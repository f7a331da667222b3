"""Teachers by recipe: trained on the source and kept by the cache, or read from files of weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.optimize import linear_sum_assignment
from torch import nn

from distill.cache.networks import Network, definition
from distill.cache.teachers import TeacherConfig, TeacherTraining, load_teacher, train_teachers
from distill.contracts import Context, Preprocessing, Source, Split, Training
from distill.errors import InputError
from distill.models import ModelSpec, describe, model_config
from distill.training.config import Positive, Strict

_LOOKED_AT = 2000  # images for the order of classes
_CLEARLY = 0.2  # how much better another order must be, as a share of the images, and right in more than half


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


def open_pool(ctx: Context, source: Source, teachers: Sequence[PoolTeacher]) -> list[Network]:
    """The networks of a pool, in order.

    Teachers of one configuration are trained from initial weights of their own.

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
    images of each class are taken for tells: where another assignment of outputs to classes is clearly better than
    the identity, and good, the order is wrong.
    """
    split = source.valid if len(source.valid) else source.train
    counts = _confusion(ctx, split, network)
    total = int(counts.sum())
    rows, columns = linear_sum_assignment(-counts)
    best, own = int(counts[rows, columns].sum()) / total, int(np.trace(counts)) / total
    if best <= 0.5 or best - own < _CLEARLY:
        return
    moved = [
        (row, column) for row, column in zip(rows.tolist(), columns.tolist(), strict=True) if row != column
    ]
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


def _confusion(ctx: Context, split: Split, network: Network) -> np.ndarray:
    """How often images of a class (row) are taken for another (column): int64 (C, C)."""
    step = max(1, len(split) // _LOOKED_AT)
    rows = torch.arange(0, len(split), step)
    logits = ctx.cache.logits(split, network).take(rows.to(ctx.device))
    said, classes = logits.argmax(dim=1).cpu(), network.classes
    pairs = split.labels[rows] * classes + said
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()
