"""ZCA whitening, as trajectory matching's CIFAR settings use it.

With x the flattened pixels of an image in units of pixel value / 255, mu and Sigma their mean and covariance over the
training images (divisor n - 1) and Sigma = U diag(s) U^T,

    z = (x - mu) U diag(1 / sqrt(s + eps)) U^T,    x = z U diag(sqrt(s + eps)) U^T + mu.

Source: kornia's `ZCAWhitening` with eps = 0.1, as the released code of Cazenavette et al., CVPR 2022, calls it: without
a mean and deviation of channels before it. Here sums and the decomposition are float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from distill.contracts import Preprocessing

EPS = 0.1
_BLOCK = 1024  # images; sums are float64, so that it hardly changes results


def fit_zca(images: Tensor, *, eps: float = EPS) -> Preprocessing:
    """Whitening of these images and its inverse.

    Args:
        images: uint8 (N, Ch, H, W), N >= 2.
        eps: added to the variances.
    """
    size = images[0].numel()
    mean = sum(block.sum(dim=0) for block in _flat_blocks(images)) / len(images)
    assert isinstance(mean, Tensor)
    covariance = torch.zeros(size, size, dtype=torch.float64)
    for block in _flat_blocks(images):
        centred = block - mean
        covariance.addmm_(centred.T, centred)
    variances, vectors = torch.linalg.eigh(covariance / (len(images) - 1))
    deviations = (variances.clamp(min=0) + eps).sqrt()
    channels = images.shape[1]
    return Preprocessing(
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        zca=((vectors / deviations) @ vectors.T).float().numpy(),
        zca_inverse=((vectors * deviations) @ vectors.T).float().numpy(),
        zca_mean=mean.float().numpy(),
    )


def _flat_blocks(images: Tensor) -> Iterator[Tensor]:
    """float64 (n, Ch*H*W), in units of pixel value / 255."""
    for start in range(0, len(images), _BLOCK):
        yield images[start : start + _BLOCK].flatten(1).double() / 255
