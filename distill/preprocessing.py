"""From pixels to what a network expects: the one meaning of `Preprocessing`."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.contracts import Preprocessing
from distill.errors import InputError

Images = Tensor | np.ndarray | Image.Image


class Transform:
    """From pixels to what a network expects; to be applied to test images as well.

    x = (pixel / 255 - mean) / std per channel; then, with ZCA, z = (flatten(x) - zca_mean) @ zca.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.mean = torch.tensor(preprocessing.mean)[:, None, None]
        self.std = torch.tensor(preprocessing.std)[:, None, None]
        whitened = preprocessing.zca is not None and preprocessing.zca_mean is not None
        inverse = preprocessing.zca_inverse
        self.zca_inverse = torch.from_numpy(inverse) if inverse is not None else None
        self.zca = torch.from_numpy(preprocessing.zca) if whitened else None
        self.zca_mean = torch.from_numpy(preprocessing.zca_mean) if whitened else None

    def __call__(self, images: Images) -> Tensor:
        """Normalised float32 (..., Ch, H, W) of one image or many.

        Args:
            images: in the layout that each kind is used to: a torch tensor (..., Ch, H, W), uint8 in 0..255 or float
                in [0, 1]; a numpy array (H, W, Ch) or (N, H, W, Ch), uint8, where (H, W) will do for one channel;
                a PIL image, mode L for one channel and RGB for three.

        Raises:
            InputError: anything else, or a size that the set's ZCA does not know.
        """
        pixels = self._pixels(images)
        normalised = (pixels - self.mean.to(pixels.device)) / self.std.to(pixels.device)
        if self.zca is None or self.zca_mean is None:
            return normalised
        if math.prod(normalised.shape[-3:]) != len(self.zca_mean):
            raise self._refusal(f"{len(self.zca_mean)} numbers an image, as the set's ZCA has", images)
        flat = normalised.flatten(-3) - self.zca_mean.to(pixels.device)
        return (flat @ self.zca.to(pixels.device)).view(normalised.shape)

    def pixels(self, normalised: Tensor) -> Tensor:
        """The way back: float32 (N, Ch, H, W) in units of pixel value / 255 of what networks take."""
        if self.zca_inverse is not None and self.zca_mean is not None:
            flat = normalised.flatten(1) @ self.zca_inverse + self.zca_mean
            normalised = flat.view(normalised.shape)
        return normalised * self.std + self.mean

    def _pixels(self, images: Images) -> Tensor:
        """float32 (..., Ch, H, W) in units of pixel value / 255."""
        tensor = images if isinstance(images, Tensor) else self._channels_first(images)
        fits = tensor.ndim >= 3 and tensor.shape[-3] == len(self.mean)
        if fits and tensor.dtype == torch.uint8:
            return tensor.float() / 255
        if fits and tensor.is_floating_point():
            return tensor.float()
        raise self._refusal(self._allowed, images)

    def _channels_first(self, images: np.ndarray | Image.Image) -> Tensor:
        """uint8 (..., Ch, H, W) of what has its channels last."""
        grey = len(self.mean) == 1
        if isinstance(images, Image.Image):
            # Another mode, such as a palette's numbers, would pass for pixels in an array.
            if images.mode != ("L" if grey else "RGB"):
                raise self._refusal(self._allowed, images)
            images = np.asarray(images)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
            raise self._refusal(self._allowed, images)
        if grey and images.ndim == 2:
            images = images[..., None]
        if images.ndim not in (3, 4) or images.shape[-1] != len(self.mean):
            raise self._refusal(self._allowed, images)
        # A copy: torch takes neither reversed strides nor read-only memory.
        return torch.from_numpy(np.array(np.moveaxis(images, -1, -3), order="C"))

    @property
    def _allowed(self) -> str:
        channels = len(self.mean)
        kinds = [
            f"torch (..., {channels}, H, W) of uint8 in 0..255 or float in [0, 1]",
            f"numpy (H, W, {channels}) or (N, H, W, {channels}) of uint8",
        ]
        if channels in (1, 3):
            kinds.append(f"a PIL image of mode {'L' if channels == 1 else 'RGB'}")
        return "; ".join(kinds)

    def _refusal(self, allowed: str, images: object) -> InputError:
        fix = None
        if isinstance(images, Image.Image) and len(self.mean) in (1, 3):
            fix = f'image.convert("{"L" if len(self.mean) == 1 else "RGB"}")'
        return InputError(
            "the images do not fit this set's transform", found=_described(images), allowed=allowed, fix=fix
        )


def _described(images: object) -> str:
    """What was given, in a few words."""
    if isinstance(images, Tensor):
        return f"torch {tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}"
    if isinstance(images, np.ndarray):
        return f"numpy {images.shape} of {images.dtype}"
    if isinstance(images, Image.Image):
        return f"a PIL image of mode {images.mode}, {images.width} x {images.height}"
    return type(images).__name__
