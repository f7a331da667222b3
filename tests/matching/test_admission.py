"""Networks that are more than their weights, and experts that stand still, are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.cache.trajectories import Layout, Trajectories
from distill.errors import InputError
from distill.matching.admission import refuse_network, refuse_still
from distill.models import model_config
from distill.models.base import Classifier, ModelConfig

SHAPE = (3, 64, 64)


class Drops(nn.Module):
    """Dropout that no module of its own shows."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.share, training=self.training)


class Dropping(ModelConfig):
    """A network that drops `share` of its features."""

    name: Literal["dropping"] = "dropping"
    share: float

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        return Classifier(nn.Sequential(nn.Flatten(), Drops(self.share)), nn.Linear(3 * 64 * 64, classes))

    def describe(self) -> str:
        return "dropping"


def test_a_network_that_draws() -> None:
    with pytest.raises(InputError, match="draws as it trains") as caught:
        refuse_network(Dropping(share=0.5), image_shape=SHAPE, classes=2)
    assert "dropping" in str(caught.value.found)
    refuse_network(Dropping(share=0.0), image_shape=SHAPE, classes=2)


@pytest.mark.parametrize("name", ["alexnet", "convnext_tiny"])
def test_torchvisions_dropout_and_stochastic_depth(name: str) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(InputError, match="without dropout and stochastic depth"):
        refuse_network(model_config(f"torchvision/{name}"), image_shape=SHAPE, classes=2)


def test_torchvisions_attention_without_dropout() -> None:
    """Fused attention is marked as an operation that may draw; here it is not to be taken for one that does."""
    pytest.importorskip("torchvision")
    refuse_network(model_config("torchvision/vit_b_16"), image_shape=(3, 224, 224), classes=2)


@pytest.mark.parametrize("model", ["convnet", "mlp", "alexnet", {"name": "convnet", "norm": "none"}])
def test_networks_of_weights_alone(model: Any) -> None:
    before = torch.get_rng_state()
    refuse_network(model_config(model), image_shape=SHAPE, classes=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("model", ["resnet18", {"name": "convnet", "norm": "batch"}])
def test_running_statistics(model: Any) -> None:
    with pytest.raises(InputError, match="keeps statistics"):
        refuse_network(model_config(model), image_shape=SHAPE, classes=2)


def experts(folder: Path, weights: np.ndarray) -> Trajectories:
    """One of a single layer."""
    np.save(folder / "weights.npy", weights[None].astype("<f4"))
    return Trajectories(folder / "weights.npy", Layout.of(nn.Linear(2, 1), range(len(weights))), 1)


def test_the_first_pair_of_epochs_without_movement_is_named(tmp_path: Path) -> None:
    weights = np.ones((6, 3))
    weights[:, 0] = [1, 2, 3, 4, 4 * (1 + 1e-7), 4]
    found = experts(tmp_path, weights)
    refuse_still(found, starts=range(3), epochs=1)
    with pytest.raises(InputError, match="between epochs 3 and 4") as caught:
        refuse_still(found, starts=range(5), epochs=1)
    assert "lower start_epochs.last" in str(caught.value)
    refuse_still(found, starts=range(3), epochs=2)
    with pytest.raises(InputError, match="between epochs 3 and 5"):
        refuse_still(found, starts=range(1, 4), epochs=2)
