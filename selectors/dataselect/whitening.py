"""Whitened feature distance: features of candidates and target turned so that no direction counts more than another.

    Sigma = X^T X / n,   Sigma + eps I = L L^T,   w = L^{-1} x,   w <- w / ||w||_2

with X the rows of candidates and target together minus their joint mean, x a row as a column (Feng et al., "TAROT:
Targeted Data Selection via Optimal Transport", ICML 2025, arXiv 2412.00420, section 3). The distance of two samples is
||w - w'||_2 = sqrt(2 - 2 <w, w'>), which no invertible linear map of the features changes as eps goes to 0.

What we do differently: rows are solved against L, where the released code multiplies rows by L^{-1} instead of its
transpose, which is not white; L is never inverted; Sigma is summed up in float64, where the release sums in half
precision; and eps is in units of the mean variance tr(Sigma) / D, so that features of any scale are treated alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from distill.errors import InputError

EpsUnit = Literal["variance", "absolute"]

# Rows at once, and their numbers at most; decide the order of summation, and so the last bits.
_BLOCK = 4096
_ENTRIES = 1 << 22
# Below this share of the mean squared length, the variance of float32 features is rounding.
_NO_VARIANCE = 1e-12


def whiten(
    candidates: Tensor, target: Tensor, *, eps: float, unit: EpsUnit = "variance", memory: int = 4 << 30
) -> None:
    """Whiten two sets of rows in place: their covariance, taken together, becomes the identity; then length 1.

    Features without variance are left out where eps is above 0: they are 0 in every row. Where all rows are alike,
    every row becomes 0, and all distances are 0.

    Args:
        candidates: float32 (N, D), on any device, or in a file.
        target: float32 (M, D), M at least 1, on the device that computes.
        eps: 0 or more, added to the variances.
        unit: what eps is measured in: the mean variance of a feature, or 1.
        memory: bytes that the matrices of D x D float64 numbers may take.

    Raises:
        InputError: features that are not finite, or too many of them; or a singular covariance with eps = 0.
    """
    parts = (candidates, target)
    rows, width = sum(len(part) for part in parts), target.shape[1]
    refuse_wide(width, memory)
    mean = target.new_zeros(width, dtype=torch.float64)
    for _, block in _blocks(parts, target.device):
        mean += block.sum(dim=0) / rows
    covariance = mean.new_zeros(width, width)
    for _, block in _blocks(parts, target.device):
        centred = block - mean
        covariance.addmm_(centred.T, centred, alpha=1 / rows)
    variance = float(covariance.trace())
    _refuse_non_finite(variance)
    if variance <= _NO_VARIANCE * (variance + float(mean.square().sum())):
        for part in parts:
            part.zero_()
        return
    covariance.diagonal().add_(eps * variance / width if unit == "variance" else eps)
    factor = _cholesky(covariance)
    for place, block in _blocks(parts, target.device):
        white = torch.linalg.solve_triangular(factor, (block - mean).T, upper=False).T
        place.copy_(torch.nn.functional.normalize(white, dim=1))


def _blocks(parts: tuple[Tensor, ...], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of consecutive rows of each part, and their values in float64 on the device."""
    size = max(1, min(_BLOCK, _ENTRIES // parts[0].shape[1]))
    for part in parts:
        for start in range(0, len(part), size):
            place = part[start : start + size]
            yield place, place.to(device, torch.float64)


def _cholesky(covariance: Tensor) -> Tensor:
    """The lower factor of covariance + eps I."""
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed):
        raise InputError(
            "the covariance of the features cannot be inverted, so that they cannot be whitened",
            where="eps",
            found=f"{len(covariance)} features, of which the first {int(failed)} depend on each other",
            allowed="an eps above 0",
            fix="raise eps",
        )
    return factor


def refuse_wide(width: int, memory: int) -> None:
    """Raise InputError where whitening D = `width` features takes more than `memory` bytes.

    It takes 24 D^2: the covariance, its factor, and room for the factorisation to work in.
    """
    needed = 3 * 8 * width**2
    if needed > memory:
        raise InputError(
            f"whitening {width} features takes {needed:,} bytes",
            where="memory",
            found=f"{memory:,} bytes",
            allowed=f"at least {needed:,} bytes",
            fix="raise memory, or choose features of fewer numbers: features: gradients with a smaller projection.dim",
        )


def _refuse_non_finite(variance: float) -> None:
    if not variance < float("inf"):
        raise InputError(
            "features of the data or of the target are NaN or infinite",
            where="features",
            fix="look at the images and at the network's training; the cache warns of images without finite features",
        )
