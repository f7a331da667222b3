"""A tiny split, a tiny network, and caches whose shards hold 16 rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import cache as cache_module
from distill.cache import Cache, Features, Logits, Network, rows, shards
from distill.contracts import Preprocessing, Split
from distill.models import build, model_config

ROWS = 37
SHARD_ROWS = 16
BOTH = (Features(), Logits())


class Told:
    """A `Progress` that remembers warnings and notes."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def task(self, title: str, *, total: int | None = None, unit: str = "") -> AbstractContextManager[Told]:
        return nullcontext(self)

    def advance(self, count: int = 1) -> None:
        pass

    def note(self, text: str, **facts: Any) -> None:
        self.notes.append(text)

    def warn(self, text: str, **facts: Any) -> None:
        self.warnings.append(text)

    def record(self, event: str, **facts: Any) -> None:
        pass


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shards, rows, cache_module):
        monkeypatch.setattr(module, "SHARD_ROWS", SHARD_ROWS)
    monkeypatch.setattr(cache_module.forward, "FORWARD_ROWS", 8)


@pytest.fixture
def make_split() -> Callable[..., Split]:
    def make(rows: int = ROWS, seed: int = 0) -> Split:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (rows, 2, 8, 8), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 3, (rows,), generator=generator)
        whole = images.numpy().tobytes() + labels.numpy().tobytes()
        return Split(images, labels, hashlib.sha256(whole).hexdigest())

    return make


@pytest.fixture
def split(make_split: Callable[..., Split]) -> Split:
    return make_split()


@pytest.fixture
def make_network() -> Callable[..., Network]:
    def make(
        model: Any = "convnet",
        *,
        seed: int = 0,
        mean: tuple[float, float] = (0.4, 0.5),
        std: tuple[float, float] = (0.2, 0.3),
        **preprocessing: Any,
    ) -> Network:
        config = model_config({"name": "convnet", "width": 4} if model == "convnet" else model)
        state = build(config, image_shape=(2, 8, 8), classes=3, seed=seed).state_dict()
        return Network(config, (2, 8, 8), 3, Preprocessing(mean, std, **preprocessing), state, facts={})

    return make


@pytest.fixture
def network(make_network: Callable[..., Network]) -> Network:
    return make_network()


@pytest.fixture
def make_cache(tmp_path: Path, told: Told) -> Callable[..., Cache]:
    """A new object on the same folder at each call, as a later run has it."""
    folder = tmp_path / "cache"
    return lambda **options: Cache(folder, device=torch.device("cpu"), progress=told, **options)
