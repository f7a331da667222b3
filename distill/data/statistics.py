"""What is computed over a whole split: its fingerprint, and the mean and deviation of its channels."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from distill.contracts import Split
from distill.data.rows import blocks


def fingerprint(images: Tensor, labels: Tensor) -> str:
    """sha256 (hex) over shape, images and labels in order.

    Args:
        images: uint8 (N, Ch, H, W).
        labels: int64 (N,), hashed as little-endian.
    """
    digest = hashlib.sha256(f"images uint8 {tuple(images.shape)} labels int64\n".encode())
    for block in blocks(len(images), images[:1].numel()):
        digest.update(images[block].contiguous().numpy().data)
    digest.update(labels.numpy().astype("<i8").data)
    return digest.hexdigest()


def split_of(images: Tensor, labels: Tensor, rows: Tensor | None = None) -> Split:
    """A split with its fingerprint. images: uint8 (N, Ch, H, W), labels: int64 (N,), rows: int64 (N,)."""
    return Split(images, labels, fingerprint(images, labels), rows)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of pixel value / 255.

    Sums of values and of squares are exact integers, so the result does not depend on order or device; the
    variance is (n sum(x^2) - sum(x)^2) / n^2. A constant channel gets the deviation 1, so that dividing by it
    stays possible.

    Args:
        images: uint8 (N, Ch, H, W), N >= 1.
    """
    n = images.numel() // images.shape[1]  # values a channel
    sums = torch.zeros(images.shape[1], dtype=torch.int64)
    squares = torch.zeros_like(sums)
    for block in blocks(len(images), 4 * images[:1].numel()):
        values = images[block].to(torch.int32)
        sums += values.sum((0, 2, 3), dtype=torch.int64)
        squares += (values * values).sum((0, 2, 3), dtype=torch.int64)
    pairs = list(zip(sums.tolist(), squares.tolist(), strict=True))
    mean = tuple(s / n / 255 for s, _ in pairs)
    std = tuple(math.sqrt(n * q - s * s) / n / 255 or 1.0 for s, q in pairs)
    return mean, std
