"""The source's own validation split as a target: images that methods may read and that none of them picks."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.contracts import Source, Split
from distill.data.rows import check_no_class_empty, class_numbers, drawn_per_class, renumbering
from distill.data.statistics import split_of
from distill.errors import InputError
from distill.randomness import derive_seed
from distill.training.config import Strict


class ValidConfig(Strict):
    """The options of the target `valid`.

    Args:
        name: valid.
        classes: of these only, by name or number; they are renumbered in the order given.
        cap: at most this many images a class: those that come first by a hash of (seed, row number).
    """

    name: Literal["valid"] = "valid"
    classes: Annotated[list[str | int], Field(min_length=1)] | None = None
    cap: Annotated[int, Field(ge=1)] | None = None


class ValidTarget:
    """The validation split of the data as a target; its test split is the data's, of the same classes.

    Args:
        config: which classes, and how many images of each.
    """

    Config = ValidConfig

    def __init__(self, config: ValidConfig) -> None:
        self.config = config

    def of(self, source: Source, *, seed: int) -> Source:
        """The target.

        Raises:
            InputError: there is no validation split, or a class is unknown or empty in it.
        """
        if not len(source.valid):
            raise InputError(
                "the target is the validation split, and the data have none",
                where="target",
                found="data.valid 0",
                fix="set data.valid, for example to 0.1, or name other data",
            )
        numbers = class_numbers(self.config.classes, source.classes, where="target.classes")
        names = tuple(source.classes[number] for number in numbers)
        table = renumbering(numbers, classes=len(source.classes))
        train = _taken(source.valid, self._used(table[source.valid.labels], len(names), seed), table)
        check_no_class_empty(
            train.labels,
            names,
            where="target",
            fix="raise data.valid, or leave the class out with target.classes",
        )
        held_out = source.held_out
        return Source(
            name="valid",
            classes=names,
            train=train,
            valid=_taken(source.valid, torch.zeros(len(source.valid), dtype=torch.bool), table),
            mean=source.mean,
            std=source.std,
            notes=(f"{len(train)} of {len(source.valid)} validation images",),
            held_out=None if held_out is None else _taken(held_out, table[held_out.labels] >= 0, table),
        )

    def _used(self, labels: Tensor, classes: int, seed: int) -> Tensor:
        """bool (N,): the images of the classes wanted, capped."""
        used = labels >= 0
        if self.config.cap is not None:
            group = torch.where(used, labels, classes)  # images of other classes are a group of their own
            counts = torch.full((classes + 1,), self.config.cap, dtype=torch.int64)
            used &= drawn_per_class(group, counts, seed=derive_seed(seed, "target", "cap"))
        return used


def _taken(split: Split, used: Tensor, table: Tensor) -> Split:
    return split_of(split.images[used], table[split.labels[used]])
