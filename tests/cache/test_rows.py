"""Features, logits and gradients against direct computation, and reading of any rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from distill.cache import (
    Cache,
    ErrorNorms,
    Features,
    GradientNorms,
    Gradients,
    LastLayerGradients,
    Limits,
    Logits,
    Loss,
    Margins,
    Network,
    Projection,
    Rows,
)
from distill.cache.rows import MeanRows, StoredRows
from distill.contracts import Split
from distill.errors import InputError, NonFiniteError
from distill.models.mlp import MLPConfig

CPU = torch.device("cpu")
MakeCache = Callable[..., Cache]


def files(rows: Rows) -> tuple[Path, ...]:
    assert isinstance(rows, StoredRows)
    return rows.files


def normalised(split: Split, network: Network) -> Tensor:
    """float32 (N, Ch, H, W)."""
    pre = network.preprocessing
    mean, std = (torch.tensor(values)[:, None, None] for values in (pre.mean, pre.std))
    return (split.images / 255 - mean) / std


def test_features_and_logits_equal_a_direct_forward(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    cache, module = make_cache(), network.module(CPU)
    features, logits = cache.features(split, network), cache.logits(split, network)
    assert features.shape == (37, 4 * 2 * 2)
    assert logits.shape == (37, 3)
    assert features.read(slice(1)).dtype == logits.read(slice(1)).dtype == torch.float32
    images = normalised(split, network)
    everything = slice(None)
    np.testing.assert_allclose(features.read(everything), module.features(images), atol=1e-5)
    np.testing.assert_allclose(logits.read(everything), module(images), atol=1e-5)
    assert cache.images_forwarded == 37, "one pass answers both"


@pytest.mark.parametrize("quantity", [Logits(), GradientNorms()], ids=str)
def test_passes_are_in_float32_and_leave_the_settings_as_they_were(
    quantity: Any,
    make_cache: MakeCache,
    split: Split,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU would use, seen from inside a convolution."""
    cudnn, convolve = torch.backends.cudnn, nn.Conv2d.forward
    seen: set[tuple[bool, bool, bool]] = set()

    def spying(self: nn.Conv2d, x: Tensor) -> Tensor:
        seen.add((cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))
        return convolve(self, x)

    cache = make_cache()
    monkeypatch.setattr(nn.Conv2d, "forward", spying)
    with cudnn.flags(enabled=True, allow_tf32=True, deterministic=False, benchmark=True):
        cache.request(split, network, [quantity])
        assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == (True, False, True)
    assert (False, True, False) in seen


@pytest.mark.gpu
def test_on_a_gpu_rows_are_those_of_a_cpu(tmp_path: Path, split: Split, network: Network, told: Any) -> None:
    """TF32 would be wrong by 1e-3; what is read, taken and kept by the tiers is the same."""
    quantities: list[Any] = [Features(), Logits(), Loss(), GradientNorms(), Gradients(Projection(dim=8))]
    found = {}
    for name in ("cpu", "cuda"):
        cache = Cache(tmp_path / name, device=torch.device(name), progress=told)
        answers = cache.request(split, network, quantities)
        for quantity in quantities:
            rows = answers[quantity]
            whole = rows.read(slice(None))
            assert whole.device.type == name
            assert torch.equal(rows.take(torch.arange(37)), whole)
            assert torch.equal(torch.cat([block for _, block in rows.blocks(5)]), whole)
            found[name, quantity] = whole.cpu()
    for quantity in quantities:
        torch.testing.assert_close(found["cuda", quantity], found["cpu", quantity], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
def test_features_of_a_layer_are_what_it_puts_out(
    norm: str, make_cache: MakeCache, split: Split, make_network: Callable[..., Network]
) -> None:
    """The ReLU that follows works in place, and must not reach into them."""
    network = make_network({"name": "convnet", "width": 4, "norm": norm})
    convolution = network.module(CPU).get_submodule("body.0")
    expected = convolution(normalised(split, network)).flatten(1)
    assert float(expected.min()) < 0
    got = make_cache().features(split, network, layer="body.0")
    np.testing.assert_allclose(got.read(slice(None)), expected, atol=1e-5)


def test_another_layer_costs_a_pass_and_keeps_the_logits(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    cache = make_cache()
    logits = cache.logits(split, network)
    written = [path.stat().st_mtime_ns for path in files(logits)]
    answers = cache.request(split, network, [Features("classifier"), Logits()])
    assert cache.images_forwarded == 2 * 37
    assert [path.stat().st_mtime_ns for path in files(answers[Logits()])] == written, "not written again"
    assert np.array_equal(answers[Features("classifier")].read(slice(None)), logits.read(slice(None)))


def test_a_layer_that_does_not_exist(make_cache: MakeCache, split: Split, network: Network) -> None:
    with pytest.raises(InputError, match=r"no layer 'body\.9'") as caught:
        make_cache().features(split, network, layer="body.9")
    assert caught.value.allowed == "penultimate, body, body.0, body.1, body.2, body.3, classifier"
    assert caught.value.fix is not None
    assert "body." in caught.value.fix
    with pytest.raises(InputError, match="no layer ''"):
        make_cache().features(split, network, layer="")


class WithOddLayers(MLPConfig):
    """A layer that is called twice, one that gives two tensors, and one that is never called."""

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Any:
        network = super().build(image_shape, classes)

        class Odd(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.twice = nn.Linear(128, 128)
                self.never = nn.Linear(1, 1)
                self.pair = nn.MultiheadAttention(128, 1)

            def forward(self, x: Tensor) -> Tensor:
                y, _ = self.pair(x, x, x)
                return self.twice(self.twice(y))

        network.body.append(Odd())
        return network


def test_layers_that_are_odd(
    make_cache: MakeCache, split: Split, make_network: Callable[..., Network]
) -> None:
    network = make_network(WithOddLayers().model_dump())
    state = WithOddLayers().build((2, 8, 8), 3).state_dict()
    network = Network(WithOddLayers(), (2, 8, 8), 3, network.preprocessing, state, facts={})
    cache = make_cache()
    last = cache.features(split, network, layer="body.5.twice").read(slice(None))
    assert np.array_equal(last, cache.features(split, network).read(slice(None))), "its last call counts"
    for layer, found in (("body.5.pair", "tuple"), ("body.5.never", "not computed")):
        with pytest.raises(InputError, match="gives no features") as caught:
            cache.features(split, network, layer=layer)
        assert found in str(caught.value)


@pytest.mark.parametrize("size", [1, 5, 16, 17, 100])
def test_blocks_cover_the_rows(size: int, make_cache: MakeCache, split: Split, network: Network) -> None:
    rows = make_cache().logits(split, network)
    whole = np.concatenate([np.load(path) for path in files(rows)])
    seen = list(rows.blocks(size))
    assert [where.start for where, _ in seen] == list(range(0, 37, size))
    assert all(np.array_equal(values, whole[where]) for where, values in seen)
    assert seen[-1][0].stop == 37


@pytest.mark.parametrize(
    "where",
    [
        slice(*limits)
        for limits in (
            *((0, 0), (5, 5), (16, 16), (20, 10), (37, 40)),  # none
            *((0, 16), (15, 17), (16, 32), (3, 37), (30, 99), (-4, None), (None,)),
        )
    ],
    ids=str,
)
def test_any_rows_can_be_read(where: slice, make_cache: MakeCache, split: Split, network: Network) -> None:
    rows = make_cache().logits(split, network)
    whole = np.concatenate([np.load(path) for path in files(rows)])
    got = rows.read(where)
    assert np.array_equal(got, whole[where])


def test_any_rows_can_be_taken(make_cache: MakeCache, split: Split, network: Network) -> None:
    rows = make_cache().logits(split, network)
    whole = rows.read(slice(None))
    for indices in ([], [36], [36, 0, 16, 15, 16], list(range(37))[::-1]):
        assert np.array_equal(rows.take(np.array(indices, dtype=np.int64)), whole[indices])
    for outside in (-1, 37):
        with pytest.raises(IndexError, match="array of 37"):
            rows.take(np.array([0, outside]))


def test_gradients_equal_autograd(make_cache: MakeCache, split: Split, network: Network) -> None:
    """One sample at a time through torch, in float64 from the same features."""
    gradients = make_cache().last_layer_gradients(split, network)
    features = gradients.factors(slice(None))[1][:, :-1].double()
    classifier = network.module(CPU).double().get_submodule("classifier").requires_grad_(True)
    expected = []
    for feature, label in zip(features, split.labels, strict=True):
        loss = nn.functional.cross_entropy(classifier(feature)[None], label[None])
        weight, bias = torch.autograd.grad(loss, [classifier.weight, classifier.bias])
        expected.append(torch.cat([weight, bias[:, None]], dim=1).flatten())
    assert gradients.shape == (37, 3 * (16 + 1))
    for where, block in gradients.blocks(10):
        assert block.dtype == torch.float32
        np.testing.assert_allclose(block, torch.stack(expected)[where], rtol=1e-4, atol=1e-6)


def test_inner_products_of_gradients_need_no_flat_form(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    gradients = make_cache().last_layer_gradients(split, network)
    ((_, flat),) = gradients.blocks(100)
    residuals, features = gradients.factors(slice(None))
    expected = (residuals @ residuals.T) * (features @ features.T)
    np.testing.assert_allclose(flat @ flat.T, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(residuals.sum(axis=1), 0, atol=1e-6)


@pytest.mark.parametrize(
    "rows", [slice(3, 20), slice(-2, None), [], [36, 0, 0], torch.tensor([16, 15])], ids=str
)
def test_factors_of_any_rows(rows: Any, make_cache: MakeCache, split: Split, network: Network) -> None:
    gradients = make_cache().last_layer_gradients(split, network)
    whole = gradients.factors(slice(None))
    wanted = np.array(rows, dtype=np.int64) if isinstance(rows, list) else rows
    for part, expected in zip(gradients.factors(wanted), whole, strict=True):
        np.testing.assert_allclose(part, expected[wanted], rtol=1e-6, atol=1e-7)


def test_residuals_of_huge_logits_are_finite(make_cache: MakeCache, split: Split, network: Network) -> None:
    state = {
        name: value * 1e4 if name.startswith("classifier") else value for name, value in network.state.items()
    }
    huge = Network(network.model, network.image_shape, 3, network.preprocessing, state, facts={})
    residuals = make_cache().last_layer_gradients(split, huge).factors(slice(None))[0]
    assert np.isfinite(residuals).all()


def broken(network: Network, name: str) -> Network:
    """The network with NaN in one of its tensors."""
    return replace(network, state={**network.state, name: torch.full_like(network.state[name], torch.nan)})


@pytest.mark.parametrize(
    ("quantity", "name", "what"),
    [
        (Features("body.0"), "body.0.bias", "features of layer body.0"),
        (Logits(), "classifier.bias", "logits"),
    ],
)
def test_values_that_are_not_finite_are_refused(
    quantity: Features | Logits,
    name: str,
    what: str,
    make_cache: MakeCache,
    split: Split,
    network: Network,
) -> None:
    cache = make_cache()
    with pytest.raises(NonFiniteError, match=f"37 images gave NaN or infinite {what}, the first .* image 0"):
        cache.request(split, broken(network, name), [quantity])
    assert not list(cache.folder.rglob("rows-*.npy"))


def test_what_nobody_asked_for_is_not_judged(
    make_cache: MakeCache, split: Split, network: Network, told: Any
) -> None:
    """Logits are written beside everything; that they are NaN does not matter to features before them."""
    nan = broken(network, "classifier.bias")
    features = make_cache().features(split, nan).read(slice(None))
    assert torch.equal(features, make_cache().features(split, network).read(slice(None)))
    assert told.warnings == []
    with pytest.raises(NonFiniteError, match="37 of 37 images gave NaN or infinite logits"):
        make_cache().logits(split, nan)
    borne = make_cache(limits=Limits(non_finite=1.0))
    assert not borne.logits(split, nan).read(slice(None)).any()
    assert borne.images_forwarded == 0


def test_an_image_without_finite_values_has_rows_of_zeros_and_no_score(
    make_cache: MakeCache, split: Split, nan_for_black: Callable[..., Network], told: Any
) -> None:
    images = split.images.clone()
    images[20] = 0
    split = Split(images, split.labels, "one black image")
    network = nan_for_black((2, 8, 8), 3)
    others = torch.arange(37) != 20
    vectors: list[Any] = [Features(), Logits(), LastLayerGradients(), Gradients(Projection(dim=8))]
    scores: list[Any] = [Loss(), Margins(), ErrorNorms(), GradientNorms()]
    for _ in ("computed", "read"):
        answers = make_cache(limits=Limits(non_finite=0.03)).request(split, network, vectors + scores)
        for quantity in vectors + scores:
            for values in (answers[quantity].read(slice(None)), answers[quantity].take(torch.arange(37))):
                assert torch.isfinite(values[others]).all() and values[others].any(), quantity
                bad = values[20]
                assert bad.isnan().all() if quantity in scores else not bad.any(), quantity
            assert answers[quantity].absent().tolist() == [20], quantity
        mean = MeanRows([answers[Features()], answers[Features()]], normalise=True)
        assert mean.absent().tolist() == [20]
        for factor in answers[LastLayerGradients()].factors(slice(None)):
            assert torch.isfinite(factor).all() and not factor[20].any()
        assert (
            "1 of 37 images gave values that are not finite; they are NaN in gradient norms" in told.warnings
        )


@pytest.mark.parametrize(("bad", "refused"), [(29, False), (30, True)])
def test_the_share_that_is_borne_is_what_is_written(
    bad: int,
    refused: bool,
    make_cache: MakeCache,
    make_split: Callable[..., Split],
    nan_for_black: Callable[..., Network],
) -> None:
    """0.29 * 100 is 28.999... in binary."""
    split = make_split(rows=100)
    images = split.images.clone()
    images[:bad] = 0
    network = nan_for_black((2, 8, 8), 3)
    cache = make_cache(limits=Limits(non_finite=0.29))
    with pytest.raises(NonFiniteError, match="30 of 100") if refused else nullcontext():
        cache.logits(Split(images, split.labels, "black"), network)
