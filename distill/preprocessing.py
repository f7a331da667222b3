"""From pixels to what a network expects: the one meaning of `Preprocessing`."""

from __future__ import annotations

import torch
from torch import Tensor

from distill.contracts import Preprocessing
from distill.errors import InputError


class Transform:
    """From pixels to what a network expects; to be applied to test images as well.

    x = (pixel / 255 - mean) / std per channel; then, with ZCA, z = (flatten(x) - zca_mean) @ zca.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.mean = torch.tensor(preprocessing.mean)[:, None, None]
        self.std = torch.tensor(preprocessing.std)[:, None, None]
        whitened = preprocessing.zca is not None and preprocessing.zca_mean is not None
        self.zca = torch.from_numpy(preprocessing.zca) if whitened else None
        self.zca_mean = torch.from_numpy(preprocessing.zca_mean) if whitened else None

    def __call__(self, images: Tensor) -> Tensor:
        """Normalised float32 (..., Ch, H, W) of images of that shape, uint8 in 0..255 or float in [0, 1]."""
        if images.ndim < 3 or images.shape[-3] != len(self.mean):
            raise InputError(
                "the images do not fit this set's transform",
                found=f"shape {tuple(images.shape)}",
                allowed=f"(..., {len(self.mean)}, H, W)",
            )
        if images.dtype == torch.uint8:
            pixels = images.float() / 255
        elif images.is_floating_point():
            pixels = images.float()
        else:
            raise InputError(
                "the images have no pixel type",
                found=str(images.dtype),
                allowed="uint8 in 0..255, float in [0, 1]",
            )
        normalised = (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        if self.zca is None or self.zca_mean is None:
            return normalised
        flat = normalised.flatten(-3) - self.zca_mean.to(pixels.device)
        return (flat @ self.zca.to(pixels.device)).view(normalised.shape)
