"""Selecting, selecting again and labelling cost one forward pass over the source."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import distill
from distill.cache import forward
from distill.contracts import Split
from distill.models.base import Classifier

NETWORK = {"model": {"name": "mlp", "width": 8}, "train": {"epochs": 1}}
RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "cap": 40},
    "train": {"epochs": 1, "batch_size": 20, "augment": "crop"},
    "steps": [
        {"kcenter": {"ipc": 6, "network": NETWORK}},
        {"herding": {"ipc": 3, "network": NETWORK}},
        {"soft_label": {"teacher": NETWORK}},
    ],
    "evaluate": {"students": [{"name": "mlp", "width": 8}], "seeds": 2, "against": []},
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which split went forward through a frozen network, and how many of its images."""
    seen: list[tuple[str, int]] = []
    over = forward.Forward.over

    def noting(self: forward.Forward, split: Split, span: range, **options: Any) -> Any:
        seen.append((split.fingerprint, len(span)))
        return over(self, split, span, **options)

    monkeypatch.setattr(forward.Forward, "over", noting)
    return seen


@pytest.fixture
def forwarded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images that frozen networks were given, whoever asked: students and teachers in training are not frozen."""
    seen: list[int] = []
    whole = Classifier.forward

    def noting(self: Classifier, x: Tensor) -> Tensor:
        if not any(value.requires_grad for value in self.parameters()) and not torch.is_grad_enabled():
            seen.append(len(x))
        return whole(self, x)

    monkeypatch.setattr(Classifier, "forward", noting)
    return seen


def test_three_steps_cost_one_pass(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[tuple[str, int]],
    forwarded: list[int],
) -> None:
    monkeypatch.setenv("DISTILL_WORKERS", "1")
    recipe = {**RECIPE, "cache": {"folder": str(tmp_path / "cache")}}
    distill.run(recipe, out=tmp_path / "first", quiet=True)
    images = 360  # 40 of each of 10 classes, less a tenth for validation
    source = max(passes, key=lambda each: each[1])[0]
    assert sum(count for split, count in passes if split == source) == images
    assert sum(forwarded) == images + 30, "the source once, and the set's own images for its labels"
    passes.clear()
    distill.run(recipe, out=tmp_path / "second", quiet=True)
    assert source not in {split for split, _ in passes}, "a later run finds everything"
    assert (tmp_path / "first" / "set.h5").read_bytes() == (tmp_path / "second" / "set.h5").read_bytes()


def test_every_step_is_charged_for_the_pass_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it: a step before, or an earlier run."""
    monkeypatch.setenv("DISTILL_WORKERS", "1")
    over = forward.Forward.over

    def slowly(self: forward.Forward, split: Split, span: range, **options: Any) -> Any:
        time.sleep(1.0)
        return over(self, split, span, **options)

    monkeypatch.setattr(forward.Forward, "over", slowly)
    recipe = {**RECIPE, "steps": RECIPE["steps"][:2], "cache": {"folder": str(tmp_path / "cache")}}
    first = distill.run(recipe, out=tmp_path / "first", quiet=True).evaluation.cost
    assert first["selector kcenter"].seconds > 1 and not first["selector kcenter"].cached
    assert first["selector herding"].seconds > 1 and first["selector herding"].cached
    second = distill.run(recipe, out=tmp_path / "second", quiet=True).evaluation.cost
    for step in ("selector kcenter", "selector herding"):
        assert second[step].seconds > 1 and second[step].cached
