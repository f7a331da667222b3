"""What every network shares: a configuration that builds it, features, then one linear classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor, nn

from distill.errors import InputError
from distill.models.norm import InstanceNorm
from distill.training.config import Strict

Norm = Literal["instance", "batch", "none"]


class ModelConfig(Strict, ABC):
    """Base of a network's configuration."""

    name: str

    @abstractmethod
    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        """The network for images (Ch, H, W) and C classes, its weights drawn from torch's global generator.

        Raises:
            InputError: images that the network cannot take.
        """

    @abstractmethod
    def describe(self) -> str:
        """Short text that tells configurations apart, such as `convnet-w32`; options at their default are left out."""


class Classifier(nn.Module):
    """`forward(x) = classifier(features(x))`: x (B, Ch, H, W) -> features (B, D) -> logits (B, C).

    Args:
        body: (B, Ch, H, W) -> (B, ...), flattened to (B, D).
        classifier: (B, D) -> (B, C).
    """

    def __init__(self, body: nn.Module, classifier: nn.Linear) -> None:
        super().__init__()
        self.body = body
        self.classifier = classifier

    def features(self, x: Tensor) -> Tensor:
        """(B, Ch, H, W) -> (B, D)."""
        return self.body(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Ch, H, W) -> logits (B, C)."""
        return self.classifier(self.features(x))


def make_norm(norm: Norm, channels: int) -> nn.Module:
    """The normalisation layer of that name for (B, channels, H, W)."""
    if norm == "instance":
        return InstanceNorm(channels)
    return nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity()


def first_padding(image_shape: tuple[int, int, int], *, kernel: int) -> tuple[int, tuple[int, int]]:
    """The padding of the first convolution, and (H, W) of what it puts out.

    Images of 28 x 28 px grow to 32 x 32, as the field has it (released code of Zhao et al., ICLR 2021), so that they
    halve evenly; others keep their size.
    """
    _, height, width = image_shape
    extra = 2 if (height, width) == (28, 28) else 0
    return kernel // 2 + extra, (height + 2 * extra, width + 2 * extra)


def refuse_small(model: str, image_shape: tuple[int, int, int], *, least: int) -> None:
    """Raise InputError for images whose smaller side is below `least` pixels."""
    _, height, width = image_shape
    if min(height, width) < least:
        raise InputError(
            f"the images are too small for {model}",
            found=f"{height} x {width} px",
            allowed=f"at least {least} x {least} px",
            fix=f"set data.resize to {least} or more, or use a smaller network such as convnet",
        )
