"""The field's ConvNet: depth x [3x3 convolution, norm, ReLU, 2x2 average pooling], then a linear layer.

Source: Gidaris and Komodakis, CVPR 2018, in the form of Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient
Matching", ICLR 2021, that trajectory matching and its successors evaluate with (ConvNetD3, width 128).
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from distill.errors import InputError
from distill.models.base import Classifier, ModelConfig, Norm, first_padding, make_norm, refuse_small
from distill.models.norm import NormReluPool


class ConvNetConfig(ModelConfig):
    """Options of `convnet`.

    `depth: null` halves the image down to about 4 x 4, the field's habit: 3 for 28 and 32 px, 4 for 64, 5 for 128
    (2 to 5).
    """

    name: Literal["convnet"] = "convnet"
    width: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1, le=8)] | None = None
    norm: Norm = "instance"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        refuse_small("convnet", image_shape, least=2)
        padding, sides = first_padding(image_shape, kernel=3)
        depth = default_depth(*image_shape[1:]) if self.depth is None else self.depth
        _refuse_deep(depth, sides)
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for number in range(depth):
            layers.append(nn.Conv2d(channels, self.width, 3, padding=padding if number == 0 else 1))
            layers += _second_half(self.norm, self.width)
            channels = self.width
        features = self.width * (sides[0] >> depth) * (sides[1] >> depth)
        return Classifier(nn.Sequential(*layers), nn.Linear(features, classes))

    def describe(self) -> str:
        depth = "" if self.depth is None else f"-d{self.depth}"
        norm = "" if self.norm == "instance" else f"-{self.norm}"
        return f"convnet-w{self.width}{depth}{norm}"


def default_depth(height: int, width: int) -> int:
    """Halvings that leave about 4 x 4 of (H, W), between 2 and 5."""
    return min(max(math.ceil(math.log2(min(height, width))) - 2, 2), 5)


def _refuse_deep(depth: int, sides: tuple[int, int]) -> None:
    most = int(math.log2(min(sides)))
    if depth > most:
        raise InputError(
            f"images of {sides[0]} x {sides[1]} px cannot be halved {depth} times by convnet",
            found=f"depth {depth}",
            allowed=f"depth 1 to {most}",
            fix=f"set depth to {most} or less, or data.resize to {1 << depth} or more",
        )


def _second_half(norm: Norm, width: int) -> list[nn.Module]:
    """What follows a convolution: (B, D, H, W) -> (B, D, H // 2, W // 2)."""
    if norm == "instance":
        return [NormReluPool(width)]
    return [make_norm(norm, width), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
