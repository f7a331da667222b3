"""VGG-11 for small images: eight 3x3 convolutions, five halvings, one linear layer.

Source: Simonyan and Zisserman, ICLR 2015, table 1 column A, with one linear layer and instance norm by Zhao, Mopuri
and Bilen (ICLR 2021, released code).
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from distill.models.base import Classifier, ModelConfig, Norm, first_padding, make_norm, refuse_small

# (channels, pooled after)
_LAYERS = (
    (64, True),
    (128, True),
    (256, False),
    (256, True),
    (512, False),
    (512, True),
    (512, False),
    (512, True),
)


class VGG11Config(ModelConfig):
    """Options of `vgg11`, which takes images of 28 x 28 px (padded to 32), or of 32 x 32 px or more."""

    name: Literal["vgg11"] = "vgg11"
    norm: Norm = "instance"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        padding, sides = first_padding(image_shape, kernel=3)
        if min(sides) < 32:
            refuse_small("vgg11", image_shape, least=32)
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for number, (outputs, pooled) in enumerate(_LAYERS):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=padding if number == 0 else 1),
                make_norm(self.norm, outputs),
                nn.ReLU(inplace=True),
            ]
            if pooled:
                layers.append(nn.MaxPool2d(2))
            channels = outputs
        features = channels * (sides[0] >> 5) * (sides[1] >> 5)
        return Classifier(nn.Sequential(*layers), nn.Linear(features, classes))

    def describe(self) -> str:
        return "vgg11" + ("" if self.norm == "instance" else f"-{self.norm}")
