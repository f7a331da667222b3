"""The public transform: the same numbers whatever kind the image comes as, and one clear error for all else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from distill.contracts import Preprocessing
from distill.errors import InputError
from distill.preprocessing import Transform

GREY = Transform(Preprocessing(mean=(0.3,), std=(0.5,)))
RGB = Transform(Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def by_hand(images: np.ndarray, transform: Transform) -> np.ndarray:
    """One number at a time; (N, H, W, Ch) in, (N, Ch, H, W) out."""
    out = np.empty((len(images), images.shape[3], *images.shape[1:3]), dtype=np.float32)
    for n, row, column, channel in np.ndindex(*images.shape):
        value = images[n, row, column, channel] / 255
        mean, std = float(transform.mean[channel]), float(transform.std[channel])
        out[n, channel, row, column] = (value - mean) / std
    return out


@pytest.mark.parametrize("transform", [GREY, RGB], ids=["grey", "rgb"])
def test_arrays_have_their_channels_last(transform: Transform) -> None:
    images = pixels(2, 4, 5, len(transform.mean))
    expected = by_hand(images, transform)
    many, one = transform(images), transform(images[1])
    assert (many.dtype, many.shape, one.shape) == (torch.float32, expected.shape, expected.shape[1:])
    np.testing.assert_allclose(many.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.numpy(), expected[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(many, transform(torch.from_numpy(images).permute(0, 3, 1, 2)))


@pytest.mark.parametrize("change", [np.flip, np.asfortranarray], ids=["reversed", "column-major"])
def test_arrays_of_any_strides(change: Callable[[np.ndarray], np.ndarray]) -> None:
    images = change(pixels(2, 4, 5, 3))
    assert torch.equal(RGB(images), RGB(np.ascontiguousarray(images)))


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_is_left_alone() -> None:
    images = pixels(4, 5, 1)
    images.flags.writeable = False
    kept = images.copy()
    GREY(images)
    assert (images == kept).all()


@pytest.mark.parametrize(("transform", "mode"), [(GREY, "L"), (RGB, "RGB")])
def test_pil_images_equal_their_arrays(transform: Transform, mode: str) -> None:
    array = pixels(4, 5, 3) if mode == "RGB" else pixels(4, 5)
    assert torch.equal(transform(Image.fromarray(array)), transform(array))


REFUSED = [
    (GREY, pixels(6, 4, 5), "numpy (6, 4, 5) of uint8"),
    (RGB, pixels(3, 4, 5), "numpy (3, 4, 5) of uint8"),
    (RGB, pixels(4, 5), "numpy (4, 5) of uint8"),
    (RGB, pixels(1, 1, 4, 5, 3), "numpy (1, 1, 4, 5, 3) of uint8"),
    (RGB, pixels(4, 5, 3) / 255, "numpy (4, 5, 3) of float64"),
    (RGB, torch.zeros(4, 5, 3), "torch (4, 5, 3) of float32"),
    (RGB, torch.zeros(3, 4, 5, dtype=torch.int64), "torch (3, 4, 5) of int64"),
    (RGB, Image.new("L", (5, 4)), "mode L, 5 x 4"),
    (GREY, Image.new("P", (5, 4)), "mode P, 5 x 4"),
    (RGB, [[1, 2], [3, 4]], "list"),
]


@pytest.mark.parametrize(("transform", "images", "found"), REFUSED, ids=[found for *_, found in REFUSED])
def test_what_does_not_fit_is_one_clear_error(transform: Transform, images: Any, found: str) -> None:
    with pytest.raises(InputError) as caught:
        transform(images)
    assert found in str(caught.value)
    assert "numpy (H, W, " in str(caught.value) and "torch (..., " in str(caught.value)


def test_pil_images_are_told_how_to_convert() -> None:
    with pytest.raises(InputError, match=r'convert\("RGB"\)'):
        RGB(Image.new("RGBA", (5, 4)))


def test_zca_of_another_size_is_refused() -> None:
    whitening = Preprocessing((0.0,), (1.0,), np.eye(16, dtype=np.float32), None, np.zeros(16, np.float32))
    assert Transform(whitening)(pixels(4, 4)).shape == (1, 4, 4)
    with pytest.raises(InputError, match="16 numbers an image"):
        Transform(whitening)(pixels(4, 5))
