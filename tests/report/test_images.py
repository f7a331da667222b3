"""Grids hold exactly the pixels of the images, each in its place."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from distill.report.images import GAP, fitting_scale, grid_png, thumbnails


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 3])
def test_every_image_lies_in_the_row_of_its_class(channels: int, scale: int) -> None:
    images, labels = random_images(5, 4, 6, channels), np.array([7, 2, 7, 2, 7])
    grid = pixels(grid_png(images, labels, columns=2, scale=scale))
    height, width = 4 * scale, 6 * scale
    assert grid.shape == (2 * height + GAP, 2 * width + GAP, channels + 1)
    for r, row in enumerate([(1, 3), (0, 2)]):  # class 2, then class 7, whose third image has no place
        for c, index in enumerate(row):
            top, left = r * (height + GAP), c * (width + GAP)
            cell = grid[top : top + height, left : left + width]
            for i in range(height):
                for j in range(width):
                    assert np.array_equal(cell[i, j, :-1], images[index, i // scale, j // scale])
            assert (cell[..., -1] == 255).all()


def test_gaps_and_missing_images_are_transparent() -> None:
    grid = pixels(grid_png(random_images(3, 4, 4, 1), np.array([0, 0, 1]), columns=9, scale=1))
    assert (grid[:4, 4 : 4 + GAP, -1] == 0).all()
    assert (grid[4 + GAP :, 4:, -1] == 0).all()


def test_other_channel_counts_show_the_first_as_grey() -> None:
    images = random_images(1, 4, 4, 2)
    grid = pixels(grid_png(images, np.array([0]), columns=1, scale=1))
    assert np.array_equal(grid[..., 0], images[0, ..., 0])


def test_same_input_same_bytes() -> None:
    images, labels = random_images(4, 8, 8, 3), np.arange(4)
    assert grid_png(images, labels, columns=2) == grid_png(images.copy(), labels.copy(), columns=2)


@pytest.mark.parametrize(
    ("images", "labels", "options", "message"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2), {}, "must be uint8"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2), {}, "must be uint8"),
        (np.zeros((0, 4, 4, 1), np.uint8), np.zeros(0), {}, "must be uint8"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3), {}, "labels must be"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), {"columns": 0}, "at least 1"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), {"scale": 0}, "at least 1"),
    ],
)
def test_bad_input(images: np.ndarray, labels: np.ndarray, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid_png(images, labels, **{"columns": 2, **options})


def test_thumbnails_average_and_keep_the_aspect_ratio() -> None:
    images = random_images(2, 8, 16, 3)
    small = thumbnails(images, longest=4)
    means = images.reshape(2, 2, 4, 4, 4, 3).mean(axis=(2, 4))  # blocks of 4 x 4 pixels
    assert small.shape == (2, 2, 4, 3)
    assert np.abs(small - means).max() <= 1
    assert thumbnails(images, longest=16) is images


def test_thumbnails_of_one_row_keep_a_pixel() -> None:
    assert thumbnails(random_images(1, 1, 500, 1), longest=64).shape == (1, 1, 64, 1)


@pytest.mark.parametrize(("side", "scale"), [(8, 8), (28, 2), (32, 2), (33, 1), (64, 1), (224, 1)])
def test_scale_fits_the_goal(side: int, scale: int) -> None:
    assert fitting_scale(side, side, goal=64) == scale
    assert fitting_scale(1, side, goal=64) == scale
