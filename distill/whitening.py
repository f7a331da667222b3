"""ZCA whitening, as trajectory matching's CIFAR settings use it.

With x the flattened pixels of an image in units of pixel value / 255, mu and Sigma their mean and covariance over the
training images (divisor n - 1) and Sigma = U diag(s) U^T,

    z = (x - mu) U diag(1 / sqrt(s + eps)) U^T,    x = z U diag(sqrt(s + eps)) U^T + mu.

Source: kornia's `ZCAWhitening` with eps = 0.1, as the released code of Cazenavette et al., CVPR 2022, calls it: without
a mean and deviation of channels before it. Here sums and the decomposition are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from distill.contracts import Preprocessing
from distill.errors import InputError, MemoryExhaustedError

EPS = 0.1
_BLOCK = 1024  # images; sums are float64, so that it hardly changes results
_OUT_OF_MEMORY = "can't allocate memory"  # as torch's allocator on a CPU says it


def fit_zca(images: Tensor, *, eps: float = EPS) -> Preprocessing:
    """Whitening of these images and its inverse; the same bits on however many threads torch computes otherwise.

    Args:
        images: uint8 (N, Ch, H, W), N >= 2.
        eps: added to the variances.

    Raises:
        InputError: fewer than two images.
        MemoryExhaustedError: the matrices, of (Ch*H*W)^2 float64 each, do not fit.
    """
    if len(images) < 2:
        raise InputError(
            "ZCA whitening needs the covariance of pixels over several images",
            found=f"{len(images)} training image{'s' if len(images) != 1 else ''}",
            allowed="2 training images or more",
            fix="take more training images, or leave zca out",
        )
    channels, height, width = images.shape[1:]
    with _memory_errors(f"{channels} x {height} x {width} px"), _one_thread():
        mean, vectors, deviations = _decompose(images, eps)
        return Preprocessing(
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            zca=((vectors / deviations) @ vectors.T).float().numpy(),
            zca_inverse=((vectors * deviations) @ vectors.T).float().numpy(),
            zca_mean=mean.float().numpy(),
        )


def _decompose(images: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """mu (D,), U (D, D) and sqrt(s + eps) (D,) of D = Ch*H*W pixel values, float64."""
    size = images[0].numel()
    # The greatest comes first, so that what does not fit is told before any work.
    covariance = torch.zeros(size, size, dtype=torch.float64)
    mean = torch.zeros(size, dtype=torch.float64)
    for block in _flat_blocks(images):
        mean += block.sum(dim=0)
    mean /= len(images)
    for block in _flat_blocks(images):
        centred = block - mean
        covariance.addmm_(centred.T, centred)
    variances, vectors = torch.linalg.eigh(covariance / (len(images) - 1))
    return mean, vectors, (variances.clamp(min=0) + eps).sqrt()


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads round otherwise, and the whitening is part of what decides which experts are kept already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _memory_errors(size: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if _OUT_OF_MEMORY not in str(error):
            raise
        raise MemoryExhaustedError(
            f"out of memory while fitting ZCA whitening to images of {size}",
            fix="leave zca out, or lower data.resize",
        ) from error


def _flat_blocks(images: Tensor) -> Iterator[Tensor]:
    """float64 (n, Ch*H*W), in units of pixel value / 255."""
    for start in range(0, len(images), _BLOCK):
        yield images[start : start + _BLOCK].flatten(1).double() / 255
