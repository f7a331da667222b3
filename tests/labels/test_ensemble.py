"""Ensembles against their formulas; batch statistics against a network that takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.cache.networks import Network
from distill.contracts import Preprocessing
from distill.errors import InputError, NonFiniteError
from distill.labels.ensemble import Ensemble, refuse_without_batch_norm
from distill.models import build, model_config

CPU = torch.device("cpu")
PLAIN = Preprocessing(mean=(0.4,), std=(0.3,))


def teacher(seed: int, *, norm: str = "batch", preprocessing: Preprocessing = PLAIN) -> Network:
    model = model_config({"name": "convnet", "width": 4, "norm": norm})
    module = build(model, image_shape=(1, 8, 8), classes=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            part.running_mean += 0.2 * torch.randn(part.running_mean.shape, generator=generator)
    return Network(model, (1, 8, 8), 3, preprocessing, module.state_dict(), {})


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(9))


def ensemble(*networks: Network, weights: tuple[float, ...] | None = None, **options: Any) -> Ensemble:
    shares = weights or (1 / len(networks),) * len(networks)
    return Ensemble(networks, shares, options.pop("temperature", 4.0), PLAIN, **options)


def alone(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.module(CPU)(x)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)  # rounded to float16


def test_logits_are_weighed() -> None:
    one, other, x = teacher(0), teacher(1), images()
    got = ensemble(one, other, weights=(0.3, 0.7)).on(CPU).logits(x)
    close(got, 0.3 * alone(one, x) + 0.7 * alone(other, x))
    assert torch.equal(got, got.half().float())


def test_probabilities_are_weighed() -> None:
    one, other, x = teacher(0), teacher(1), images()
    got = ensemble(one, other, weights=(0.3, 0.7), combine="probabilities").on(CPU).logits(x)
    wanted = 0.3 * (alone(one, x) / 4).softmax(1) + 0.7 * (alone(other, x) / 4).softmax(1)
    close((got / 4).softmax(dim=1), wanted)


def test_batch_statistics_are_those_of_the_micro_batch() -> None:
    """As a network in training mode has them, part by part, and nothing of it stays."""
    network, x = teacher(0), images(7)
    labellers = ensemble(network, batch_norm="batch", micro_batches=2).on(CPU)
    got = labellers.logits(x)
    training = network.module(CPU).train()
    with torch.no_grad():
        close(got, torch.cat([training(part) for part in (x[:4], x[4:])]))
    assert not torch.allclose(got, alone(network, x), atol=1e-2)
    assert torch.equal(labellers.logits(x), got)
    for name, value in labellers.modules[0].state_dict().items():
        if "running" in name:
            assert torch.equal(value, network.state[name])


def test_dropout_is_off_with_batch_statistics() -> None:
    network = teacher(0)
    labellers = ensemble(network, batch_norm="batch").on(CPU)
    labellers.modules[0].add_module("drop", nn.Dropout(0.9).eval())
    assert not any(part.training for part in labellers.modules[0].modules() if isinstance(part, nn.Dropout))


def test_a_teacher_sees_images_as_it_was_trained() -> None:
    theirs = Preprocessing(mean=(0.1,), std=(0.9,))
    network, x = teacher(0, preprocessing=theirs), images()
    pixels = x * 0.3 + 0.4
    close(ensemble(network).on(CPU).logits(x), alone(network, (pixels - 0.1) / 0.9))


def test_a_teacher_of_nan_is_named() -> None:
    network = teacher(0)
    network.state["classifier.bias"].fill_(float("nan"))
    labellers = ensemble(teacher(1), network).on(CPU)
    with pytest.raises(NonFiniteError, match=r"the teacher convnet-w4-batch \(1\) gave NaN"):
        labellers.logits(images())


def test_names_tell_teachers_apart() -> None:
    assert ensemble(teacher(0), teacher(1)).names == ("convnet-w4-batch (0)", "convnet-w4-batch (1)")
    assert ensemble(teacher(0), teacher(1, norm="instance")).names == ("convnet-w4-batch", "convnet-w4")


def test_no_batch_norm_is_refused() -> None:
    networks = {"a": teacher(0).outline, "b": teacher(1, norm="instance").outline}
    with pytest.raises(InputError, match="no batch norm") as caught:
        refuse_without_batch_norm(networks, where="recover.statistics")
    assert "found: b" in str(caught.value) and "recover.statistics" in str(caught.value)


def test_whitened_images_are_refused() -> None:
    zca = Preprocessing(mean=(0.4,), std=(0.3,), zca=torch.eye(64).numpy())
    with pytest.raises(InputError, match="whitened"):
        Ensemble((teacher(0),), (1.0,), 4.0, zca).on(CPU)


def test_one_teacher_is_itself() -> None:
    network, x = teacher(0), images()
    got = ensemble(network, combine="probabilities", temperature=1.0).on(CPU).logits(x)
    close(F.log_softmax(got, dim=1), F.log_softmax(alone(network, x), dim=1))
