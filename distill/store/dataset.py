"""A set as a torch Dataset: `distill.load("set.h5")` goes straight into a DataLoader."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from distill.contracts import DistilledSet, Preprocessing
from distill.errors import InputError
from distill.labels import codecs
from distill.store.reader import read_set
from distill.training.config import TrainConfig

Labels = Literal["auto", "hard", "soft"]


class Transform:
    """From pixels to what a network expects; to be applied to test images as well.

    x = (pixel / 255 - mean) / std per channel; then, with ZCA, z = (flatten(x) - zca_mean) @ zca.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.mean = torch.tensor(preprocessing.mean)[:, None, None]
        self.std = torch.tensor(preprocessing.std)[:, None, None]
        whitened = preprocessing.zca is not None and preprocessing.zca_mean is not None
        self.zca = torch.from_numpy(preprocessing.zca) if whitened else None
        self.zca_mean = torch.from_numpy(preprocessing.zca_mean) if whitened else None

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised float32 (..., Ch, H, W) of images of that shape, uint8 in 0..255 or float in [0, 1]."""
        if images.ndim < 3 or images.shape[-3] != len(self.mean):
            raise InputError(
                "the images do not fit this set's transform",
                found=f"shape {tuple(images.shape)}",
                allowed=f"(..., {len(self.mean)}, H, W)",
            )
        if images.dtype == torch.uint8:
            pixels = images.float() / 255
        elif images.is_floating_point():
            pixels = images.float()
        else:
            raise InputError(
                "the images have no pixel type",
                found=str(images.dtype),
                allowed="uint8 in 0..255, float in [0, 1]",
            )
        normalised = (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        if self.zca is None or self.zca_mean is None:
            return normalised
        flat = normalised.flatten(-3) - self.zca_mean.to(pixels.device)
        return (flat @ self.zca.to(pixels.device)).view(normalised.shape)


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
        if labels == "hard" or distilled.soft is None:
            self.targets = distilled.labels
        else:
            self.targets = codecs.probabilities(distilled.soft)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; their position is the class number."""
        return self.set.classes

    @property
    def train_recipe(self) -> TrainConfig:
        """The training that the set is meant for."""
        return self.set.train

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
