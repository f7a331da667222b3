"""AlexNet for small images, as the field's cross-architecture tests use it.

Source: Krizhevsky et al., NeurIPS 2012, reduced to five small convolutions by Zhao et al. (ICLR 2021, released code):
5x5 128 - pool - 5x5 192 - pool - 3x3 256 - 3x3 192 - 3x3 192 - pool, then one linear layer.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from distill.models.base import Classifier, Norm, make_norm, refuse_small
from distill.training.config import Strict

# (channels, kernel, pooled after)
_LAYERS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))


class AlexNetConfig(Strict):
    """Options of `alexnet`."""

    name: Literal["alexnet"] = "alexnet"
    norm: Norm = "none"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A network with fresh weights."""
        refuse_small("alexnet", image_shape, least=8, fix="set data.resize")
        channels, height, width = image_shape
        layers: list[nn.Module] = []
        for outputs, kernel, pooled in _LAYERS:
            layers += [
                nn.Conv2d(channels, outputs, kernel, padding=kernel // 2),
                make_norm(self.norm, outputs),
                nn.ReLU(inplace=True),
            ]
            if pooled:
                layers.append(nn.MaxPool2d(2))
            channels = outputs
        features = channels * (height // 8) * (width // 8)
        return Classifier(nn.Sequential(*layers), features, classes)

    def describe(self) -> str:
        return "alexnet" + ("" if self.norm == "none" else f"-{self.norm}")
