"""VGG-11 for small images: eight 3x3 convolutions, five halvings, one linear layer.

Source: Simonyan and Zisserman, ICLR 2015, table 1 column A, with the single linear layer of the CIFAR habit.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from distill.models.base import Classifier, Norm, make_norm, refuse_small
from distill.training.config import Strict

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


class VGG11Config(Strict):
    """Options of `vgg11`."""

    name: Literal["vgg11"] = "vgg11"
    norm: Norm = "instance"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A network with fresh weights."""
        refuse_small("vgg11", image_shape, least=28, fix="set data.resize to 32")
        channels, height, width = image_shape
        # 28 px images are padded to 32 by the first convolution, so that five halvings leave a pixel.
        padding = 3 if (height, width) == (28, 28) else 1
        layers: list[nn.Module] = []
        for number, (outputs, pooled) in enumerate(_LAYERS):
            layers.append(nn.Conv2d(channels, outputs, 3, padding=padding if number == 0 else 1))
            layers += [make_norm(self.norm, outputs), nn.ReLU(inplace=True)]
            if pooled:
                layers.append(nn.MaxPool2d(2))
            channels = outputs
        sides = [side + 2 * (padding - 1) for side in (height, width)]
        features = channels * (sides[0] // 32) * (sides[1] // 32)
        if features == 0:
            refuse_small("vgg11", image_shape, least=32, fix="set data.resize to 32")
        return Classifier(nn.Sequential(*layers), features, classes)

    def describe(self) -> str:
        return "vgg11" + ("" if self.norm == "instance" else f"-{self.norm}")
