"""Closed forms of one layer's per-sample gradients against autograd, one sample at a time, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from distill.cache.layer_gradients import Outer, bytes_per_sample, has_closed_form, layer_gradients
from distill.models.norm import InstanceNorm, NormReluPool

LAYERS = {
    "linear": (nn.Linear(7, 5), (7,)),
    "linear_without_bias": (nn.Linear(7, 5, bias=False), (7,)),
    "linear_on_tokens": (nn.Linear(7, 5), (3, 7)),
    "linear_on_a_grid": (nn.Linear(7, 5), (2, 3, 7)),
    "conv": (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "conv_without_bias": (nn.Conv2d(3, 4, 1, bias=False), (3, 6, 5)),
    "conv_stride": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 7, 6)),
    "conv_uneven": (nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)), (3, 8, 7)),
    "conv_leaves_pixels_out": (nn.Conv2d(3, 4, 3, stride=3), (3, 8, 7)),
    "conv_groups": (nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 5, 5)),
    "conv_depthwise": (nn.Conv2d(4, 8, 3, padding=1, groups=4, stride=2), (4, 6, 6)),
    "batch_norm": (nn.BatchNorm2d(4), (4, 5, 6)),
    "group_norm": (nn.GroupNorm(2, 4), (4, 5, 6)),
    "group_norm_of_vectors": (nn.GroupNorm(2, 4), (4,)),
    "layer_norm": (nn.LayerNorm(6), (3, 6)),
    "layer_norm_of_planes": (nn.LayerNorm((3, 6)), (4, 3, 6)),
    "layer_norm_without_bias": (nn.LayerNorm(6, bias=False), (6,)),
    "instance_norm": (InstanceNorm(4), (4, 5, 6)),
    "norm_relu_pool": (NormReluPool(4), (4, 6, 8)),
    "norm_relu_pool_odd": (NormReluPool(4), (4, 5, 7)),
}


def drawn(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """The layer in evaluation mode, with random parameters and running statistics."""
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(len(name))
    layer = layer.double().eval()
    with torch.no_grad():
        for value in (*layer.parameters(), *layer.buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.1)
        for value in layer.parameters():
            value -= 0.6
    return layer, shape


def by_autograd(layer: nn.Module, calls: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """(B, *shape) of each parameter: sample by sample, call by call."""
    own = dict(layer.named_parameters())
    total = {
        name: torch.zeros(len(calls[0][0]), *value.shape, dtype=torch.float64) for name, value in own.items()
    }
    for inputs, grad in calls:
        for row in range(len(inputs)):
            output = layer(inputs[row : row + 1])
            parts = torch.autograd.grad(output, list(own.values()), grad[row : row + 1])
            for name, part in zip(own, parts, strict=True):
                total[name][row] += part
    return total


def random_calls(
    layer: nn.Module, shape: tuple[int, ...], *, count: int, channels_last: bool
) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    calls = []
    for _ in range(count):
        inputs = torch.randn(5, *shape, generator=generator, dtype=torch.float64)
        grad = torch.randn(layer(inputs).shape, generator=generator, dtype=torch.float64)
        if channels_last and inputs.dim() == 4:
            inputs, grad = (each.contiguous(memory_format=torch.channels_last) for each in (inputs, grad))
        calls.append((inputs, grad))
    return calls


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_closed_form_is_what_autograd_gives(name: str, count: int, channels_last: bool) -> None:
    layer, shape = drawn(name)
    assert has_closed_form(layer)
    calls = random_calls(layer, shape, count=count, channels_last=channels_last)
    with torch.no_grad():
        found = layer_gradients(layer, calls)
    expected = by_autograd(layer, calls)
    assert found.keys() == expected.keys()
    for parameter, value in expected.items():
        gradient = found[parameter]
        formed = gradient.formed if isinstance(gradient, Outer) else gradient
        torch.testing.assert_close(formed, value, rtol=1e-10, atol=1e-12)


def test_few_samples_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, shape = drawn("norm_relu_pool")
    calls = random_calls(layer, shape, count=1, channels_last=True)
    whole = layer_gradients(layer, calls)
    monkeypatch.setattr("distill.cache.layer_gradients._CACHED_BYTES", 2 * 4 * 6 * 8 * 8)
    for name, value in layer_gradients(layer, calls).items():
        torch.testing.assert_close(value, whole[name])


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    "layer",
    [
        Doubled(3, 3),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 3, 3, padding="same"),
        nn.Conv1d(3, 3, 3),
        nn.MultiheadAttention(4, 2),
        nn.ReLU(),
    ],
)
def test_other_layers_have_none(layer: nn.Module) -> None:
    assert not has_closed_form(layer)


def test_bytes_per_sample_tell_the_largest_tensor() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1)
    inputs = torch.zeros(2, 3, 10, 10)
    assert bytes_per_sample(layer, inputs, layer(inputs)) == 100 * 27 * 4  # the patches
    linear = nn.Linear(50, 40)
    assert (
        bytes_per_sample(linear, torch.zeros(2, 50), torch.zeros(2, 40)) == 50 * 4
    )  # the product is left unformed
    groups = nn.Conv2d(30, 40, 3, groups=2)
    pixel = torch.zeros(2, 30, 3, 3)
    assert bytes_per_sample(groups, pixel, groups(pixel)) == 40 * 15 * 9 * 4


@pytest.mark.parametrize("name", ["linear", "linear_on_tokens", "conv", "conv_uneven"])
def test_products_are_formed_for_some_samples_at_a_time(name: str) -> None:
    layer, shape = drawn(name)
    gradient = layer_gradients(layer, random_calls(layer, shape, count=1, channels_last=True))["weight"]
    assert isinstance(gradient, Outer)
    assert gradient.shape == gradient.formed.shape[1:] == layer.weight.shape
    parts = list(gradient.split(2 * gradient.formed[0].nbytes))
    assert [len(part.left) for _, part in parts] == [2, 2, 1]
    for rows, part in parts:
        torch.testing.assert_close(part.formed, gradient.formed[rows])
    assert len(list(gradient.split(0))) == 5
