"""In which space a selector measures distances."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.cache import PENULTIMATE, Features, Gradients, Projection, Rows
from distill.cache.forward import resolved
from distill.cache.networks import definition
from distill.cache.teachers import TeacherConfig, train_teacher
from distill.contracts import Context, DistilledSet, Estimate, Selection, Source, StepKind, Training
from distill.errors import InputError
from distill.selection import BudgetConfig, Selector, select_by_class

# What each space is made from.
_USED = {"network": ("network", "layer"), "gradients": ("network", "projection"), "pixels": ()}


class FeatureConfig(BudgetConfig):
    """A budget, and the space of features.

    `features: network` takes the outputs of `layer` of a network trained on the source (`network`);
    `features: gradients` the gradients of the network's loss by its parameters, projected (`projection`);
    `features: pixels` the normalised pixels.
    """

    features: Literal["network", "gradients", "pixels"] = "network"
    network: TeacherConfig = TeacherConfig()
    layer: Annotated[str, Field(min_length=1)] = PENULTIMATE
    projection: Projection = Projection()

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        # By value: a merged recipe names every default.
        fields = type(self).model_fields
        ignored = [
            name
            for name in ("network", "layer", "projection")
            if name not in _USED[self.features]
            and getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]
        if ignored:
            names = " and ".join(ignored)
            error = InputError(
                f"{names} would be ignored: features: {self.features} is not made from it",
                found=f"features: {self.features} with {names}",
                fix=f"remove {names}, or set features to what uses it",
            )
            raise ValueError(error.what) from error
        return self


class FeatureSelector(Selector):
    """A selector that picks within each class by its features. A subclass sets `score` and `pick`."""

    config: FeatureConfig
    score: ClassVar[str]  # what the scores of its picks mean

    @abstractmethod
    def pick(self, features: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Row numbers int64 (count,) in the order picked, and their scores (count,).

        Args:
            features: float32 (N, D) of one class, centred (their mean is 0).
            count: at most N.
        """

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        config = self.config
        if config.features == "network" and config.layer != PENULTIMATE:
            # Now, and not after the network was trained.
            shape, classes = source.image_shape, len(source.classes)
            module = definition(config.network.model, image_shape=shape, classes=classes)
            resolved(Features(config.layer), module)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space = FeatureSpace(ctx, source, self.config)

        def pick_class(samples: np.ndarray, count: int, number: int) -> tuple[np.ndarray, np.ndarray]:
            rows, scores = self.pick(space.take(samples), count)
            return samples[rows.cpu().numpy()], scores.cpu().numpy()

        return select_by_class(source, previous, self.config, pick_class, meta={"score": self.score})

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        plain = super().estimate(train=train, classes=classes, before=before)
        if self.config.features == "pixels":
            return plain
        network = self.config.network
        return replace(plain, trainings=(Training(network.model, network.train, train),), features=train)


class FeatureSpace:
    """Features of the train split, read by sample numbers.

    The network is trained when features are first taken, after the budget was found to fit.

    Args:
        ctx, source: as in `Method.run`.
        config: which features.
    """

    def __init__(self, ctx: Context, source: Source, config: FeatureConfig) -> None:
        self.ctx = ctx
        self.source = source
        self.config = config

    def take(self, samples: np.ndarray) -> Tensor:
        """float32 (len(samples), D) on the device: features minus their mean over `samples`.

        Selectors use differences only, and centred numbers lose least to rounding.
        """
        pixels = self.config.features == "pixels"
        values = self._pixels(samples) if pixels else self._rows.take(samples)
        features = values.to(self.ctx.device, torch.float32)
        return features - features.mean(dim=0)

    @cached_property
    def _rows(self) -> Rows:
        """float32 (N, D): the layer's outputs, or projected gradients, for every sample of the train split."""
        network = train_teacher(self.ctx, self.source, self.config.network, name="feature network")
        if self.config.features == "gradients":
            quantity = Gradients(self.config.projection)
            return self.ctx.cache.gradients(self.source.train, network, quantity)
        return self.ctx.cache.features(self.source.train, network, layer=self.config.layer)

    def _pixels(self, samples: np.ndarray) -> Tensor:
        """(len(samples), D): pixels in units of their channel's standard deviation; centring takes the mean away."""
        images = self.source.train.images[torch.from_numpy(samples)].float() / 255
        std = torch.tensor(self.source.std)[:, None, None]
        return (images / std).flatten(1)
