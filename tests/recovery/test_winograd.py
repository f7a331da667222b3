"""Convolutions of frozen networks on small maps are convolutions."""

import copy

import pytest
import torch
from torch import nn

from distill.models import build, model_config
from distill.recovery.winograd import SmallMapConv, is_plain, saves, with_small_maps


@pytest.mark.parametrize(("height", "width"), [(4, 4), (8, 8), (7, 7), (3, 4), (4, 7)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_a_convolutions(
    height: int, width: int, bias: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(256, 192, 3, padding=1, bias=bias).requires_grad_(False)
    images = torch.randn(6, 256, height, width).to(memory_format=layout)
    assert saves(height, width, 256, 192), "the walk is what is tested"
    to_y = torch.randn(6, 192, height, width)

    ours = images.clone().requires_grad_()
    y = SmallMapConv(conv)(ours)
    y.backward(to_y)
    exact = images.double().requires_grad_()
    wanted = copy.deepcopy(conv).double()(exact)
    wanted.backward(to_y.double())

    assert ours.grad is not None and exact.grad is not None
    assert (y - wanted).abs().max() < 2e-4 * wanted.std()
    assert (ours.grad - exact.grad).abs().max() < 2e-4 * exact.grad.std()


def test_work_decides() -> None:
    assert saves(4, 4, 512, 512) and saves(8, 8, 256, 256) and saves(7, 7, 512, 512)
    assert not saves(16, 16, 128, 128) and not saves(32, 32, 64, 64), "transforms cost too much"
    assert not saves(8, 8, 3, 64), "few channels pay for no transform"


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 1),
    ],
)
def test_other_convolutions_stay(conv: nn.Conv2d) -> None:
    assert not is_plain(conv)


def test_other_numbers_stay() -> None:
    conv = nn.Conv2d(96, 96, 3, padding=1).double()
    images = torch.randn(2, 96, 4, 4, dtype=torch.float64)
    assert torch.equal(SmallMapConv(conv)(images), conv(images))


def test_a_network_says_what_it_said() -> None:
    module = build(model_config("resnet18"), image_shape=(3, 32, 32), classes=10, seed=0).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        before = module(images)
        with_small_maps(module)
        after = module(images)
    assert any(isinstance(part, SmallMapConv) for part in module.modules())
    assert torch.allclose(before, after, atol=1e-4)
