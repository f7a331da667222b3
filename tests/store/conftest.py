"""Sets of every kind that the store must hold, and what it means that two are the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet, Preprocessing, Selection
from distill.labels.codecs import encode
from distill.store.writer import write_set
from distill.training.config import TrainConfig


def plain_set() -> DistilledSet:
    """uint8, two channels, hard labels only."""
    draw = torch.Generator().manual_seed(0)
    return DistilledSet(
        images=torch.randint(0, 256, (6, 2, 4, 5), dtype=torch.uint8, generator=draw),
        labels=torch.tensor([0, 1, 2, 0, 1, 2]),
        classes=("cat", "größer", "\udc80\x1b[2J"),
        preprocessing=Preprocessing(mean=(0.1, 1 / 3), std=(0.3, 0.25)),
        train=TrainConfig(),
    )


def full_set() -> DistilledSet:
    """float16 pixels, ZCA, two soft label sets, a selection and provenance."""
    draw = torch.Generator().manual_seed(1)
    matrix = torch.randn(40, 40, generator=draw)
    return replace(
        plain_set(),
        images=torch.randn(6, 2, 4, 5, generator=draw).half(),
        preprocessing=Preprocessing(
            mean=(0.1, 1 / 3),
            std=(0.3, 0.25),
            zca=matrix.numpy(),
            zca_inverse=torch.linalg.inv(matrix).numpy(),
            zca_mean=torch.randn(40, generator=draw).numpy(),
        ),
        train=TrainConfig(lr=0.1 + 0.2, epochs=7, temperature=4.0, augment="crop"),
        soft=encode(
            torch.randn(2, 6, 3, generator=draw), codec="full", temperature=4, teacher="convnet", epochs=3
        ),
        selection=Selection(
            indices=np.array([9, 2, 7, 0, 5, 3]),
            weights=np.array([0.5, 1.5, 1, 1, 0.25, 1.75], dtype=np.float32),
            scores=np.array([np.inf, 3, 2, 1, 0.5, 0.25], dtype=np.float32),
            meta={"score": "distance to the nearest pick"},
            rows=np.array([19, 4, 15, 0, 11, 6]),
        ),
        provenance={
            "seed": 0,
            "recipe": {"steps": [{"kcenter": {"ipc": 2}}]},
            "revision": None,
            "rate": 1e-3,
        },
    )


@pytest.fixture
def plain() -> DistilledSet:
    return plain_set()


@pytest.fixture
def full() -> DistilledSet:
    return full_set()


@pytest.fixture(params=[plain_set, full_set], ids=["plain", "full"])
def any_set(request: pytest.FixtureRequest) -> DistilledSet:
    distilled: DistilledSet = request.param()
    return distilled


@pytest.fixture
def file(full: DistilledSet, tmp_path: Path) -> Path:
    """The full set, written."""
    path = tmp_path / "set.h5"
    write_set(full, path)
    return path


@pytest.fixture(scope="module")
def file_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `write_set` makes of the full set."""
    path = tmp_path_factory.mktemp("store") / "set.h5"
    write_set(full_set(), path)
    return path.read_bytes()


def assert_same_array(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()


def assert_same_set(a: DistilledSet, b: DistilledSet) -> None:
    """Bitwise equality of every part."""
    assert_same_array(a.images, b.images)
    assert_same_array(a.labels, b.labels)
    assert (a.classes, a.train, dict(a.provenance)) == (b.classes, b.train, dict(b.provenance))
    assert (a.preprocessing.mean, a.preprocessing.std) == (b.preprocessing.mean, b.preprocessing.std)
    for name in ("zca", "zca_inverse", "zca_mean"):
        assert_same_array(getattr(a.preprocessing, name), getattr(b.preprocessing, name))
    assert (a.soft is None, a.selection is None) == (b.soft is None, b.selection is None)
    if a.soft and b.soft:
        assert (a.soft.codec, a.soft.attributes) == (b.soft.codec, b.soft.attributes)
        assert a.soft.arrays.keys() == b.soft.arrays.keys()
        for name, array in a.soft.arrays.items():
            assert_same_array(array, b.soft.arrays[name])
    if a.selection and b.selection:
        assert a.selection.meta == b.selection.meta
        assert (a.selection.rows is None) == (b.selection.rows is None)
        for name in ("indices", "weights", "scores", "rows"):
            assert_same_array(getattr(a.selection, name), getattr(b.selection, name))


@pytest.fixture(scope="module")
def full_reference() -> DistilledSet:
    """The full set once a module, for tests that run many examples."""
    return full_set()


@pytest.fixture(scope="session")
def same() -> Callable[[DistilledSet, DistilledSet], None]:
    return assert_same_set
