"""How a network is trained, as data: the part of a recipe, of a set's train recipe and of a cache key."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Base of every configuration: unknown keys, wrong types and changes after creation are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Augment = Literal["none", "crop", "crop_flip", "resized_crop", "dsa", "dsa_without_flip"]
Mixing = Literal["none", "mixup", "cutmix", "selfmix"]
Share = Annotated[float, Field(gt=0, le=1)]
# Losses that compare logits, where the others compare probabilities.
LOGIT_LOSSES = ("mse", "cosine")
# Losses that compare distances to the classes of the two images of a mixed view.
DISTANCE_LOSSES = ("dbr_l1", "dbr_l2")
# What mixes a view with another image, which has a class of its own.
TWO_IMAGES = ("mixup", "cutmix")
Precision = Literal["auto", "float32", "bfloat16"]


class TrainConfig(Strict):
    """One training run of one network.

    The field's evaluation of distilled sets (reference: Cazenavette et al., "Dataset Distillation by Matching
    Training Trajectories", CVPR 2022, released code) is SGD with momentum, the learning rate dropped tenfold
    half-way (`schedule: step`) and DSA; these are the defaults. `label_smoothing` is for hard labels, `temperature` and
    the losses besides cross-entropy for soft ones. `crop_scale` is the least share of an image that `resized_crop`
    keeps. A `cosine_stretch` above 1 ends the cosine before it is at 0. A batch goes through the network in
    `micro_batches` parts whose gradients add up, so that batch norm sees one part. `dbr_weight` belongs to the losses
    `dbr_l1` and `dbr_l2`. A `gsam_rho` above 0 looks for flat minima (distill/training/gsam.py), at twice the cost.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegative = 5e-4
    schedule: Literal["constant", "cosine", "step"] = "step"
    cosine_stretch: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    warmup_epochs: NonNegative = 0.0
    epochs: Annotated[int, Field(ge=1)] = 300
    batch_size: Annotated[int, Field(ge=1)] = 256
    micro_batches: Annotated[int, Field(ge=1)] = 1
    augment: Augment = "dsa"
    crop_scale: Share = 0.08
    mix: Mixing = "none"
    mix_alpha: Positive = 1.0
    loss: Literal["cross_entropy", "kl", "mse", "cosine", "dbr_l1", "dbr_l2"] = "cross_entropy"
    dbr_weight: NonNegative = 1.0
    temperature: Positive = 1.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gsam_rho: NonNegative = 0.0
    gsam_alpha: NonNegative = 0.3

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainConfig:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} is beyond epochs {self.epochs}")
        if self.micro_batches > self.batch_size:
            raise ValueError(f"micro_batches {self.micro_batches} is above batch_size {self.batch_size}")
        return self


def learning_rate(config: TrainConfig, epoch: float) -> float:
    """The learning rate at `epoch` (fractional): linear warm-up, then constant, cosine, or a tenth half-way.

    The cosine ends at 0; stretched by eta, lr(e) = lr (1 + cos(pi e / (eta E))) / 2, it ends above that, as the
    smoothed learning rate of committee voting does. Half-way is half of the steps, not the end of an epoch: it exists
    in a training of one epoch too.
    """
    if epoch < config.warmup_epochs:
        return config.lr * (epoch + 1e-3) / config.warmup_epochs
    if config.schedule == "cosine":
        done = (epoch - config.warmup_epochs) / max(config.epochs - config.warmup_epochs, 1e-9)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0) / config.cosine_stretch))
    if config.schedule == "step" and epoch >= config.epochs / 2:
        return config.lr * 0.1
    return config.lr
