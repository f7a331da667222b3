"""What students of one outer step find, against a plain loop over what they are to follow; float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from distill.cache.trajectories import Layout, Trajectories
from distill.matching.gradient import Learned, Matched, match
from distill.matching.networks import FlatNetworks
from distill.matching.steps import InnerSteps
from distill.matching.students import Students
from distill.matching.windows import StartEpochs
from distill.models import build, model_config

CPU = torch.device("cpu")
EXPERTS, EPOCHS, CLASSES, SAMPLES, SIZE = 3, 7, 3, 5, 8
COVERED, STEPS, BATCH = 2, 4, 3


class Doubled(Trajectories):
    """Checkpoints in float64."""

    def read(self, expert: int, checkpoint: int) -> Tensor:
        return super().read(expert, checkpoint).double()


@pytest.fixture
def make_students(tmp_path: Path) -> Callable[..., Students]:
    def make(count: int, *, stacked: bool = False) -> Students:
        config = model_config({"name": "convnet", "width": 4})
        module = build(config, image_shape=(1, SIZE, SIZE), classes=CLASSES, seed=0).double()
        layout = Layout.of(module, range(EPOCHS))
        draws = np.random.default_rng(1)
        weights = 0.3 * draws.standard_normal((EXPERTS, EPOCHS, layout.parameters))
        np.save(tmp_path / "weights.npy", weights.astype("<f4"))
        return Students(
            networks=FlatNetworks(module, layout),
            experts=Doubled(tmp_path / "weights.npy", layout, EXPERTS),
            count=count,
            epochs=COVERED,
            start=StartEpochs(first=1, last=4),
            steps=STEPS,
            batch=BATCH,
            augment="dsa",
            gradient="exact",
            segment=1,
            seed=4,
            device=CPU,
            stacked=stacked,
        )

    return make


@pytest.fixture
def learned() -> Learned:
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 1, SIZE, SIZE, generator=draws, dtype=torch.float64)
    logits = torch.randn(SAMPLES, CLASSES, generator=draws, dtype=torch.float64)
    return Learned(images, logits, torch.tensor(0.05, dtype=torch.float64), learns_labels=True)


def plain(students: Students, step: int, learned: Learned, *, own_labels: bool) -> list[Matched]:
    """Student by student: from its start, with its batches and views, towards the checkpoint M epochs later."""
    found = []
    for draw in students.draws(step):
        start = students.experts.read(draw.expert, draw.start)
        target = students.experts.read(draw.expert, draw.start + COVERED)
        targets = learned.targets
        if own_labels:
            named = students.networks.layout.views(target)
            targets = functional_call(students.networks.module, named, (learned.images,)).detach()
        steps = InnerSteps(
            STEPS,
            seeds=[draw.seed],
            samples=SAMPLES,
            batch=BATCH,
            augment="dsa",
            size=(SIZE, SIZE),
            device=CPU,
        )
        found.append(
            match(
                students.networks,
                steps,
                replace(learned, targets=targets, learns_labels=not own_labels),
                start=start[None],
                target=target[None],
            )
        )
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["one by one", "stacked"])
@pytest.mark.parametrize("own_labels", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_mean_of_what_each_finds(
    make_students: Callable[..., Students], learned: Learned, count: int, own_labels: bool, stacked: bool
) -> None:
    students = make_students(count, stacked=stacked)
    if own_labels:
        learned = replace(learned, learns_labels=False)
    for step in (0, 5):
        got = students.match(step, learned, own_labels=own_labels)
        parts = plain(students, step, learned, own_labels=own_labels)
        expected = [torch.stack([getattr(part, name) for part in parts]).mean(0) for name in ("images", "lr")]
        close = {"rtol": 1e-9, "atol": 1e-12}
        torch.testing.assert_close(got.loss, torch.cat([part.loss for part in parts]), **close)
        torch.testing.assert_close([got.images, got.lr], expected, **close)
        assert (got.labels is None) == own_labels
        if got.labels is not None:
            labels = [part.labels for part in parts if part.labels is not None]
            torch.testing.assert_close(got.labels, torch.stack(labels).mean(0), **close)


def test_the_steps_above_are_of_several_experts_and_starts(make_students: Callable[..., Students]) -> None:
    """Otherwise a student that always follows the same piece would pass."""
    draws = [draw for step in (0, 5) for draw in make_students(3).draws(step)]
    assert len({draw.expert for draw in draws}) == 3
    assert len({draw.start for draw in draws} - {0}) > 1
