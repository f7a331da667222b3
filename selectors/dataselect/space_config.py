"""In which space a selector measures: its options, what they cost, and what is refused before any work.

distill/cache computes the features; dataselect/space.py reads them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distill.byte_sizes import AsBytes
from distill.cache import PENULTIMATE, Features, Projection
from distill.cache.encoders import EncoderConfig, encoder_model, refuse_absent_weights, refuse_images
from distill.cache.forward import resolved
from distill.cache.networks import definition
from distill.cache.teachers import TeacherConfig
from distill.contracts import Estimate, Passes, Source, Training
from distill.errors import InputError
from distill.selection import BudgetConfig

Kind = Literal["network", "gradients", "last_layer", "encoder", "pixels"]

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

    # Whether gradients of several checkpoints are brought to length 1 before their mean is taken.
    unit_gradients: ClassVar[bool] = True
    # Options that a method uses besides, whatever the features are.
    always_used: ClassVar[tuple[str, ...]] = ()

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
