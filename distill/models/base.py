"""What every network shares: features, then one linear classifier."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from distill.errors import InputError
from distill.models.norm import InstanceNorm

Norm = Literal["instance", "batch", "none"]


class Classifier(nn.Module):
    """`forward(x) = classifier(features(x))`: x (B, Ch, H, W) -> features (B, D) -> logits (B, C).

    Args:
        body: (B, Ch, H, W) -> (B, ...), flattened to (B, D).
        width: D.
        classes: C.
    """

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body = body
        self.classifier = nn.Linear(width, classes)

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


def refuse_small(model: str, image_shape: tuple[int, int, int], *, least: int, fix: str) -> None:
    """Refuse images whose smaller side is below `least` pixels."""
    _, height, width = image_shape
    if min(height, width) < least:
        raise InputError(
            f"the images are too small for {model}",
            found=f"{height} x {width} px",
            allowed=f"at least {least} x {least} px",
            fix=fix,
        )
