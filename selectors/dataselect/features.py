"""In which space a selector measures: its options, and a selector that picks by features.

distill/cache computes the features; dataselect/space.py reads them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator
from torch import Tensor

from dataselect.space import FeatureSpace, Kind
from distill.byte_sizes import AsBytes
from distill.cache import PENULTIMATE, Features, Projection
from distill.cache.encoders import EncoderConfig, encoder_model, refuse_absent_weights, refuse_images
from distill.cache.forward import resolved
from distill.cache.networks import definition
from distill.cache.teachers import TeacherConfig
from distill.contracts import Context, DistilledSet, Estimate, Passes, Selection, Source, StepKind, Training
from distill.errors import InputError
from distill.randomness import derive_seed
from distill.selection import BudgetConfig, Picks, Selector, labelled_target, select

# What each space is made from.
_USED: dict[Kind, tuple[str, ...]] = {
    "network": ("network", "layer", "trained_on"),
    "gradients": ("network", "projection", "checkpoints", "trained_on"),
    "last_layer": ("network", "checkpoints", "trained_on"),
    "encoder": ("encoder",),
    "pixels": (),
}
_ENCODED = 256  # images that an encoder takes at once, for estimates
_OPTIONS = ("network", "layer", "projection", "checkpoints", "trained_on", "encoder")


class SpaceConfig(BudgetConfig):
    """A budget, and the space of features.

    `features: network` takes the outputs of `layer` of a network (`network`) trained on the source, or with
    `trained_on: target` on the target; `gradients` the gradients of its loss by its parameters, projected
    (`projection`); `last_layer` those by its last layer, in closed form; of both, with several `checkpoints`, the mean
    over so many networks along the training. `encoder` takes the features of a public encoder from a file of
    weights (`encoder`), `pixels` the normalised pixels. Features of more than `memory` bytes lie in a file.
    """

    unit_gradients: ClassVar[bool] = (
        True  # whether those of several checkpoints have length 1 before their mean
    )
    always_used: ClassVar[
        tuple[str, ...]
    ] = ()  # options that a method uses besides, whatever the features are

    features: Kind = "network"
    network: TeacherConfig = TeacherConfig()
    layer: Annotated[str, Field(min_length=1)] = PENULTIMATE
    projection: Projection = Projection()
    checkpoints: Annotated[int, Field(ge=1)] = 1
    trained_on: Literal["source", "target"] = "source"
    encoder: EncoderConfig | None = None
    memory: Annotated[int, AsBytes(at_least=1 << 20)] = 4 << 30

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        # By value: a merged recipe names every default.
        fields = type(self).model_fields
        ignored = [
            name
            for name in _OPTIONS
            if name not in (*_USED[self.features], *self.always_used)
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

    @model_validator(mode="after")
    def _an_encoder_is_named(self) -> Self:
        if self.features == "encoder" and self.encoder is None:
            raise ValueError("features: encoder needs the encoder: give encoder: {name: ..., weights: FILE}")
        if self.trained_on == "target" and self.features in ("gradients", "last_layer"):
            raise ValueError(
                "gradients are those of the source's classes: a network trained on the target gives features: network"
            )
        if self.checkpoints > self.network.train.epochs:
            raise ValueError(
                f"{self.checkpoints} checkpoints are asked for, of a training of {self.network.train.epochs} epochs"
            )
        return self

    def check_files(self) -> None:
        """Raise InputError where the encoder's file is not there."""
        if self.encoder is not None:
            refuse_absent_weights(self.encoder)

    def check_space(self, source: Source) -> None:
        """Raise InputError where the space cannot be made of this source: now, and not after a network was trained."""
        shape, classes = source.image_shape, len(source.classes)
        if self.features == "network" and self.layer != PENULTIMATE:
            module = definition(self.network.model, image_shape=shape, classes=classes)
            resolved(Features(self.layer), module)
        if self.encoder is not None:
            refuse_images(self.encoder, image_shape=shape)

    def estimate_space(self, plain: Estimate, *, train: int) -> Estimate:
        """The estimate of the selection with what its features cost."""
        if self.features == "pixels":
            return plain
        if self.encoder is not None:
            model = encoder_model(self.encoder)
            batches = -(-train // _ENCODED)
            return replace(
                plain, features=train, passes=(Passes(model, _ENCODED, batches, kept=1, copies=1),)
            )
        training = Training(self.network.model, self.network.train, train, checkpoints=self.checkpoints)
        return replace(plain, trainings=(training,), features=train)


class SpaceSelector(Selector):
    """A selector that measures in a space of features."""

    config: SpaceConfig

    @property
    def uses_target(self) -> bool:
        return self.config.trained_on == "target"

    def check_files(self) -> None:
        self.config.check_files()

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        self.config.check_space(source)
        if self.config.features == "network" and self.config.trained_on == "target":
            _refuse_one_class(source)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        plain = super().estimate(train=train, classes=classes, before=before)
        return self.config.estimate_space(plain, train=train)

    def space(self, ctx: Context, source: Source) -> FeatureSpace:
        """The space, empty until something is read."""
        config = self.config
        return FeatureSpace(
            ctx,
            source,
            kind=config.features,
            network=config.network,
            layer=config.layer,
            projection=config.projection,
            checkpoints=config.checkpoints,
            unit=config.unit_gradients,
            trained_on=config.trained_on,
            encoder=config.encoder,
            memory=config.memory,
        )


def _refuse_one_class(source: Source) -> None:
    """A network that learns one class learns nothing."""
    assert source.target is not None, "refused before the first step"
    if len(source.target.classes) == 1:
        raise InputError(
            "the network of the features is trained on the target, which has one class to tell apart",
            where="trained_on",
            found=f"target: {source.target.classes[0]!r}",
            allowed="a target of at least 2 classes",
            fix="set features: encoder, or trained_on: source",
        )


def _refuse_certain_labels(source: Source) -> None:
    """Of one class every label has the probability 1, and the loss no gradient: nothing would tell samples apart."""
    if len(source.classes) == 1:
        raise InputError(
            "the data have one class: the gradients of the loss are 0 for every image",
            where="features",
            found=f"one class, {source.classes[0]!r}",
            allowed="data of at least 2 classes",
            fix="give the data more classes, or choose a method and features without gradients",
        )


class FeatureConfig(SpaceConfig):
    """A budget, and the space of features."""


class TargetedConfig(SpaceConfig):
    """A budget over all samples, whatever their classes, and the space in which they should resemble the target."""

    per_class: bool = False

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.per_class or self.ipc is not None:
            raise ValueError("the target decides how many images of each class: give fraction or count")
        return self


class TargetedSelector(SpaceSelector):
    """A selector that picks what resembles the recipe's target."""

    config: TargetedConfig

    @property
    def uses_target(self) -> bool:
        return True

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        assert source.target is not None, "refused before the first step"
        if not len(source.target.train):
            raise InputError(
                "the target has no training images", where="target", fix="give the target some images"
            )
        if self.config.features in ("gradients", "last_layer"):
            labelled_target(source)  # refuses classes that the data lack
            _refuse_certain_labels(source)


class Chosen(NamedTuple):
    """What was picked from N rows of features.

    Attributes:
        rows: int64 (n,), in the order picked.
        scores: (n,).
        weights: (n,), how many rows each stands for; None where all alike.
    """

    rows: Tensor
    scores: Tensor
    weights: Tensor | None = None


class FeatureSelector(SpaceSelector):
    """A selector that picks within each class, or among all, by features alone. A subclass sets `score` and `pick`."""

    score: ClassVar[str]  # what the scores of its picks mean

    @abstractmethod
    def pick(self, features: Tensor, count: int, *, seed: int) -> Chosen:
        """Pick `count` rows.

        Args:
            features: float32 (N, D) of one class, centred (their mean is 0); of all where classes have no say.
            count: at most N.
            seed: for whatever is left to chance, another for each class.
        """

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        space = self.space(ctx, source)
        seed = ctx.derive(self.name)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            chosen = self.pick(space.take(samples), count, seed=derive_seed(seed, number))
            rows, scores, weights = (None if each is None else each.cpu().numpy() for each in chosen)
            return Picks(samples[rows], scores, weights)  # type: ignore[arg-type]

        return select(source, previous, self.config, pick, meta={"score": self.score}, usable=space.finite)
