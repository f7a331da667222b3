"""Losses against slow loops, and learning rates at points computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from distill.training.config import TrainConfig, learning_rate
from distill.training.loop import make_optimizer, network_losses

K, B, C = 2, 5, 4


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def log_softmax(logits: list[float]) -> list[float]:
    total = math.log(sum(math.exp(value) for value in logits))
    return [value - total for value in logits]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_hard_targets(smoothing: float) -> None:
    logits, targets = draw(0, K, B, C), torch.tensor([[0, 1, 2, 3, 0], [3, 3, 1, 0, 2]])
    config = TrainConfig(label_smoothing=smoothing)
    got = network_losses(logits, targets, config, temperature=1.0)
    for k in range(K):
        total = 0.0
        for row, true in zip(logits[k].tolist(), targets[k].tolist(), strict=True):
            for c, log_q in enumerate(log_softmax(row)):
                total -= (smoothing / C + (1 - smoothing) * (c == true)) * log_q
        assert got[k].item() == pytest.approx(total / B)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_soft_targets(loss: Any, temperature: float) -> None:
    logits, p = draw(0, K, B, C), draw(1, K, B, C).softmax(dim=2)
    got = network_losses(logits, p, TrainConfig(loss=loss), temperature=temperature)
    for k in range(K):
        total = 0.0
        for row, target in zip((logits[k] / temperature).tolist(), p[k].tolist(), strict=True):
            for probability, log_q in zip(target, log_softmax(row), strict=True):
                log_p = math.log(probability) if loss == "kl" else 0.0
                total += probability * (log_p - log_q)
        assert got[k].item() == pytest.approx(temperature**2 * total / B)


def test_kl_and_cross_entropy_differ_by_a_constant() -> None:
    p = draw(1, K, B, C).softmax(dim=2)
    kl, plain = TrainConfig(loss="kl"), TrainConfig()
    differences = [
        network_losses(draw(seed, K, B, C), p, kl, temperature=2.0)
        - network_losses(draw(seed, K, B, C), p, plain, temperature=2.0)
        for seed in (0, 5)
    ]
    torch.testing.assert_close(differences[0], differences[1])
    entropy = -(p * p.log()).sum(dim=2).mean(dim=1)
    torch.testing.assert_close(differences[0], -4 * entropy)


def test_kl_of_certain_targets_is_finite() -> None:
    p = torch.eye(C, dtype=torch.float64)[None]
    loss = network_losses(draw(0, 1, C, C), p, TrainConfig(loss="kl"), temperature=1.0)
    torch.testing.assert_close(
        loss, network_losses(draw(0, 1, C, C), torch.arange(C)[None], TrainConfig(), temperature=1.0)
    )


def test_the_gradient_does_not_shrink_with_temperature() -> None:
    """At a high temperature it is (z - v) / C / B, for logits z and v of mean 0 (Hinton et al., 2015, section 2.1)."""
    student, teacher = (draw(seed, 1, B, C) for seed in (0, 1))
    student, teacher = (z - z.mean(dim=2, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    loss = network_losses(student, (teacher / 1000).softmax(dim=2), TrainConfig(), temperature=1000.0)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(gradient, (student - teacher).detach() / C / B, rtol=0.01, atol=1e-3)


def test_losses_of_logits() -> None:
    z, t = draw(0, K, B, C), draw(1, K, B, C)
    mse = network_losses(z, t, TrainConfig(loss="mse"), temperature=3.0)
    cosine = network_losses(z, t, TrainConfig(loss="cosine"), temperature=3.0)
    for k in range(K):
        square, turned = 0.0, 0.0
        for own, other in zip(z[k].tolist(), t[k].tolist(), strict=True):
            square += sum((a - b) ** 2 for a, b in zip(own, other, strict=True)) / C
            product = sum(a * b for a, b in zip(own, other, strict=True))
            turned += 1 - product / math.hypot(*own) / math.hypot(*other)
        assert mse[k].item() == pytest.approx(square / B)
        assert cosine[k].item() == pytest.approx(turned / B)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl", "mse", "cosine"])
def test_weights_leave_samples_out(loss: Any) -> None:
    z, t = draw(0, K, B, C), draw(1, K, B, C).softmax(dim=2)
    weights = torch.ones(K, B, dtype=z.dtype)
    weights[:, 1] = 0
    config = TrainConfig(loss=loss)
    kept = [row for row in range(B) if row != 1]
    torch.testing.assert_close(
        network_losses(z, t, config, temperature=2.0, weights=weights),
        network_losses(z[:, kept], t[:, kept], config, temperature=2.0),
        rtol=1e-9,
        atol=1e-9,
    )
    nothing = network_losses(z, t, config, temperature=2.0, weights=torch.zeros_like(weights))
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize(
    ("settings", "points"),
    [
        ({"schedule": "constant"}, {0: 1.0, 5: 1.0, 9.9: 1.0}),
        ({"schedule": "step"}, {0: 1.0, 4.99: 1.0, 5: 0.1, 9.9: 0.1}),
        ({"schedule": "cosine"}, {0: 1.0, 2.5: (1 + 0.5**0.5) / 2, 5: 0.5, 10: 0.0}),
        ({"schedule": "cosine", "warmup_epochs": 2.0}, {0: 0.0005, 1: 0.5005, 2: 1.0, 6: 0.5, 10: 0.0}),
        ({"schedule": "constant", "warmup_epochs": 4.0}, {1: 0.25025, 4: 1.0}),
        ({"schedule": "cosine", "warmup_epochs": 10.0}, {5: 0.5001}),
        ({"schedule": "cosine", "cosine_stretch": 2.0}, {0: 1.0, 5: (1 + 0.5**0.5) / 2, 10: 0.5}),
    ],
)
def test_learning_rate(settings: dict[str, Any], points: dict[float, float]) -> None:
    config = TrainConfig(lr=1.0, epochs=10, **settings)
    assert {epoch: learning_rate(config, epoch) for epoch in points} == pytest.approx(points)


def test_optimizers_take_their_settings() -> None:
    weight = torch.ones(2, requires_grad=True)
    sgd = make_optimizer([weight], TrainConfig(momentum=0.5, weight_decay=0.1, lr=0.2))
    assert isinstance(sgd, torch.optim.SGD)
    assert [sgd.defaults[name] for name in ("lr", "momentum", "weight_decay")] == [0.2, 0.5, 0.1]
    adamw = make_optimizer([weight], TrainConfig(optimizer="adamw", momentum=0.8))
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.8, 0.999)


@pytest.mark.parametrize("steps_per_epoch", [1, 2, 7, 180])
@pytest.mark.parametrize("epochs", [1, 2, 3, 10, 300])
def test_half_of_the_steps_are_decayed_however_they_are_spread(epochs: int, steps_per_epoch: int) -> None:
    """The arms of an evaluation share a schedule, not a number of epochs."""
    config = TrainConfig(lr=1.0, epochs=epochs, schedule="step")
    steps = epochs * steps_per_epoch
    decayed = sum(learning_rate(config, step / steps_per_epoch) < 1 for step in range(steps))
    assert decayed == steps // 2


def test_a_warm_up_that_never_ends_is_refused() -> None:
    assert TrainConfig(epochs=3, warmup_epochs=3.0).warmup_epochs == 3
    with pytest.raises(ValidationError, match=r"warmup_epochs 3\.5 is beyond epochs 3"):
        TrainConfig(epochs=3, warmup_epochs=3.5)
