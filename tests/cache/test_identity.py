"""What is kept is found again by everything that decides it, and by nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import cache as cache_module
from distill.cache import (
    Cache,
    Features,
    GradientNorms,
    Gradients,
    Limits,
    Logits,
    Network,
    Projection,
    Rows,
    Statistics,
    default_folder,
)
from distill.cache import identity as identity_module
from distill.cache.identity import cache_key
from distill.cache.quantities import Stored
from distill.cache.rows import StoredRows
from distill.contracts import Split
from distill.models import digest

BOTH = (Features(), Logits())
CPU = torch.device("cpu")
MakeCache = Callable[..., Cache]
MakeNetwork = Callable[..., Network]


def zca(seed: int, size: int = 2 * 8 * 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "zca": rng.normal(size=(size, size)).astype(np.float32),
        "zca_mean": rng.normal(size=size).astype(np.float32),
    }


def test_a_second_request_computes_nothing(make_cache: MakeCache, split: Split, network: Network) -> None:
    first = make_cache()
    before = first.features(split, network).read(slice(None))
    second = make_cache()
    assert np.array_equal(second.features(split, network).read(slice(None)), before)
    second.logits(split, network)
    second.last_layer_gradients(split, network)
    assert second.images_forwarded == 0
    assert first.images_forwarded == len(split)


CHANGES: dict[str, Callable[[Split, Network, MakeNetwork], tuple[Split, Network, str]]] = {
    "data": lambda s, n, make: (replace(s, fingerprint="other"), n, "penultimate"),
    "rows": lambda s, n, make: (Split(s.images[:20], s.labels[:20], s.fingerprint), n, "penultimate"),
    "weights": lambda s, n, make: (s, make(seed=1), "penultimate"),
    "one weight": lambda s, n, make: (s, replace(n, state=_nudged(n)), "penultimate"),
    "definition": lambda s, n, make: (
        s,
        make({"name": "convnet", "width": 4, "norm": "none"}),
        "penultimate",
    ),
    "mean": lambda s, n, make: (s, make(mean=(0.4, 0.51)), "penultimate"),
    "std": lambda s, n, make: (s, make(std=(0.2, math.nextafter(0.3, 1))), "penultimate"),
    "zca": lambda s, n, make: (s, make(**zca(0)), "penultimate"),
    "layer": lambda s, n, make: (s, n, "body.2"),
}


def files(rows: Rows) -> set[Path]:
    assert isinstance(rows, StoredRows)
    return set(rows.files)


def _nudged(network: Network) -> dict[str, torch.Tensor]:
    bias = network.state["classifier.bias"].clone()
    bias[0] = torch.nextafter(bias[0], torch.tensor(9.0))
    return {**network.state, "classifier.bias": bias}


@pytest.mark.parametrize("part", CHANGES)
def test_any_part_that_changes_is_computed_anew(
    part: str, make_cache: MakeCache, make_network: MakeNetwork, split: Split, network: Network
) -> None:
    cache = make_cache()
    before = cache.request(split, network, BOTH)
    other_split, other_network, layer = CHANGES[part](split, network, make_network)
    after = cache.request(other_split, other_network, (Features(layer), Logits()))
    assert cache.images_forwarded == len(split) + len(other_split)
    assert not files(after[Features(layer)]) & files(before[Features()])
    assert bool(files(after[Logits()]) & files(before[Logits()])) == (part == "layer")


def test_the_centre_of_whitening_is_a_part(make_network: MakeNetwork) -> None:
    one, other = zca(0), zca(1)
    networks = [make_network(**one), make_network(zca=one["zca"], zca_mean=other["zca_mean"])]
    assert networks[0].identity != networks[1].identity
    assert len(str(networks[0].identity)) < 1000, "the key is made of digests, not of megabytes"


def test_what_does_not_decide_the_rows_is_no_part(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    cache = make_cache()
    cache.request(split, network, BOTH)
    told_otherwise = replace(network, facts={"seconds": 3.0})
    same_rows = Split(split.images.clone(), split.labels, split.fingerprint)
    cache.request(same_rows, told_otherwise, BOTH)
    cache.logits(split, network)
    assert cache.images_forwarded == 37


def test_the_key() -> None:
    parts = {"a": 1, "b": [0.1, None], "c": {"x": "y"}}
    key = cache_key("features", parts)
    assert len(key) == 64
    assert key == cache_key("features", {"c": {"x": "y"}, "b": [0.1, None], "a": 1}), "order does not matter"
    changed = [
        cache_key("logits", parts),
        cache_key("features", {**parts, "a": 2}),
        cache_key("features", {**parts, "b": [math.nextafter(0.1, 1), None]}),
        cache_key("features", {**parts, "c": {"x": "z"}}),
        cache_key("features", {**parts, "d": None}),
    ]
    assert len({key, *changed}) == 6
    with pytest.raises(ValueError, match="JSON"):
        cache_key("features", {"a": math.nan})


def test_a_new_producer_does_not_serve_old_rows(
    make_cache: MakeCache, split: Split, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache().request(split, network, BOTH)
    monkeypatch.setattr(identity_module, "PRODUCER_VERSION", 10**6)
    cache = make_cache()
    cache.request(split, network, BOTH)
    assert cache.images_forwarded == 37


def test_what_makes_rows_and_what_trains_networks_have_versions_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Features that round otherwise do not cost the networks, and the other way round."""
    kinds = ("features", "statistics", "network", "trajectories")
    before = {kind: cache_key(kind, {}) for kind in kinds}
    with monkeypatch.context() as patch:
        patch.setattr(identity_module, "PRODUCER_VERSION", 10**6)
        assert {kind for kind in kinds if cache_key(kind, {}) != before[kind]} == {"features", "statistics"}
    monkeypatch.setitem(identity_module._OTHERS, "network", 10**6)
    assert {kind for kind in kinds if cache_key(kind, {}) != before[kind]} == {"network"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DISTILL_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/distill"),
        ({"HOME": "/home/user"}, "/home/user/.cache/distill"),
    ],
)
def test_the_folder(environment: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DISTILL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert default_folder() == Path(expected)


QUANTITIES: list[Stored | Statistics] = [
    *(Features(), Features("body.0"), Logits()),
    *(Gradients(Projection(kind=kind)) for kind in ("sparse", "fft", "kronecker")),
    *(Gradients(Projection(dim=8)), Gradients(Projection(seed=1)), Gradients(Projection(nonzeros=2))),
    *(Gradients(layers=("body.*",)), Gradients(of="margin")),
    *(GradientNorms(), GradientNorms(layers=("body.*",)), GradientNorms(of="margin")),
    *(Statistics(), Statistics(of="convolution"), Statistics(layers=("body.1",)), Statistics(per_class=True)),
]


def key(cache: Cache, quantity: Stored | Statistics, split: Split, network: Network) -> str:
    return cache_key(quantity.kind, cache._parts(quantity, split, network))


def test_every_option_of_a_quantity_is_a_part(make_cache: MakeCache, split: Split, network: Network) -> None:
    cache = make_cache()
    folders = {key(cache, quantity, split, network) for quantity in QUANTITIES}
    # The default projection is one of the three kinds.
    assert len(folders) == len(set(QUANTITIES)) == len(QUANTITIES)


ALIKE: list[tuple[Any, ...]] = [
    tuple(GradientNorms(layers=layers) for layers in (("*",), ("*", "body"), ("classifier", "body"))),
    tuple(
        Gradients(Projection(dim=8), layers=layers)
        for layers in (("body.[23]",), ("body.2.*", "body.3"), ("body.3.*", "body.2.weight", "body.2.bias"))
    ),
    tuple(
        Statistics(of="convolution", layers=layers) for layers in (("*",), ("body.2", "body.0"), ("body.?",))
    ),
]


@pytest.mark.parametrize("alike", ALIKE, ids=lambda alike: type(alike[0]).__name__)
def test_patterns_that_mean_the_same_share_one_answer(
    alike: tuple[Any, ...], make_cache: MakeCache, split: Split, network: Network
) -> None:
    cache = make_cache()
    first = cache.request(split, network, alike[:1])[alike[0]]
    assert cache.images_forwarded == 37
    others = cache.request(split, network, alike)
    assert cache.images_forwarded == 37
    assert list(others) == list(alike)
    for quantity in alike:
        if isinstance(quantity, Statistics):
            assert torch.equal(others[quantity]["body.0"].mean, first["body.0"].mean)
        else:
            assert files(others[quantity]) == files(first)
    kinds = [json.loads(path.read_text())["parts"] for path in cache.folder.rglob("manifest.json")]
    (told,) = [parts for parts in kinds if parts["kind"] == alike[0].kind]
    assert told["layers"] == list(alike[0].layers), "as it was asked"


def test_patterns_that_mean_something_else_are_told_apart(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    cache = make_cache()
    asked = [GradientNorms(), GradientNorms(layers=("body",)), GradientNorms(layers=("body.0",))]
    answers = cache.request(split, network, asked)
    values = [answers[each].read(slice(None)) for each in asked]
    assert (values[0] > values[1]).all() and (values[1] >= values[2]).all()
    assert not torch.equal(values[1], values[2])


@pytest.mark.parametrize("quantity", [Features(), Gradients(), GradientNorms(), Statistics()], ids=str)
def test_what_the_run_decides_is_a_part(
    quantity: Stored | Statistics,
    make_cache: MakeCache,
    split: Split,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = make_cache()
    folders = {key(cache, quantity, split, network)}
    cache.device = torch.device("meta")  # another kind of device rounds otherwise
    folders.add(key(cache, quantity, split, network))
    cache.device = torch.device("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "SHARD_ROWS", 8)
        folders.add(key(cache, quantity, split, network))
    assert len(folders) == 3
    blocks = key(make_cache(limits=Limits(work_bytes=1 << 20)), quantity, split, network)
    assert (blocks in folders) == (not isinstance(quantity, Gradients | GradientNorms))
    borne = key(make_cache(limits=Limits(non_finite=0.5), host_bytes=0), quantity, split, network)
    assert borne in folders


def test_what_cannot_be_seen_in_a_network_is_a_part(make_network: MakeNetwork) -> None:
    """Modules of two definitions may print alike and hold the same numbers, and yet compute something else."""
    network = make_network()
    other = network.model.model_copy(update={"depth": 2})  # what null means for these images
    assert digest(replace(network, model=other).module(CPU)) == digest(network.module(CPU))
    assert replace(network, model=other).identity != network.identity
    assert replace(network, state=dict(network.state)).identity == network.identity
