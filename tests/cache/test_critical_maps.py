"""Critical maps: exact behind linear heads, on the object, from the cache as computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.cache import Cache, CriticalMaps, Features, Logits, Network
from distill.cache.critical_maps import MapPass, map_layer
from distill.contracts import Preprocessing, Split
from distill.errors import InputError
from distill.models import build, model_config
from distill.training.batches import DeviceImages
from distill.training.config import TrainConfig
from distill.training.job import Job, Pool
from distill.training.loop import train

LINEAR = [
    "resnet18",
    {"name": "convnet", "width": 8, "norm": "batch"},
    {"name": "convnet", "width": 8},
    "torchvision/resnet18",
    "torchvision/resnet50",
    "torchvision/efficientnet_b0",
    "torchvision/densenet121",
    "torchvision/mobilenet_v2",
]


def frozen(model: Any, image_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 5) -> nn.Module:
    module = build(model_config(model), image_shape=image_shape, classes=classes, seed=3)
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):  # so that maps are not what they are at initialisation
            part.running_mean += 0.1 * torch.randn(part.running_mean.shape, generator=generator)
    return module.eval().requires_grad_(False)


def noise(count: int = 4, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def raw_map(module: nn.Module, images: Tensor, classes: Tensor) -> Tensor:
    """The map before the relu, by one full backward pass from the logits to the last layer's output."""
    layer, kept = map_layer(module.float(), (3, *images.shape[2:]), name="it"), []
    module.to(images.dtype)

    def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
        kept.append(output.clone() + torch.zeros_like(output).requires_grad_())
        return kept[-1].clone()  # what follows may work in place

    hook = module.get_submodule(layer.name).register_forward_hook(keep)
    logits = module(images)
    hook.remove()
    values = kept[-1]
    (slope,) = torch.autograd.grad(logits[torch.arange(len(images)), classes].sum(), values)
    return (slope * values).sum(dim=1)


@pytest.mark.parametrize("model", LINEAR, ids=str)
def test_behind_a_linear_head_the_evidence_sums_to_the_logit(model: Any) -> None:
    side = 64 if str(model).startswith("torchvision") else 32
    module, images = frozen(model, (3, side, side)).double(), noise(side=side).double()
    classes = torch.tensor([0, 1, 2, 3])
    logits = module(images).gather(1, classes[:, None])[:, 0]
    evidence = raw_map(module, images, classes)
    wanted = logits - module.classifier.bias[classes]
    torch.testing.assert_close(evidence.sum(dim=(1, 2)), wanted, rtol=1e-9, atol=1e-9)


def test_of_a_pooled_head_it_is_the_class_activation_map() -> None:
    """Zhou et al., equation 2, from the features before the pooling."""
    module, images, classes = frozen({"name": "resnet18", "width": 8}), noise(), torch.tensor([4, 1, 2, 0])
    features = nn.Sequential(*list(module.body)[:-1])(images)
    weights = module.classifier.weight[classes]
    wanted = torch.einsum("bdhw,bd->bhw", features, weights).relu() / 16
    logits, maps = MapPass(module, map_layer(module, (3, 32, 32), name="it")).run(images, classes)
    torch.testing.assert_close(maps, wanted)
    assert torch.equal(logits, module(images))
    assert not logits.requires_grad and not maps.requires_grad


@pytest.mark.parametrize(
    ("model", "side", "name", "size"),
    [
        ("resnet18", 32, "body.10", (4, 4)),
        ({"name": "convnet", "norm": "batch"}, 32, "body.10", (8, 8)),  # before the last pooling
        ("convnet", 32, "body.5", (4, 4)),  # norm, ReLU and pooling are one layer there
        ("vgg11", 32, "body.27", (2, 2)),
        ("alexnet", 32, "body.16", (8, 8)),
        (
            "torchvision/resnet18",
            64,
            "body.layer4.1.relu",
            (2, 2),
        ),  # behind the skip, though bn2 has the same tensor
        ("torchvision/efficientnet_b0", 64, "body.features.8.2", (2, 2)),
        ("torchvision/convnext_tiny", 64, "body.features.7.2", (2, 2)),
        ("torchvision/densenet121", 64, "body.features.norm5", (2, 2)),
    ],
    ids=str,
)
def test_the_last_map_is_found(model: Any, side: int, name: str, size: tuple[int, int]) -> None:
    module = frozen(model, (3, side, side))
    layer = map_layer(module, (3, side, side), name="it")
    assert (layer.name, layer.height, layer.width) == (name, *size)
    assert map_layer(module.to("meta"), (3, side, side), name="it") == layer


@pytest.mark.parametrize(
    ("model", "told"), [("mlp", "no map of features"), ("torchvision/vit_b_32", "attention")], ids=str
)
def test_networks_without_a_map_are_refused(model: str, told: str) -> None:
    side = 32 if model == "mlp" else 224
    with pytest.raises(InputError, match=told):
        map_layer(frozen(model, (3, side, side)), (3, side, side), name=model)


def planted(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Grey noise with a square of 10 x 10 px, whose pattern is the class: two ways of stripes, checks, or plain.

    Returns:
        uint8 (N, 3, 32, 32), int64 (N,), and where the square is, bool (N, 32, 32).
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(96, 160, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    places = torch.randint(0, 23, (count, 2), generator=generator).tolist()
    where = torch.zeros(count, 32, 32, dtype=torch.bool)
    stripes = (torch.arange(10) // 2 % 2).expand(10, 10)
    patterns = torch.stack([stripes, stripes.T, stripes ^ stripes.T, torch.ones(10, 10, dtype=torch.int64)])
    for image, label, there, (y, x) in zip(images, labels.tolist(), where, places, strict=True):
        image[:, y : y + 10, x : x + 10] = (255 * patterns[label]).to(torch.uint8)
        there[y : y + 10, x : x + 10] = True
    return images, labels, where


@pytest.mark.parametrize(
    ("model", "least", "peaks"),
    [
        ({"name": "convnet", "width": 8, "norm": "batch"}, 0.75, 0.9),
        ({"name": "resnet18", "width": 8}, 0.4, 0.7),
    ],
    ids=str,
)
def test_the_map_of_a_planted_object_lies_on_the_object(
    model: dict[str, Any], least: float, peaks: float, preprocessing: Preprocessing
) -> None:
    """A ResNet's places see the whole image, so that more of its map lies elsewhere. Near the object is 29% of it."""
    images, labels, _ = planted(160, seed=0)
    config = TrainConfig(epochs=12, lr=0.05, batch_size=16, schedule="cosine", augment="none")
    job = Job(model_config(model), 4, config, Pool(images, labels, preprocessing), seed=0, keep_state=True)
    (trained,) = train([job], device=torch.device("cpu"), dtype=torch.float32)
    network = Network(model_config(model), (3, 32, 32), 4, preprocessing, trained.state, {})
    images, labels, where = planted(64, seed=1)
    shown = (images.float() / 255 - 0.5) / 0.25
    module = network.module(torch.device("cpu"))
    logits, maps = MapPass(module, map_layer(module, (3, 32, 32), name="it")).run(shown, labels)
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.9
    maps = F.interpolate(maps[:, None], size=(32, 32), mode="bilinear")[:, 0]
    near = F.max_pool2d(where[:, None].float(), 9, stride=1, padding=4)[
        :, 0
    ]  # a cell of the map is 4 or 8 px
    inside = (maps * near).sum(dim=(1, 2)) / maps.sum(dim=(1, 2)).clamp(min=1e-9)
    assert inside.mean() > least
    assert inside.mean() > 1.5 * near.mean()
    peak = maps.flatten(1).argmax(dim=1)
    assert near.flatten(1).gather(1, peak[:, None]).mean() > peaks


@pytest.fixture
def preprocessing() -> Preprocessing:
    return Preprocessing((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def test_cached_maps_are_those_of_the_labels(
    tmp_path: Path, split: Split, make_network: Callable[..., Network], told: Any
) -> None:
    network = make_network({"name": "convnet", "width": 4, "norm": "batch"})
    cache = Cache(tmp_path / "cache", device=torch.device("cpu"), progress=told)
    quantities = [CriticalMaps(), Features(), Logits()]
    found = cache.request(split, network, quantities)
    assert cache.images_forwarded == len(split)
    module = network.module(torch.device("cpu"))
    layer = map_layer(module, network.image_shape, name="it")
    pool = Pool(split.images, split.labels, network.preprocessing)
    shown = DeviceImages(pool, torch.device("cpu")).gather(torch.arange(len(split)))
    logits, maps = MapPass(module, layer).run(shown, split.labels)
    rows = found[CriticalMaps()]
    torch.testing.assert_close(rows.take(torch.arange(len(split))), maps.flatten(1))
    torch.testing.assert_close(found[Logits()].take(torch.arange(len(split))), logits)
    again = Cache(tmp_path / "cache", device=torch.device("cpu"), progress=told)
    again.request(split, network, [CriticalMaps()])
    assert again.images_forwarded == 0
