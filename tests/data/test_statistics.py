import hashlib

import numpy as np
import pytest
import torch

from distill.data.statistics import channel_statistics, fingerprint, split_of


def random_images(n: int = 40, channels: int = 3) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, channels, 5, 4), dtype=np.uint8))


def test_statistics_equal_float64_on_all_pixels():
    images = random_images()
    mean, std = channel_statistics(images)
    reference = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, reference.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, reference.std((0, 2, 3)), rtol=1e-12)


def test_statistics_do_not_depend_on_order():
    images = random_images()
    assert channel_statistics(images) == channel_statistics(images.flip(0))


def test_constant_channel_has_deviation_one():
    images = random_images()
    images[:, 1] = 255
    mean, std = channel_statistics(images)
    assert mean[1] == 1.0
    assert std[1] == 1.0
    assert std[0] != 1.0


def test_fingerprint_is_sha256_of_shape_images_and_labels():
    images, labels = random_images(), torch.arange(40)
    text = b"images uint8 (40, 3, 5, 4) labels int64\n"
    expected = hashlib.sha256(text + images.numpy().tobytes() + labels.numpy().astype("<i8").tobytes())
    assert fingerprint(images, labels) == expected.hexdigest()
    assert split_of(images, labels).fingerprint == expected.hexdigest()


@pytest.mark.parametrize("what", ["pixel", "label", "order", "shape"])
def test_fingerprint_sees_every_change(what: str):
    images, labels = random_images(), torch.arange(40)
    before = fingerprint(images, labels)
    if what == "pixel":
        images[7, 1, 2, 3] += 1
    elif what == "label":
        labels[3] = 9
    elif what == "order":
        images = images.flip(0)
    else:
        images = images.reshape(40, 3, 4, 5)
    assert fingerprint(images, labels) != before


def test_fingerprint_of_a_view_equals_that_of_a_copy():
    images, labels = random_images(), torch.arange(40)
    assert fingerprint(images[:10], labels[:10]) == fingerprint(images[:10].clone(), labels[:10].clone())


def test_fingerprint_of_nothing():
    empty = torch.empty((0, 1, 8, 8), dtype=torch.uint8)
    assert len(fingerprint(empty, torch.empty(0, dtype=torch.int64))) == 64
