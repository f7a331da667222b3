"""Features of a source and of its target brought to one scale: every feature has mean 0 and variance 1 over both.

Over both, and not over the source alone: a feature that the source hardly shows and the target does would become as
large as it is rare.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows at once, and their numbers at most; they decide the order of summation, and so the last bits.
_ROWS = 4096
_NUMBERS = 1 << 21
# Below this share of the mean square the variance of a float32 feature is rounding.
_NO_VARIANCE = 1e-12


def standardise(candidates: Tensor, target: Tensor) -> None:
    """Bring two sets of rows in place to mean 0 and variance 1, taken together.

    A feature without variance becomes 0.

    Args:
        candidates: float32 (N, D), on any device, or in a file.
        target: float32 (M, D), on the device that computes.
    """
    parts = (candidates, target)
    rows = sum(len(part) for part in parts)
    mean = target.new_zeros(target.shape[1], dtype=torch.float64)
    for part in parts:
        for _, block in blocks(part, target.device):
            mean += block.sum(dim=0) / rows
    variance = torch.zeros_like(mean)
    for part in parts:
        for _, block in blocks(part, target.device):
            variance += (block - mean).square().sum(dim=0) / rows
    varies = variance > _NO_VARIANCE * (variance + mean.square())
    scale = torch.where(varies, variance.rsqrt(), 0.0)
    for part in parts:
        for place, block in blocks(part, target.device):
            part[place] = ((block - mean) * scale).to(part)


def blocks(features: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Consecutive rows, and their values in float64 on the device that computes."""
    for place in places(len(features), features.shape[1]):
        yield place, features[place].to(device, torch.float64)


def places(count: int, width: int) -> Iterator[slice]:
    """Consecutive ranges of `count` rows, of `width` features each."""
    size = block_rows(width)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def block_rows(width: int) -> int:
    """Rows of a block."""
    return max(1, min(_ROWS, _NUMBERS // max(width, 1)))
