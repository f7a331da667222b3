"""ResNet-18 with the small-image stem: a 3x3 convolution of stride 1 and no pooling before the first block.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; the stem is the CIFAR habit.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from distill.models.base import Classifier, ModelConfig, Norm, make_norm, refuse_small


class ResNet18Config(ModelConfig):
    """Options of `resnet18`: `width` channels in the first stage, doubled in each of the three that follow."""

    name: Literal["resnet18"] = "resnet18"
    width: Annotated[int, Field(ge=1)] = 64
    norm: Norm = "batch"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        # The last stage sees an eighth of the image; one pixel normalised by itself is a constant.
        refuse_small(self.describe(), image_shape, least=9 if self.norm == "instance" else 1)
        layers: list[nn.Module] = [
            nn.Conv2d(image_shape[0], self.width, 3, padding=1, bias=False),
            make_norm(self.norm, self.width),
            nn.ReLU(inplace=True),
        ]
        channels = self.width
        for stage in range(4):
            width = self.width << stage
            layers += [
                Block(channels, width, stride=1 if stage == 0 else 2, norm=self.norm),
                Block(width, width, stride=1, norm=self.norm),
            ]
            channels = width
        layers.append(nn.AdaptiveAvgPool2d(1))
        return Classifier(nn.Sequential(*layers), nn.Linear(channels, classes))

    def describe(self) -> str:
        width = "" if self.width == 64 else f"-w{self.width}"
        return f"resnet18{width}" + ("" if self.norm == "batch" else f"-{self.norm}")


class Block(nn.Module):
    """Two 3x3 convolutions with a skip connection; (B, inputs, H, W) -> (B, outputs, H / stride, W / stride).

    Args:
        inputs, outputs: channels.
        stride: of the first convolution, and of the 1x1 convolution that the skip then needs.
        norm: after each convolution.
    """

    def __init__(self, inputs: int, outputs: int, *, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = make_norm(norm, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = make_norm(norm, outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), make_norm(norm, outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))
