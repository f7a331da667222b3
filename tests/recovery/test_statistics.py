"""Listening batch norms against hooks and plain batch norm, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.models import build, model_config
from distill.recovery.statistics import FIRST_LAYER, distance, listen


def network(name: str = "resnet18", **options: object) -> nn.Module:
    config = model_config({"name": name, **options})
    module = build(config, image_shape=(3, 16, 16), classes=4, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value in (part.running_mean, part.weight, part.bias):
                value.data += 0.3 * torch.randn(value.shape, generator=generator)
            part.running_var += torch.rand(part.running_var.shape, generator=generator)
    return module.eval().requires_grad_(False)


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def plain(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and R of one group, as released codes have it: hooks that copy and take the variance."""
    terms: list[Tensor] = []

    def hook(part: nn.BatchNorm2d, inputs: tuple[Tensor], _: Tensor) -> None:
        flat = inputs[0].permute(1, 0, 2, 3).contiguous().view(inputs[0].shape[1], -1)
        found = (flat.mean(1) - part.running_mean).norm() + (
            flat.var(1, unbiased=False) - part.running_var
        ).norm()
        terms.append(found)

    parts = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    hooks = [part.register_forward_hook(hook) for part in parts]
    logits = module(x)
    for each in hooks:
        each.remove()
    return logits, sum(terms) + (FIRST_LAYER - 1) * terms[0]  # type: ignore[return-value]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("model", ["resnet18", "convnet"])
def test_groups_in_one_batch_are_groups_alone(model: str, groups: int, layout: torch.memory_format) -> None:
    options = {"width": 6, "norm": "batch"} if model == "convnet" else {}
    theirs, ours = network(model, **options), network(model, **options)
    heard, targets = listen(ours)
    heard.groups = groups
    x = images(4 * groups).contiguous(memory_format=layout).requires_grad_()
    y = x.detach().clone().requires_grad_()
    logits = ours(x)
    found = distance(heard, targets)
    loss = logits.square().sum() + found.square().sum()
    (got,) = torch.autograd.grad(loss, x)
    expected_loss = torch.zeros((), dtype=torch.float64)
    for k, part in enumerate(y.split(4)):
        expected_logits, expected = plain(theirs, part)
        torch.testing.assert_close(logits[4 * k : 4 * k + 4], expected_logits, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[k], expected, rtol=1e-9, atol=1e-9)
        expected_loss = expected_loss + expected_logits.square().sum() + expected.square()
    (wanted,) = torch.autograd.grad(expected_loss, y)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


def test_a_batch_norm_without_affine_parameters() -> None:
    theirs = nn.Sequential(nn.BatchNorm2d(3, affine=False)).double().eval()
    ours = nn.Sequential(nn.BatchNorm2d(3, affine=False)).double().eval()
    listen(ours)
    torch.testing.assert_close(ours(images(2)), theirs(images(2)))
