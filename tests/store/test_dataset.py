"""`distill.load`: a torch Dataset whose items are what a network expects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import distill
from distill.contracts import DistilledSet, Preprocessing, Selection
from distill.errors import InputError
from distill.labels.codecs import encode
from distill.preprocessing import Transform
from distill.store.dataset import SetDataset
from distill.store.writer import write_set
from distill.training.config import TrainConfig


def slow_transform(image: torch.Tensor, preprocessing: Preprocessing) -> np.ndarray:
    """One image (Ch, H, W), pixel by pixel in float64."""
    scale = 255.0 if image.dtype == torch.uint8 else 1.0
    out = np.empty(tuple(image.shape))
    for c, h, w in np.ndindex(*out.shape):
        pixel = float(image[c, h, w]) / scale
        out[c, h, w] = (pixel - preprocessing.mean[c]) / preprocessing.std[c]
    if preprocessing.zca is None or preprocessing.zca_mean is None:
        return out
    return ((out.ravel() - preprocessing.zca_mean) @ preprocessing.zca.astype(np.float64)).reshape(out.shape)


def test_items(any_set: DistilledSet) -> None:
    dataset = SetDataset(any_set, labels="hard")
    assert len(dataset) == 6
    for index in range(6):
        image, target = dataset[index]
        assert (image.dtype, image.shape) == (torch.float32, (2, 4, 5))
        expected = slow_transform(any_set.images[index], any_set.preprocessing)
        np.testing.assert_allclose(image.numpy(), expected, rtol=1e-4, atol=1e-4)
        assert (target.dtype, int(target)) == (torch.int64, int(any_set.labels[index]))


def test_batches_are_items(any_set: DistilledSet) -> None:
    dataset = SetDataset(any_set)
    for (image, target), index in zip(dataset.__getitems__([4, 0, 2]), [4, 0, 2], strict=True):
        torch.testing.assert_close(image, dataset[index][0])
        torch.testing.assert_close(target, dataset[index][1], rtol=0, atol=0)


def test_soft_targets_are_probabilities_at_the_stored_temperature(plain: DistilledSet) -> None:
    logits = np.linspace(-3, 5, 6 * 3, dtype=np.float32).reshape(1, 6, 3)
    soft = encode(logits, codec="full", temperature=2.5, teacher="t")
    targets = torch.stack([target for _, target in SetDataset(replace(plain, soft=soft))])
    stored = logits[0].astype(np.float16).astype(np.float64) / 2.5
    expected = np.exp(stored) / np.exp(stored).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(targets.numpy(), expected, rtol=1e-5)


def test_weights_are_the_selections_or_ones(plain: DistilledSet) -> None:
    count = len(plain)
    assert torch.equal(SetDataset(replace(plain, selection=None)).weights, torch.ones(count))
    weights = np.linspace(0, 2, count, dtype=np.float32)
    chosen = Selection(np.arange(count), weights, np.zeros(count, np.float32), {"score": "none"})
    assert SetDataset(replace(plain, selection=chosen)).weights.tolist() == weights.tolist()


def test_which_labels(plain: DistilledSet, full: DistilledSet) -> None:
    assert SetDataset(plain).targets.dtype == SetDataset(full, labels="hard").targets.dtype == torch.int64
    assert SetDataset(full).targets.dtype == SetDataset(full, labels="soft").targets.dtype == torch.float32
    with pytest.raises(InputError, match="no soft labels"):
        SetDataset(plain, labels="soft")
    with pytest.raises(InputError, match="unknown kind"):
        SetDataset(plain, labels="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_transform_takes_any_batch(full: DistilledSet, dtype: torch.dtype, batch: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, (*batch, 2, 4, 5), dtype=torch.uint8)
    if dtype != torch.uint8:
        images = (images / 255).to(dtype)
    out = Transform(full.preprocessing)(images)
    assert (out.dtype, out.shape) == (torch.float32, images.shape)
    expected = slow_transform(images.reshape(-1, 2, 4, 5)[0], full.preprocessing)
    np.testing.assert_allclose(out.reshape(-1, 2, 4, 5)[0].numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "images",
    [torch.zeros(3, 4, 5), torch.zeros(4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)],
    ids=["channels", "dimensions", "int64"],
)
def test_transform_refuses_other_images(plain: DistilledSet, images: torch.Tensor) -> None:
    with pytest.raises(InputError, match="images"):
        Transform(plain.preprocessing)(images)


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_a_network_trains_through_a_data_loader(tmp_path: Path, labels: str) -> None:
    """Two classes, bright and dark, that a linear model must tell apart."""
    hard = torch.arange(20) % 2
    images = (60 + 120 * hard[:, None, None, None] + torch.arange(16).view(4, 4)).to(torch.uint8)
    logits = F.one_hot(hard, 2).float()[None] * 8
    write_set(
        DistilledSet(
            images=images,
            labels=hard,
            classes=("dark", "bright"),
            preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
            train=TrainConfig(batch_size=7),
            soft=encode(logits, codec="full", temperature=2.0, teacher="t") if labels == "soft" else None,
        ),
        tmp_path / "set.h5",
    )
    dataset = distill.load(tmp_path / "set.h5")
    assert dataset.classes == ("dark", "bright")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(dataset, batch_size=dataset.train_recipe.batch_size, shuffle=True)
    for _ in range(10):
        for batch, target in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), target).backward()
            optimizer.step()
    dark = torch.full((1, 1, 4, 4), 70, dtype=torch.uint8)
    assert model(dataset.transform(dark)).argmax() == 0
    assert model(dataset.transform(dark + 120)).argmax() == 1


def test_load_takes_a_string(file: Path) -> None:
    assert len(distill.load(str(file), labels="hard", verify=False).set.images) == 6
