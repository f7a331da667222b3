"""Priors of a committee: what the images and labels of one teacher alone teach a student.

The procedure, for every teacher: `ipc` random real images a class, `iterations` steps of recovery by this teacher,
its labels on every view, a student of `epochs` epochs, and the student's accuracy on the validation split, in percent.
All teachers' students share seeds. Cui et al. (2025) take whole distillations and accuracies on test; this takes
minutes, sees no test image, and its seconds are told and count towards the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
from pydantic import Field

from distill.cache import Network
from distill.contracts import Context, Passes, Preprocessing, Selection, Source, Training
from distill.labels.ensemble import Ensemble
from distill.labels.pool import PoolTeacher
from distill.labels.relabel import Relabelling
from distill.labels.view_labels import OnlineLabels
from distill.models import ModelSpec, model_config
from distill.recovery.initial import given
from distill.recovery.objective import Judge
from distill.recovery.recover import Recovery, groups_of, recover
from distill.selection import materialise, random_subset, source_counts
from distill.training.config import Strict, TrainConfig
from distill.training.job import Job, Pool

Count = Annotated[int, Field(ge=1)]


class PriorConfig(Strict):
    """How priors are measured: images a class, steps of recovery, the student and its epochs."""

    ipc: Count = 10
    iterations: Annotated[int, Field(ge=0)] = 100
    student: ModelSpec = Field(default_factory=lambda: model_config("convnet"))
    epochs: Count = 100


def prior_trainings(
    teachers: Sequence[PoolTeacher], how: PriorConfig, *, classes: int
) -> tuple[Training, ...]:
    """The students, one a teacher, for a dry run."""
    train = TrainConfig(epochs=how.epochs)
    return tuple(Training(how.student, train, how.ipc * classes, checkpoints=0) for _ in teachers)


def prior_passes(teachers: Sequence[PoolTeacher], how: PriorConfig, *, classes: int) -> list[Passes]:
    """Recovery by each teacher and its labels, for a dry run."""
    images = how.ipc * classes
    return [
        Passes(teacher.model, batch=images, count=3 * how.iterations + how.epochs, kept=2)
        for teacher in teachers
    ]


def measure_priors(
    ctx: Context,
    source: Source,
    networks: Sequence[Network],
    names: Sequence[str],
    how: PriorConfig,
    recovery: Recovery,
    temperature: float,
) -> tuple[float, ...]:
    """The accuracy of each teacher's student on the validation split, percent.

    Args:
        ctx, source: of the run; the validation split is not empty.
        networks, names: the teachers.
        how: the procedure.
        recovery: what else recovery is told.
        temperature: of the labels.
    """
    preprocessing = Preprocessing(source.mean, source.std)
    config = recovery.model_copy(update={"iterations": how.iterations, "segments": 1, "sizes": ()})
    budget = np.minimum(source_counts(source), how.ipc)
    chosen = random_subset(source, budget, seed=ctx.derive("prior images"))
    ones = np.ones(len(chosen), dtype=np.float32)
    plain = materialise(Selection(chosen, ones, ones), source, ctx.train)
    initial = given(plain.images, preprocessing, ctx.device)
    train = ctx.train.model_copy(
        update={"epochs": how.epochs, "warmup_epochs": 0.0, "temperature": temperature}
    )
    valid = Pool(source.valid.images, source.valid.labels, preprocessing)
    jobs = []
    for number, (network, name) in enumerate(zip(networks, names, strict=True)):
        judges = [
            Judge(network, name, preprocessing=preprocessing, device=ctx.device, statistics=config.statistics)
        ]
        groups = groups_of(plain.labels.tolist(), lambda _: ((0, 1.0),), classwise=False)
        folder = replace(ctx, scratch=ctx.scratch / f"prior-{number}")
        images = recover(folder, initial, plain.labels, groups, judges, config, preprocessing=preprocessing)
        ensemble = Ensemble((network,), (1.0,), temperature, preprocessing, micro_batches=train.micro_batches)
        plan = Relabelling().plan(train, seed=ctx.derive("prior views"))
        labels = OnlineLabels(plan, ensemble, plain.labels)
        jobs.append(
            Job(
                model=how.student,
                classes=len(source.classes),
                config=train,
                pool=Pool(images, plain.labels, preprocessing, labels),
                seed=ctx.derive("prior student"),
                test=valid,
                label=f"the prior's student of {name}",
            )
        )
    trained = ctx.engine.train(jobs, title="students for priors")
    return tuple(100 * (each.accuracy or 0.0) for each in trained)
