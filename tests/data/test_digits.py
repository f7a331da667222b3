import numpy as np
import torch
from sklearn.datasets import load_digits

from distill.data import config_class, open_source, plan


def open_digits(progress, *, seed=0, **options):
    return open_source(config_class("digits")(**options), seed=seed, progress=progress)


def test_every_digit_is_there_once(progress):
    source = open_digits(progress)
    assert source.classes == tuple("0123456789")
    assert source.image_shape == (1, 8, 8)
    splits = (source.train, source.valid, source.test)
    bunch = load_digits()
    expected = np.floor(bunch.images * 255 / 16 + 0.5).astype(np.uint8).reshape(1797, -1)
    seen = torch.cat([split.images for split in splits]).numpy().reshape(1797, -1)
    labels = torch.cat([split.labels for split in splits]).numpy()
    with_labels = [
        np.column_stack([pixels, numbers]) for pixels, numbers in ((expected, bunch.target), (seen, labels))
    ]
    assert sorted(map(bytes, with_labels[0].astype(np.uint8))) == sorted(
        map(bytes, with_labels[1].astype(np.uint8))
    )


def test_scale_reaches_both_ends(progress):
    images = open_digits(progress).train.images
    assert int(images.min()) == 0
    assert int(images.max()) == 255


def test_test_split_is_a_fixed_fifth_of_each_class(progress):
    source, other = open_digits(progress), open_digits(progress, seed=9)
    sizes = np.bincount(load_digits().target)
    assert torch.bincount(source.test.labels).tolist() == np.floor(sizes * 0.2 + 0.5).astype(int).tolist()
    assert source.test.fingerprint == other.test.fingerprint


def test_plan_is_exact(progress):
    source = open_digits(progress)
    planned = plan(config_class("digits")())
    assert planned.train == len(source.train) + len(source.valid)
    assert planned.test == len(source.test)
    assert (planned.classes, planned.image_shape) == (10, source.image_shape)
