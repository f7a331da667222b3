"""A classifier on a public encoder: its features at length 1, then one linear layer.

Labels by a projector come from it (distill/labels/projector.py). It is no network that a recipe could train.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.base import Classifier, ModelConfig
from distill.models.encoders import Encoder, EncoderConfig, feature_count, outline


class ProjectorModel(ModelConfig):
    """Options: the `encoder`, whose weights are part of the network's state and not of this."""

    name: Literal["projector"] = "projector"
    encoder: EncoderConfig

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        encoder = outline(self.encoder)
        width = feature_count(encoder, image_shape, name=self.encoder.describe())
        return Classifier(UnitFeatures(encoder), nn.Linear(width, classes))

    def describe(self) -> str:
        return f"projector on {self.encoder.describe()}"


class UnitFeatures(nn.Module):
    """(B, 3, H, W) -> features (B, D) of length 1.

    Args:
        encoder: whose.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.encoder(x), dim=1)
