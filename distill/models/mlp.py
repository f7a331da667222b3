"""Multi-layer perceptron on flattened pixels; two hidden layers by default, as in the field's tests on other networks.

Source: released code of Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching", ICLR 2021.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from distill.models.base import Classifier, ModelConfig


class MLPConfig(ModelConfig):
    """Options of `mlp`: `depth` hidden layers of `width` units with ReLU."""

    name: Literal["mlp"] = "mlp"
    width: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1, le=16)] = 2

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        channels, height, width = image_shape
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = channels * height * width
        for _ in range(self.depth):
            layers += [nn.Linear(inputs, self.width), nn.ReLU(inplace=True)]
            inputs = self.width
        return Classifier(nn.Sequential(*layers), nn.Linear(self.width, classes))

    def describe(self) -> str:
        return f"mlp-w{self.width}-d{self.depth}"
