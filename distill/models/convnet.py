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
from distill.models.base import Classifier, Norm, make_norm
from distill.models.norm import NormReluPool
from distill.training.config import Strict


class ConvNetConfig(Strict):
    """Options of `convnet`.

    `depth: null` halves the image down to 4 x 4, the field's habit: 3 for 28 and 32 px, 4 for 64, 5 for 128 (2 to 5).
    """

    name: Literal["convnet"] = "convnet"
    width: Annotated[int, Field(ge=1)] = 128
    depth: Annotated[int, Field(ge=1, le=8)] | None = None
    norm: Norm = "instance"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """A network with fresh weights."""
        channels, height, width = image_shape
        depth = self.depth or default_depth(height, width)
        # 28 px images are padded to 32 by the first convolution, as the field does, so that they halve evenly.
        padding = 3 if (height, width) == (28, 28) else 1
        sides = [side + 2 * (padding - 1) for side in (height, width)]
        if min(sides) >> depth < 1:
            raise InputError(
                f"images of {height} x {width} px are too small for {depth} halvings",
                found=f"depth {depth}",
                allowed=f"depth 1 to {int(math.log2(min(sides)))}",
                fix="lower depth, or leave it out",
            )
        layers: list[nn.Module] = []
        for number in range(depth):
            layers.append(nn.Conv2d(channels, self.width, 3, padding=padding if number == 0 else 1))
            layers += _second_half(self.norm, self.width)
            channels = self.width
        features = self.width * (sides[0] >> depth) * (sides[1] >> depth)
        return Classifier(nn.Sequential(*layers), features, classes)

    def describe(self) -> str:
        depth = "" if self.depth is None else f"-d{self.depth}"
        norm = "" if self.norm == "instance" else f"-{self.norm}"
        return f"convnet-w{self.width}{depth}{norm}"


def default_depth(height: int, width: int) -> int:
    """Halvings that leave about 4 x 4, between 2 and 5."""
    return min(max(math.ceil(math.log2(min(height, width))) - 2, 2), 5)


def _second_half(norm: Norm, width: int) -> list[nn.Module]:
    if norm == "instance":
        return [NormReluPool(width)]
    return [make_norm(norm, width), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
