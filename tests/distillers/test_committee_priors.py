"""The procedure that measures priors: whose images, labels and temperature a student gets, and where it is tested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from distill.cache.networks import Network
from distill.contracts import Context, Source
from distill.distillers.committee_priors import PriorConfig, measure_priors
from distill.labels.pool import PoolTeacher, open_pool
from distill.models import model_config
from distill.recovery.recover import Recovery
from distill.training.engine import Engine
from distill.training.job import Job, Trained

MakeContext = Callable[..., Context]
TEACHERS = [
    PoolTeacher.model_validate(
        {"model": {"name": "convnet", "width": width, "norm": "batch"}, "train": {"epochs": 1}}
    )
    for width in (4, 6)
]
TRAIN = {"epochs": 2, "batch_size": 6, "augment": "crop"}


@pytest.fixture
def engine_gave(monkeypatch: pytest.MonkeyPatch) -> list[Trained]:
    """Every network that was trained, in order."""
    given: list[Trained] = []
    train = Engine.train

    def keeping(self: Engine, asked: Sequence[Job], **options: Any) -> list[Trained]:
        made = train(self, asked, **options)
        given.extend(made)
        return made

    monkeypatch.setattr(Engine, "train", keeping)
    return given


def measure(
    ctx: Context, source: Source, networks: list[Network], *, iterations: int = 3, ipc: int = 2
) -> tuple[float, ...]:
    how = PriorConfig(
        ipc=ipc, iterations=iterations, epochs=2, student=model_config({"name": "convnet", "width": 4})
    )
    recovery = Recovery(augment="none", iterations=50, segments=2, sizes=(8, 8))
    return measure_priors(ctx, source, networks, ["a", "b"], how, recovery, 7.0)


def test_students_learn_each_teachers_images_and_labels(
    source: Source, make_context: MakeContext, trained: list[Job]
) -> None:
    """Recovered by this teacher, labelled by it alone, softened by the temperature of the labels."""
    ctx = make_context(**TRAIN)
    networks = open_pool(ctx, source, TEACHERS)
    del trained[:]
    measure(ctx, source, networks)
    real = {image.numpy().tobytes() for image in source.train.images}
    assert [job.label for job in trained] == ["the prior's student of a", "the prior's student of b"]
    for job, network in zip(trained, networks, strict=True):
        assert job.pool.images.shape == (6, 1, 8, 8) and job.pool.targets.tolist() == [0, 0, 1, 1, 2, 2]
        assert not any(image.numpy().tobytes() in real for image in job.pool.images)
        assert job.config.epochs == 2 and job.config.temperature == 7.0
        labels: Any = job.pool.views
        assert labels.ensemble.networks == (network,) and labels.ensemble.weights == (1.0,)
        assert labels.ensemble.temperature == 7.0
    first, second = trained
    assert not torch.equal(first.pool.images, second.pool.images)
    assert first.seed == second.seed and first.pool.views.plan == second.pool.views.plan  # type: ignore[union-attr]


def test_without_steps_students_learn_real_images(
    source: Source, make_context: MakeContext, trained: list[Job]
) -> None:
    """Classes of fewer images than asked for give what they have."""
    ctx = make_context(**TRAIN)
    networks = open_pool(ctx, source, TEACHERS)
    del trained[:]
    measure(ctx, source, networks, iterations=0, ipc=10)
    real = sorted(image.numpy().tobytes() for image in source.train.images)
    for job in trained:
        assert sorted(image.numpy().tobytes() for image in job.pool.images) == real


def test_priors_are_percent_on_the_validation_split(
    source: Source, make_context: MakeContext, trained: list[Job], engine_gave: list[Trained]
) -> None:
    ctx = make_context(**TRAIN)
    networks = open_pool(ctx, source, TEACHERS)
    del trained[:], engine_gave[:]
    priors = measure(ctx, source, networks)
    assert priors == tuple(100 * each.accuracy for each in engine_gave if each.accuracy is not None)
    assert len(priors) == 2 and max(priors) > 1
    for job in trained:
        assert job.test is not None
        assert torch.equal(job.test.images, source.valid.images)
        assert torch.equal(job.test.targets, source.valid.labels)
