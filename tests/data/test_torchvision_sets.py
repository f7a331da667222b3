from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distill.data import config_class, open_source, plan
from distill.data.torchvision_sets import CIFAR10, SVHN, TorchvisionConfig, image_tensors
from distill.errors import InputError

ALL = ["cifar10", "cifar100", "mnist", "fashion_mnist", "svhn"]


def test_image_tensors_of_every_layout():
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (6, 3, 5, 5), dtype=np.uint8)
    grey = rng.integers(0, 256, (6, 5, 5), dtype=np.uint8)
    labels = [3, 1, 4, 1, 5, 9]
    cifar = SimpleNamespace(data=colour.transpose(0, 2, 3, 1), targets=labels)
    mnist = SimpleNamespace(data=torch.from_numpy(grey), targets=torch.tensor(labels))
    svhn = SimpleNamespace(data=colour, labels=np.array(labels))
    for dataset, expected in ((cifar, colour), (mnist, grey[:, None]), (svhn, colour)):
        images, numbers = image_tensors(dataset)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        np.testing.assert_array_equal(images.numpy(), expected)
        assert numbers.dtype == torch.int64
        assert numbers.tolist() == labels


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_idx_files_in_torchvisions_place_are_opened(progress, tmp_path, write_idx, name):
    raw = tmp_path / {"mnist": "MNIST", "fashion_mnist": "FashionMNIST"}[name] / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    for stem, n in (("train", 40), ("t10k", 10)):
        write_idx(raw / f"{stem}-images-idx3-ubyte", images[:n])
        write_idx(raw / f"{stem}-labels-idx1-ubyte", labels[:n])
    config = config_class(name)(folder=str(tmp_path), download=False, valid=0)
    source = open_source(config, seed=0, progress=progress)
    np.testing.assert_array_equal(source.train.images[:, 0].numpy(), images)
    assert source.train.labels.tolist() == labels.tolist()
    assert len(source.test) == 10
    assert source.classes[3] == ("3" if name == "mnist" else "Dress")


class Stub:
    """Stands in for a torchvision class: 20 images, the constructor's arguments kept."""

    seen: list[dict]

    def __init__(self, root, **arguments):
        type(self).seen.append(arguments)
        self.classes = [f"class {number}" for number in range(10)]
        self.data = np.zeros((20, 3, 4, 4), dtype=np.uint8)
        self.labels = np.arange(20) % 10


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (CIFAR10, [{"train": True}, {"train": False}]),
        (SVHN, [{"split": "train"}, {"split": "test"}]),
    ],
)
def test_both_splits_are_asked_for(progress, tmp_path, monkeypatch, data, arguments):
    stub = type("Recording", (Stub,), {"seen": []})
    monkeypatch.setattr(data, "dataset", stub)
    source = data(data.Config(folder=str(tmp_path), download=False)).open(seed=0, progress=progress)
    assert [{"download": False, **asked} for asked in arguments] == stub.seen
    assert len(source.classes) == 10
    assert len(source.test) == 20


@pytest.mark.parametrize("name", ALL)
def test_missing_files_say_what_to_put_where(progress, tmp_path, name):
    config = config_class(name)(folder=str(tmp_path), download=False)
    with pytest.raises(InputError) as caught:
        open_source(config, seed=0, progress=progress)
    text = str(caught.value)
    assert f"{name} could not be found" in text
    expected = {
        "cifar10": "cifar-10-python.tar.gz",
        "cifar100": "cifar-100-python.tar.gz",
        "svhn": "test_32x32.mat",
    }
    assert str(tmp_path / expected.get(name, "")) in text
    if "mnist" in name:
        assert "raw/t10k-labels-idx1-ubyte.gz" in text


def test_a_failed_download_is_an_input_error(progress, tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("<urlopen error [Errno -3] Temporary failure in name resolution>")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    config = config_class("cifar10")(folder=str(tmp_path))
    with pytest.raises(InputError, match=r"could not be downloaded[^$]*name resolution[^$]*cifar-10-python"):
        open_source(config, seed=0, progress=progress)


def test_files_of_a_wrong_checksum_are_refused(progress, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "batches.meta", "test_batch"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'true'\ntR.")  # would run a program, were it unpickled
    config = config_class("cifar10")(folder=str(tmp_path), download=False)
    with pytest.raises(InputError, match="corrupted"):
        open_source(config, seed=0, progress=progress)


def test_an_unwritable_folder_is_an_input_error(progress, tmp_path):
    (tmp_path / "file").write_text("in the way")
    config = config_class("mnist")(folder=str(tmp_path / "file" / "below"), download=False)
    with pytest.raises(InputError, match="mnist could not be found"):
        open_source(config, seed=0, progress=progress)


def test_default_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert TorchvisionConfig(name="mnist").root == tmp_path / "distill" / "data"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(TorchvisionConfig(name="mnist").root) == "/home/someone/.cache/distill/data"


@pytest.mark.parametrize("name", ALL)
def test_plan_needs_no_files(name, tmp_path):
    planned = plan(config_class(name)(folder=str(tmp_path / "nowhere")))
    assert planned.image_bytes is not None
    assert planned.classes == (100 if name == "cifar100" else 10)
