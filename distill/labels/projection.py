"""A projector: a public encoder, adapted by little, and what it is configured by.

With features f of a frozen encoder whose layers have low-rank updates of their own (distill/labels/adapters.py), of a
view x it says the logits

    g(x) = s (W + B A) f(x) / |f(x)| + b.

W costs nothing: it is made again from what a reader has. `text` takes the embeddings of the classes' prompts, with
which an encoder of CLIP is a zero-shot classifier. `class_means`, for any encoder, takes the mean of the set's own
images of each class, as the encoder as it came sees them, less the mean over the classes, at length 1.

Source: HeLlO, "Heavy Labels Out! Dataset Distillation with Label Space Lightening", ICCV 2025, of which no code was
released; class means are ours, for encoders without a text tower. How it is fitted is in projector_fit.py, what a set
stores of it in projector.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill.contracts import Context, DistilledSet
from distill.errors import InputError
from distill.labels.adapters import Ranks, attach, merge, pack, parameters, ranks_of, unpack
from distill.labels.ensemble import between
from distill.models.encoders import (
    PROMPT,
    Encoder,
    EncoderConfig,
    behind,
    feature_count,
    open_encoder,
    outline,
    refuse_absent_weights,
    refuse_unusable,
    text_embeddings,
)
from distill.training.batches import DeviceImages
from distill.training.config import NonNegative, Positive, Strict, TrainConfig
from distill.training.job import Pool

Count = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=0)]
_BLOCK = 256  # images a forward pass


class Projection(Strict):
    """Options of labels by a projector.

    `conv_rank` and `linear_rank` are those of the encoder's layers that fit the patterns `layers`, `head_rank` that of
    W; with `learn_down: false` the matrices A follow from the seed and are not stored. `checkpoints` networks along
    each teacher's training are its weak teachers. `samples` real images are drawn for the fit, all that `steps` take if
    left out. `class_weight` is that of the cross-entropy to their classes.
    """

    encoder: EncoderConfig
    conv_rank: Rank = 8
    linear_rank: Rank = 8
    head_rank: Rank = 64
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    learn_down: bool = True
    start: Literal["class_means", "text"] = "class_means"
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = (PROMPT,)
    checkpoints: Count = 1
    samples: Count | None = None
    steps: Count = 1000
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    class_weight: NonNegative = 0.1

    @model_validator(mode="after")
    def _something_is_adapted(self) -> Self:
        inside = self.conv_rank or self.linear_rank
        if not inside and not self.head_rank:
            raise ValueError("conv_rank, linear_rank and head_rank are 0: nothing would be adapted")
        if not inside and self.layers != ("*",):
            raise ValueError(
                "layers are those of the encoder, and conv_rank and linear_rank are 0: leave layers out"
            )
        return self

    def check_files(self) -> None:
        """Raise InputError where the encoder's file is not there."""
        refuse_absent_weights(self.encoder)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise InputError or DamagedDataError where it cannot be fitted; reads the encoder's file."""
        self.check_files()
        if self.start == "text" and not self.encoder.name.startswith("open_clip/"):
            raise InputError(
                f"{self.encoder.name} has no text tower to begin with",
                where="start",
                found="text",
                allowed="class_means; or an encoder of open_clip",
                fix="set start: class_means",
            )
        refuse_unusable(self.encoder, text=self.start == "text", templates=self.templates)
        encoder = outline(self.encoder)
        feature_count(encoder, image_shape, name=self.encoder.describe())
        self.adapt(encoder, seed=0)

    def check_trainings(self, trainings: Sequence[TrainConfig | None]) -> None:
        """Raise InputError where teachers trained so (None: read from a file) have too few networks along the way."""
        least = min(1 if train is None else train.epochs for train in trainings)
        if self.checkpoints > least:
            raise InputError(
                "a teacher has fewer networks along its training than are asked for",
                where="checkpoints",
                found=str(self.checkpoints),
                allowed=f"1 to {least}, its epochs; 1 for a network from a file",
                fix=f"set checkpoints to {least} or less, or train the teachers longer",
            )

    def adapt(self, encoder: Encoder, *, seed: int) -> None:
        """Give the encoder its adapters, in place."""
        ranks = Ranks(self.conv_rank, self.linear_rank, layers=self.layers, learn_down=self.learn_down)
        if ranks.conv or ranks.linear:
            attach(encoder, ranks, seed=seed)

    def on(self, weights: str | None, *, sha256: str) -> Projection:
        """The same with the encoder's weights in another file."""
        encoder = self.encoder.model_copy(update={"weights": weights, "sha256": sha256})
        return self.model_copy(update={"encoder": encoder})


class Head(nn.Module):
    """g behind the encoder: features (B, D) -> logits (B, C).

    Args:
        start: W, (C, D).
        how: options.
        seed: of A.
    """

    def __init__(self, start: Tensor, how: Projection, *, seed: int) -> None:
        super().__init__()
        classes, width = start.shape
        self.linear = nn.Linear(width, classes, bias=False)
        self.linear.weight = nn.Parameter(start.clone())
        self.linear.requires_grad_(False)
        if how.head_rank:
            attach(self, Ranks(0, how.head_rank, learn_down=how.learn_down), seed=seed)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * self.linear(F.normalize(features, dim=1)) + self.bias


class Projector(nn.Module):
    """The encoder with its adapters, and the head: images as the encoder takes them -> features -> logits.

    Args:
        encoder: with the weights of its file; taken over.
        start: W, (C, D).
        how: options, with the sha256 of the encoder's file.
        seed: of A.
    """

    def __init__(self, encoder: Encoder, start: Tensor, how: Projection, *, seed: int) -> None:
        super().__init__()
        assert how.encoder.sha256 is not None, "a known file"
        self.about = {"encoder": how.encoder.sha256}
        how.adapt(encoder, seed=seed)
        self.encoder = encoder
        self.head = Head(start, how, seed=seed)

    def cut_ranks(self, how: Projection) -> dict[str, int]:
        """By layer, the ranks of adapters that are smaller than asked for, since more would save nothing."""

        def asked(name: str) -> int:
            if name.startswith("head."):
                return how.head_rank
            return how.conv_rank if isinstance(self.get_submodule(name), nn.Conv2d) else how.linear_rank

        return {name: rank for name, rank in ranks_of(self).items() if rank < asked(name)}

    def matrices(self) -> list[nn.Parameter]:
        """What is learned, without s and b."""
        return parameters(self)

    def learned(self) -> list[nn.Parameter]:
        """Everything that is learned."""
        return [*self.matrices(), self.head.scale, self.head.bias]

    def packed(self) -> bytes:
        """What is stored: the low-rank matrices, s and b."""
        return pack(self, about=self.about, extra={"scale": self.head.scale, "bias": self.head.bias})

    @torch.no_grad()
    def load(self, data: bytes) -> None:
        """Take what was stored.

        Raises:
            DamagedDataError, InputError: as `unpack`; or scale and bias of another number of classes.
        """
        extra = unpack(self, data, about=self.about)
        own = {"scale": self.head.scale, "bias": self.head.bias}
        found, wanted = ({name: tuple(value.shape) for name, value in each.items()} for each in (extra, own))
        if found != wanted:
            raise InputError("an adapter for another set of classes", found=str(found), allowed=str(wanted))
        for name, value in own.items():
            value.copy_(extra[name])

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """The state of a `ProjectorModel` that says the same; the adapters are merged for good."""
        merge(self)
        encoder = {f"body.encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        weight = self.head.scale * self.head.linear.weight
        return {**encoder, "classifier.weight": weight, "classifier.bias": self.head.bias.detach().clone()}


def start_of(ctx: Context, distilled: DistilledSet, how: Projection) -> Tensor:
    """W, float32 (C, D), on the host.

    Args:
        ctx: its device.
        distilled: the set, whose images and classes it follows from.
        how: options, with the encoder's file.
    """
    if how.start == "text":
        return text_embeddings(how.encoder, distilled.classes, templates=how.templates)
    encoder = open_encoder(how.encoder).to(ctx.device)
    way = between(distilled.preprocessing, behind(how.encoder), ctx.device)
    images = DeviceImages(Pool(distilled.images, distilled.labels, distilled.preprocessing), ctx.device)
    with torch.no_grad():
        features = torch.cat([F.normalize(encoder(way(part)), dim=1).cpu() for part in images.blocks(_BLOCK)])
    onehot = F.one_hot(distilled.labels, len(distilled.classes)).float()
    means = onehot.T @ features / onehot.sum(dim=0).clamp(min=1)[:, None]
    return F.normalize(means - means.mean(dim=0), dim=1)
