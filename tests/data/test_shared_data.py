"""The real files of the shared data folder; skipped where it is absent."""

import numpy as np
import pytest
import torch

from distill.data import config_class, open_source, plan
from distill.data.shards import read_samples

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def test_mnist(shared_data, progress):
    config = config_class("idx")(folder=str(shared_data / "mnist"), cap=20)
    source = open_source(config, seed=0, progress=progress)
    assert source.image_shape == (1, 28, 28)
    assert (len(source.train), len(source.valid), len(source.test)) == (180, 20, 10_000)
    assert "200 of 60000 training images used" in source.notes
    assert torch.bincount(source.test.labels).tolist() == [
        980,
        1135,
        1032,
        1010,
        982,
        892,
        958,
        1028,
        974,
        1009,
    ]
    planned = plan(config_class("idx")(folder=str(shared_data / "mnist")))
    assert (planned.train, planned.test) == (60_000, 10_000)


def test_first_samples_of_cifar10(shared_data):
    samples = read_samples(shared_data / "cifar10" / "train.tar.gz", want=lambda _: True)
    first = [next(samples) for _ in range(50)]
    assert [sample.key for sample in first[:3]] == ["000000", "000001", "000002"]
    assert all(sample.image and sample.image.startswith(b"\xff\xd8") for sample in first)
    planned = plan(config_class("webdataset")(folder=str(shared_data / "cifar10")))
    assert planned.image_shape == (3, 32, 32)


@pytest.mark.slow
def test_all_of_cifar10(shared_data, progress):
    config = config_class("webdataset")(folder=str(shared_data / "cifar10"), class_names=CIFAR_CLASSES)
    source = open_source(config, seed=0, progress=progress)
    assert (len(source.train), len(source.valid), len(source.test)) == (45_000, 5_000, 10_000)
    assert torch.bincount(source.test.labels).tolist() == [1000] * 10
    # The known statistics of CIFAR-10, to what JPEG and the cut move them.
    np.testing.assert_allclose(source.mean, [0.4914, 0.4822, 0.4465], atol=2e-3)
    np.testing.assert_allclose(source.std, [0.2470, 0.2435, 0.2616], atol=3e-3)
