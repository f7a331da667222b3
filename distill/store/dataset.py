"""A set as a torch Dataset: `distill.load("set.h5")` goes straight into a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.contracts import DistilledSet
from distill.errors import InputError
from distill.labels import codecs
from distill.preprocessing import Transform
from distill.store.reader import read_set
from distill.training.config import TrainConfig

Labels = Literal["auto", "hard", "soft"]


class SetDataset(Dataset[tuple[Tensor, Tensor]]):
    """The images of a set and their targets.

    An item is (image, target): a normalised float32 image (Ch, H, W), un-augmented; and an int64 class number
    (), or float32 probabilities (C,) at the stored temperature, the mean over the label sets where there are
    several.

    Args:
        distilled: the set.
        labels: `hard`, `soft`, or `auto`: soft where the set has soft labels.

    Raises:
        InputError: soft labels are asked for, and the set has none.
    """

    def __init__(self, distilled: DistilledSet, *, labels: Labels = "auto") -> None:
        if labels not in ("auto", "hard", "soft"):
            raise InputError("unknown kind of labels", found=repr(labels), allowed="auto, hard, soft")
        if labels == "soft" and distilled.soft is None:
            raise InputError("the set has no soft labels", found="labels='soft'", allowed="'auto' or 'hard'")
        self.set = distilled
        self.transform = Transform(distilled.preprocessing)
        if labels == "soft" and not codecs.is_stored(distilled.soft):
            raise InputError(
                "the set stores no soft labels: its teachers give them as students train",
                found="labels='soft'",
                allowed="'auto' or 'hard'",
                fix="make the set with labels: stored",
            )
        self.soft = labels != "hard" and codecs.is_stored(distilled.soft)

    @cached_property
    def targets(self) -> Tensor:
        """int64 (N,), or float32 (N, C); with labels of many views they are all read for the mean."""
        if not self.soft:
            return self.set.labels
        assert self.set.soft is not None, "stored soft labels"
        return codecs.probabilities(self.set.soft, classes=self.set.labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; their position is the class number."""
        return self.set.classes

    @property
    def train_recipe(self) -> TrainConfig:
        """The training that the set is meant for."""
        return self.set.train

    @property
    def weights(self) -> Tensor:
        """How much each image counts in a loss, float32 (N,) of mean 1: what a selector found, else ones."""
        if self.set.selection is None:
            return torch.ones(len(self.set))
        return torch.from_numpy(self.set.selection.weights)

    def __len__(self) -> int:
        return len(self.set)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.set.images[index]), self.targets[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch at once, for DataLoader: with ZCA one matrix product in place of one an image."""
        rows = torch.as_tensor(indices)
        images = self.transform(self.set.images[rows])
        return list(zip(images.unbind(), self.targets[rows].unbind(), strict=True))


def load(path: str | os.PathLike[str], *, labels: Labels = "auto", verify: bool = True) -> SetDataset:
    """Read a set and give it as a torch Dataset.

    Args:
        path: the set.h5 of a run.
        labels: see `SetDataset`.
        verify: compare every array with its sha256.

    Raises:
        InputError, DamagedDataError, UnsafeFileError: as in `read_set`.
    """
    return SetDataset(read_set(Path(path), verify=verify), labels=labels)
