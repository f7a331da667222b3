"""AlexNet for small images, as the field's tests on other networks have it.

Source: Krizhevsky et al., NeurIPS 2012, reduced to five small convolutions by Zhao, Mopuri and Bilen (ICLR 2021,
released code): 5x5 128 - pool - 5x5 192 - pool - 3x3 256 - 3x3 192 - 3x3 192 - pool, then one linear layer.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from distill.models.base import Classifier, ModelConfig, Norm, first_padding, make_norm, refuse_small

# (channels, kernel, pooled after)
_LAYERS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))


class AlexNetConfig(ModelConfig):
    """Options of `alexnet`, which takes images of 8 x 8 px or more."""

    name: Literal["alexnet"] = "alexnet"
    norm: Norm = "none"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        refuse_small("alexnet", image_shape, least=8)
        padding, sides = first_padding(image_shape, kernel=5)
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for number, (outputs, kernel, pooled) in enumerate(_LAYERS):
            layers += [
                nn.Conv2d(channels, outputs, kernel, padding=padding if number == 0 else kernel // 2),
                make_norm(self.norm, outputs),
                nn.ReLU(inplace=True),
            ]
            if pooled:
                layers.append(nn.MaxPool2d(2))
            channels = outputs
        features = channels * (sides[0] >> 3) * (sides[1] >> 3)
        return Classifier(nn.Sequential(*layers), nn.Linear(features, classes))

    def describe(self) -> str:
        return "alexnet" + ("" if self.norm == "none" else f"-{self.norm}")
