"""Means and variances of layers' inputs against one direct computation over all samples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.cache import Cache, Features, Limits, Network, Statistics, passes
from distill.cache.shards import ShardFolder
from distill.contracts import Preprocessing, Split
from distill.errors import InputError, NonFiniteError
from distill.models.mlp import MLPConfig

CPU = torch.device("cpu")
MakeCache = Callable[..., Cache]
MakeNetwork = Callable[..., Network]
BATCH = {"name": "convnet", "width": 4, "norm": "batch"}


def layer_inputs(split: Split, network: Network, layer: str) -> list[Tensor]:
    """float64 (N, Ch, ...) at each call of the layer, all samples at once."""
    module = network.module(CPU).double()
    pre = network.preprocessing
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (pre.mean, pre.std))
    caught: list[Tensor] = []
    module.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0].clone()))
    module((split.images.double() / 255 - mean) / std)
    return caught


def assert_moments(got: Any, values: Tensor) -> None:
    """`values` (N, Ch, ...): all of them at once, in float64."""
    flat = values.transpose(0, 1).flatten(1)  # (Ch, N * positions)
    torch.testing.assert_close(got.mean, flat.mean(dim=1).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.var, flat.var(dim=1, correction=0).float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("of", "layers"), [("batch_norm", ["body.1", "body.5"]), ("convolution", ["body.0", "body.4"])]
)
def test_statistics_equal_a_direct_computation(
    of: Any, layers: list[str], make_cache: MakeCache, split: Split, make_network: MakeNetwork
) -> None:
    network = make_network({**BATCH, "depth": 2})
    found = make_cache().statistics(split, network, Statistics(of=of))
    assert list(found.layers) == layers
    for layer in layers:
        assert_moments(found[layer], layer_inputs(split, network, layer)[0])
        assert int(found[layer].count) == len(split)


def test_each_class_has_its_own(make_cache: MakeCache, split: Split, make_network: MakeNetwork) -> None:
    network = make_network(BATCH)
    labels = torch.where(split.labels == 2, 0, split.labels)  # nothing of class 2
    split = Split(split.images, labels, "without class 2")
    found = make_cache().statistics(split, network, Statistics(per_class=True))["body.1"]
    (inputs,) = layer_inputs(split, network, "body.1")
    assert found.mean.shape == found.var.shape == (3, 4)
    assert found.count.tolist() == [int((labels == number).sum()) for number in range(3)]
    for number in range(2):
        one = type(found)(found.mean[number], found.var[number], found.count[number])
        assert_moments(one, inputs[labels == number])
    assert not found.mean[2].any() and not found.var[2].any()


class TwiceConfig(MLPConfig):
    """A batch norm of vectors that is called twice."""

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Any:
        network = super().build(image_shape, classes)

        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(128)

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(3 * self.norm(x) + 1)

        network.body.append(Twice())
        return network


def test_a_layer_that_is_called_twice_counts_both(
    make_cache: MakeCache, split: Split, make_network: MakeNetwork
) -> None:
    plain = make_network()
    state = TwiceConfig().build((2, 8, 8), 3).state_dict()
    network = Network(TwiceConfig(), (2, 8, 8), 3, plain.preprocessing, state, facts={})
    found = make_cache().statistics(split, network)
    assert_moments(found["body.5.norm"], torch.cat(layer_inputs(split, network, "body.5.norm")))


def test_layers_by_pattern(make_cache: MakeCache, split: Split, make_network: MakeNetwork) -> None:
    network = make_network({**BATCH, "depth": 3})
    found = make_cache().statistics(split, network, Statistics(layers=("body.1", "*.9")))
    assert list(found.layers) == ["body.1", "body.9"]


@pytest.mark.parametrize(
    ("model", "layers", "message", "hint"),
    [
        ({**BATCH, "depth": 2}, ("head.*",), "no batch norm layer of that name", "body.1, body.5"),
        ("convnet", ("*",), "no batch norm layer", "norm: batch"),
    ],
)
def test_a_network_without_such_layers(
    model: Any,
    layers: tuple[str, ...],
    message: str,
    hint: str,
    make_cache: MakeCache,
    split: Split,
    make_network: MakeNetwork,
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_cache().statistics(split, make_network(model), Statistics(layers=layers))
    assert hint in str(caught.value)


def test_statistics_come_along_with_features(
    make_cache: MakeCache, split: Split, make_network: MakeNetwork
) -> None:
    network, cache = make_network(BATCH), make_cache()
    asked = [Features(), Statistics(), Statistics(of="convolution", per_class=True)]
    together = cache.request(split, network, asked)
    assert cache.images_forwarded == len(split)
    again = make_cache()
    for quantity in asked[1:]:
        alone = again.statistics(split, network, quantity)
        for name, moments in together[quantity].layers.items():
            assert torch.equal(moments.mean, alone[name].mean)
    assert again.images_forwarded == 0


def sums(folder: Path) -> list[str]:
    return sorted(path.name[:26] for path in folder.rglob("sums-*.npy"))


def test_an_interrupted_pass_goes_on_where_it_was(
    make_cache: MakeCache, split: Split, make_network: MakeNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, cache = make_network(BATCH), make_cache()
    whole = make_cache().statistics(split, network)
    finished = {path.name for path in cache.folder.rglob("sums-*.npy")}
    other = Split(split.images, split.labels, "the same under another name")

    from distill.cache import forward

    over = forward.Forward.over

    def stops(self: forward.Forward, split: Split, span: range, **options: Any) -> Any:
        if span.start == 32:
            raise KeyboardInterrupt
        return over(self, split, span, **options)

    with monkeypatch.context() as patch:
        patch.setattr(forward.Forward, "over", stops)
        with pytest.raises(KeyboardInterrupt):
            cache.statistics(other, network)
    assert sums(cache.folder) == ["sums-0000000000-0000000032", "sums-0000000000-0000000037"]
    cache = make_cache()
    again = cache.statistics(other, network)
    assert cache.images_forwarded == 5
    assert sums(cache.folder) == ["sums-0000000000-0000000037"] * 2
    assert {path.name for path in cache.folder.rglob("sums-*.npy")} == finished, "the same bytes"
    assert torch.equal(again["body.1"].var, whole["body.1"].var)


def test_large_sums_are_written_seldom(
    make_cache: MakeCache, make_split: Callable[..., Split], make_network: MakeNetwork, monkeypatch: Any
) -> None:
    """Sums of 3 classes by 17 numbers, 408 bytes: at 8 bytes a sample every fourth range of 16, and the last."""
    network, split = make_network(BATCH), make_split(16 * 9 + 5)
    quantity = Statistics(per_class=True)
    often = make_cache().statistics(split, network, quantity)["body.1"]
    finished = {path.name for path in make_cache().folder.rglob("sums-*.npy")}
    written = []
    write = ShardFolder.write

    def noting(self: ShardFolder, span: range, values: Any, *, bad: int = 0) -> Any:
        if self.prefix == "sums":
            written.append(span.stop)
        return write(self, span, values, bad=bad)

    monkeypatch.setattr(ShardFolder, "write", noting)
    monkeypatch.setattr(passes, "SUM_BYTES_A_SAMPLE", 8)
    other = Split(split.images, split.labels, "the same under another name")
    seldom = make_cache().statistics(other, network, quantity)["body.1"]
    assert written == [64, 128, 149]
    assert torch.equal(seldom.mean, often.mean) and torch.equal(seldom.var, often.var)
    assert {path.name for path in make_cache().folder.rglob("sums-*.npy")} == finished, "the same bytes"


class BlackIsNothing(MLPConfig):
    """Divides by an image's brightness before a batch norm: black images become NaN."""

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Any:
        network = super().build(image_shape, classes)

        class Divided(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(image_shape[0])

            def forward(self, x: Tensor) -> Tensor:
                return self.norm(x / x.mean(dim=(1, 2, 3), keepdim=True))

        network.body.insert(0, Divided())
        return network


def test_images_that_are_not_finite_are_left_out(make_cache: MakeCache, told: Any) -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(1, 256, (40, 2, 8, 8), generator=generator, dtype=torch.uint8)
    images[[7, 33]] = 0
    split = Split(images, torch.arange(40) % 3, "two black images")
    state = BlackIsNothing().build((2, 8, 8), 3).state_dict()
    preprocessing = Preprocessing((0.0, 0.0), (1.0, 1.0))
    network = Network(BlackIsNothing(), (2, 8, 8), 3, preprocessing, state, facts={})

    found = make_cache(limits=Limits(non_finite=0.05)).statistics(split, network)["body.0.norm"]
    inputs = layer_inputs(split, network, "body.0.norm")[0]
    assert_moments(found, inputs[torch.isfinite(inputs).flatten(1).all(dim=1)])
    assert int(found.count) == 38
    assert told.warnings == [
        "2 of 40 images gave values that are not finite; they are left out of statistics"
    ]
    features = make_cache(limits=Limits(non_finite=0.05)).features(split, network).read(slice(None))
    assert torch.isfinite(features).all()
    assert features.any(dim=1).logical_not().nonzero()[:, 0].tolist() == [7, 33], "rows of zeros"
    assert "rows of zeros in features of layer penultimate" in told.warnings[-1]
    for rate, message in ((0.04, "2 of 40 images gave NaN or infinite statistics"), (0, "2 of 40 images")):
        with pytest.raises(NonFiniteError, match=message) as caught:
            make_cache(limits=Limits(non_finite=rate)).statistics(split, network)
        assert "cache.non_finite" in str(caught.value)
