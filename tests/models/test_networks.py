"""Every network: shapes, sizes, features and classifier, seeds, stacks, and images it cannot take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from distill.errors import InputError
from distill.models import build, digest, model_config
from distill.models.convnet import default_depth

SMALL: list[dict[str, Any]] = [
    {"name": "convnet", "width": 8},
    {"name": "convnet", "width": 8, "norm": "batch"},
    {"name": "convnet", "width": 8, "norm": "none"},
    {"name": "mlp", "width": 16},
    {"name": "resnet18", "width": 4},
    {"name": "resnet18", "width": 4, "norm": "instance"},
    {"name": "resnet18", "width": 4, "norm": "none"},
    {"name": "alexnet"},
    {"name": "alexnet", "norm": "batch"},
    {"name": "vgg11"},
    {"name": "vgg11", "norm": "none"},
    {"name": "torchvision/shufflenet_v2_x0_5"},
]


def label(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


def network(
    options: str | dict[str, Any], shape=(3, 32, 32), *, classes: int = 10, seed: int = 0
) -> nn.Module:
    return build(model_config(options), image_shape=shape, classes=classes, seed=seed)


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("shape", "classes", "parameters"),
    [
        ((3, 32, 32), 10, 320_010),
        ((3, 32, 32), 100, 504_420),
        ((3, 64, 64), 200, 857_160),
        ((3, 128, 128), 10, 615_690),
    ],
)
def test_convnet_has_the_parameters_of_the_literature(shape, classes, parameters) -> None:
    assert size(network("convnet", shape, classes=classes)) == parameters


@pytest.mark.parametrize(
    ("options", "shape", "parameters"),
    [
        ("mlp", (3, 32, 32), 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("alexnet", (3, 32, 32), 1_872_202),
        ("alexnet", (1, 28, 28), 1_872_202 - 2 * 128 * 25),
        ({"name": "vgg11", "norm": "none"}, (3, 32, 32), 9_225_610),
        ("vgg11", (3, 32, 32), 9_231_114),
    ],
)
def test_parameters(options, shape, parameters) -> None:
    assert size(network(options, shape)) == parameters


@pytest.mark.parametrize(
    ("side", "depth"), [(8, 2), (16, 2), (28, 3), (32, 3), (64, 4), (96, 5), (128, 5), (256, 5)]
)
def test_default_depth(side: int, depth: int) -> None:
    assert default_depth(side, side) == default_depth(side, 2 * side) == depth


@pytest.mark.parametrize("options", SMALL, ids=label)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 64, 48)], ids=str)
def test_features_then_classifier(options, shape) -> None:
    if options["name"].startswith("torchvision/") and shape[0] == 1:
        shape = (3, 28, 28)
    module = network(options, shape, classes=7).eval()
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, logits = module.features(x), module(x)
    assert isinstance(module.classifier, nn.Linear)
    assert features.shape == (2, module.classifier.in_features)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(module.classifier(features), logits)
    assert [m for m in module.modules() if isinstance(m, nn.Linear)][-1] is module.classifier


def test_convnet_equals_plain_layers() -> None:
    """The obvious ConvNet, from torch's own layers, with the same weights: logits and gradients in both layouts."""
    module = network({"name": "convnet", "width": 6})
    layers: list[nn.Module] = []
    for inputs in (3, 6, 6):
        layers += [nn.Conv2d(inputs, 6, 3, padding=1), nn.GroupNorm(6, 6), nn.ReLU(), nn.AvgPool2d(2)]
    plain = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 4 * 4, 10))
    plain.load_state_dict(dict(zip(plain.state_dict(), module.state_dict().values(), strict=True)))
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.arange(4)
    expected = torch.autograd.grad(F.cross_entropy(plain(x), y), list(plain.parameters()))
    for layout in (torch.contiguous_format, torch.channels_last):
        same = copy.deepcopy(module).to(memory_format=layout)
        torch.testing.assert_close(same(x), plain(x), atol=1e-5, rtol=1e-5)
        found = torch.autograd.grad(F.cross_entropy(same(x), y), list(same.parameters()))
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", SMALL, ids=label)
def test_weights_depend_on_the_seed_alone(options) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = digest(network(options, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert digest(network(options, seed=1)) == first
    assert digest(network(options, seed=2)) != first


def test_the_generators_of_accelerators_are_left_alone(monkeypatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    network("mlp")
    assert seeded == []
    torch.manual_seed(0)
    assert seeded == [0], "torch still seeds them there"


def test_digest_sees_structure_values_dtypes_and_buffers() -> None:
    options = {"name": "convnet", "width": 4, "norm": "batch"}
    module = network(options)
    digests = {digest(module), digest(network({**options, "norm": "none"}))}
    digests.add(digest(copy.deepcopy(module).double()))
    changed = copy.deepcopy(module)
    changed.get_buffer("body.1.running_mean").add_(1e-6)
    digests.add(digest(changed))
    with torch.no_grad():
        changed.classifier.bias[0] += 1e-6
    digests.add(digest(changed))
    assert len(digests) == 5
    assert digest(copy.deepcopy(module).to(memory_format=torch.channels_last)) == digest(module)


@pytest.mark.parametrize("options", SMALL[:6], ids=label)
def test_a_stack_trains_as_its_networks_one_by_one(options) -> None:
    """torch.func's stack of K networks: logits, gradients and running statistics, over two steps of SGD."""
    shape = (3, 10, 10)
    alone = [network(options, shape, seed=k) for k in range(2)]
    template = copy.deepcopy(alone[0])
    stacked, buffers = stack_module_state(alone)
    stacked = {name: value.detach().clone().requires_grad_() for name, value in stacked.items()}
    buffers = {name: value.clone() for name, value in buffers.items()}
    x = torch.rand(2, 4, *shape, generator=torch.Generator().manual_seed(0))

    def call(weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(template, (weights, buffers), (x,))

    together = torch.optim.SGD(stacked.values(), lr=0.01)
    single = torch.optim.SGD([each for module in alone for each in module.parameters()], lr=0.01)
    for _ in range(2):
        logits = torch.vmap(call, randomness="different")(stacked, buffers, x)
        expected = torch.stack([module(each) for module, each in zip(alone, x, strict=True)])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for optimizer, values in ((together, logits), (single, expected)):
            optimizer.zero_grad()
            values.square().mean(dim=(1, 2)).sum().backward()
            optimizer.step()
    for k, module in enumerate(alone):
        for name, value in module.state_dict().items():
            torch.testing.assert_close({**stacked, **buffers}[name][k], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "shape", "parts"),
    [
        ({"name": "convnet", "depth": 6}, (3, 32, 32), ["halved 6 times", "depth 1 to 5", "32 x 32"]),
        ({"name": "convnet", "depth": 4}, (1, 8, 8), ["halved 4 times", "depth 1 to 3"]),
        ({"name": "convnet"}, (1, 1, 8), ["too small for convnet", "1 x 8 px", "at least 2 x 2"]),
        ({"name": "convnet"}, (1, 2, 2), ["halved 2 times", "depth 1 to 1", "set depth to 1"]),
        ({"name": "alexnet"}, (1, 7, 8), ["too small for alexnet", "7 x 8 px", "at least 8 x 8"]),
        (
            {"name": "vgg11"},
            (1, 8, 8),
            ["too small for vgg11", "8 x 8 px", "at least 32 x 32", "data.resize"],
        ),
        ({"name": "vgg11"}, (3, 30, 30), ["too small for vgg11", "30 x 30 px"]),
        (
            {"name": "resnet18", "norm": "instance"},
            (1, 8, 8),
            ["too small for resnet18-instance", "at least 9 x 9"],
        ),
    ],
)
def test_images_that_are_too_small(options, shape, parts) -> None:
    with pytest.raises(InputError) as caught:
        network(options, shape)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"name": "convnet", "width": 4, "depth": 5}, (3, 32, 32)),
        ({"name": "convnet", "width": 4, "depth": 1}, (1, 2, 3)),
        ({"name": "alexnet"}, (1, 8, 8)),
        ({"name": "resnet18", "width": 4, "norm": "instance"}, (1, 9, 9)),
        ({"name": "resnet18", "width": 4}, (1, 8, 8)),
        ({"name": "vgg11"}, (1, 28, 28)),
    ],
)
def test_the_smallest_images_that_serve(options, shape) -> None:
    logits = network(options, shape)(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 10)
    assert not torch.equal(logits[0], logits[1])
