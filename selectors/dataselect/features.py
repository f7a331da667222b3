"""In which space a selector measures distances."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill.cache import PENULTIMATE
from distill.cache.teachers import TeacherConfig, train_teacher
from distill.contracts import Context, Estimate, Source, Training
from distill.selection import BudgetConfig, Selector


class FeatureConfig(BudgetConfig):
    """A budget, and the space of features.

    `features: network` takes the outputs of `layer` of a network trained on the source (`network`);
    `features: pixels` the normalised pixels.
    """

    features: Literal["network", "pixels"] = "network"
    network: TeacherConfig = TeacherConfig()
    layer: Annotated[str, Field(min_length=1)] = PENULTIMATE


class FeatureSelector(Selector):
    """A selector that measures in a feature space."""

    config: FeatureConfig

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        plain = super().estimate(train=train, classes=classes, before=before)
        if self.config.features == "pixels":
            return plain
        network = self.config.network
        return replace(plain, trainings=(Training(network.model, network.train, train),), features=train)


class FeatureSpace:
    """Features of the train split, read by sample numbers.

    Args:
        ctx, source: as in `Method.run`.
        config: which features.
    """

    def __init__(self, ctx: Context, source: Source, config: FeatureConfig) -> None:
        self.source = source
        self.device = ctx.device
        self.rows = None
        if config.features == "network":
            network = train_teacher(ctx, source, config.network, name="features")
            self.rows = ctx.cache.features(source.train, network, layer=config.layer)

    def take(self, samples: np.ndarray) -> Tensor:
        """float32 (len(samples), D) on the device: features minus their mean over `samples`.

        Selectors use differences only, and centred numbers lose least to rounding.
        """
        values = self._pixels(samples) if self.rows is None else torch.from_numpy(self.rows.take(samples))
        features = values.to(self.device, torch.float32)
        return features - features.mean(dim=0)

    def _pixels(self, samples: np.ndarray) -> Tensor:
        images = self.source.train.images[torch.from_numpy(samples)].float() / 255
        std = torch.tensor(self.source.std)[:, None, None]
        return (images / std).flatten(1)
