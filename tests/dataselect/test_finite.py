"""Samples without finite features: no selector picks them, and each says so where the others are too few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.cache.rows import StoredRows
from distill.contracts import Context, Selection, Source
from distill.data import with_target
from distill.errors import InputError
from distill.registry import methods

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 1, "batch_size": 16}}
BY_CLASS = [
    "kcenter",
    "herding",
    "kmeans",
    "semdedup",
    "facility_location",
    "graph_cut",
    "craig",
    "gradmatch",
]
BY_CLASS += ["glister", "d2"]
TARGETED = ["simcore", "tarot", "importance", "trak", "less"]
LOST = 5  # the sample of class two whose features are lost


def options(method: str, images: int) -> Mapping[str, Any]:
    """So many images of each of three classes, or three times as many of all."""
    wanted: dict[str, Any] = {"count": 3 * images} if method in TARGETED else {"ipc": images}
    wanted["network"] = NETWORK
    if method == "simcore":
        wanted |= {"trained_on": "source", "centroids": 3}
    if method in ("trak", "less"):
        wanted["checkpoints"] = 1
    return wanted


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch, make_source: Callable[..., Source]) -> Source:
    """A source of 3 x 8 samples of which the cache says that one has no values; and a target."""

    def absent(rows: StoredRows) -> Tensor:
        return torch.tensor([LOST] if len(rows) == 24 else [], dtype=torch.int64)

    monkeypatch.setattr(StoredRows, "absent", absent)
    return with_target(make_source(), make_source((4, 4, 4)))


def run(method: str, images: int, ctx: Context, source: Source) -> Selection:
    cls = methods()[method].load()
    step = cls(cls.Config.model_validate(options(method, images)))
    step.check(source, None)
    found = step.run(ctx, source, None)
    assert isinstance(found, Selection)
    return found


@pytest.mark.parametrize("method", [*BY_CLASS, *TARGETED])
def test_a_sample_without_features_is_left_out(
    method: str, lossy: Source, make_context: Callable[..., Context]
) -> None:
    """Seven of each class are asked for; one class has no more than that."""
    found = run(method, 7, make_context(), lossy)
    assert LOST not in found.indices
    assert len(found.indices) == 21


@pytest.mark.parametrize("method", [*BY_CLASS, *TARGETED])
def test_a_budget_that_needs_it_is_refused(
    method: str, lossy: Source, make_context: Callable[..., Context]
) -> None:
    with pytest.raises(InputError, match="have NaN or infinite features") as caught:
        run(method, 8, make_context(), lossy)
    assert "budget of at most" in str(caught.value.allowed)


def test_pixels_are_always_finite(lossy: Source, make_context: Callable[..., Context]) -> None:
    cls = methods()["kcenter"].load()
    step = cls(cls.Config(ipc=8, features="pixels"))
    assert len(step.run(make_context(), lossy, None).indices) == 24
