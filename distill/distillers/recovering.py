"""What distillers share that recover images from teachers and have them labelled by the same teachers.

Teachers are trained (squeeze), images learned until the teachers that vote on them take them for their classes and know
their statistics (recover: distill/recovery/), and every view that students will see is labelled by all teachers
(relabel: distill/labels/). Equations at the head of distill/recovery/objective.py, voting.py and labels/ensemble.py. A
distiller says where images begin, and which of their pixels may move.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.cache import Network
from distill.cache.quantities import Statistics
from distill.contracts import (
    Context,
    DistilledSet,
    Estimate,
    Passes,
    Preprocessing,
    Selection,
    Source,
    StepKind,
)
from distill.distillers.committee_priors import PriorConfig, measure_priors, prior_passes, prior_trainings
from distill.errors import InputError
from distill.files import write_bytes_atomically
from distill.labels.ensemble import names_of, refuse_without_batch_norm
from distill.labels.labelling import with_labels
from distill.labels.pool import PoolTeacher, estimated, open_pool, outlines
from distill.labels.relabel import Relabelling, placed
from distill.recovery.initial import Initial, crop_passes, given, refuse_mosaics
from distill.recovery.objective import Judge
from distill.recovery.recover import Group, Mask, Recovery, groups_of, recover, refuse_sizes
from distill.recovery.voting import Voters, Voting, draw_voters, prior_weights, voices
from distill.selection import Distiller, ImagesConfig, images_before
from distill.training.config import Positive, Share, TrainConfig

Count = Annotated[int, Field(ge=1)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class RecoveringConfig(ImagesConfig):
    """Options of every distiller that recovers.

    `teachers` label together, and `drawn` of them, or all where they are fewer, judge an image. `priors` are
    accuracies in percent: given, the teachers' own on the validation split (`valid`), or measured by what each
    teacher's images teach (`measured`, see `prior`). `init` and what follows says where images begin.
    """

    teachers: Annotated[tuple[PoolTeacher, ...], Field(min_length=1)]
    drawn: Count = 2
    voting: Voting = "prior"
    voting_temperature: Positive = 5.0
    priors: Literal["measured", "valid"] | tuple[Percent, ...] = "measured"
    prior: PriorConfig = PriorConfig()
    recover: Recovery = Recovery()
    relabel: Relabelling | None = Relabelling()
    label_weights: Literal["prior", "equal"] = "prior"
    label_weights_temperature: Positive = 10.0
    temperature: Positive = 20.0
    init: str = "real"
    factor: Count = 1
    candidates: Count = 300
    crops: Count = 5
    crop_scale: Share = 0.08

    @model_validator(mode="after")
    def _priors_are_of_teachers(self) -> Self:
        if isinstance(self.priors, tuple) and len(self.priors) != len(self.teachers):
            raise ValueError(f"priors has {len(self.priors)} numbers for {len(self.teachers)} teachers")
        return self

    @property
    def needs_priors(self) -> bool:
        """Whether anything depends on them."""
        weighed = self.voting == "prior" and self.drawn > 1 and self.recover.voters == "all"
        chosen = self.drawn < len(self.teachers) and self.ipc in (1, None)  # one image: of the greatest
        votes = self.recover.iterations > 0 and (weighed or chosen)
        labels = self.relabel is not None and self.label_weights == "prior"
        return len(self.teachers) > 1 and (votes or labels)


class Recovering(Distiller):
    """A distiller whose images are recovered from teachers. A subclass has `crops`, and may have `mask`."""

    lacks = "does not know how many images to recover"
    takes = "begins with"
    Config: ClassVar[type[RecoveringConfig]]
    config: RecoveringConfig

    @property
    def asks_teachers(self) -> bool:
        return self.config.relabel is not None

    @property
    def looks_for_crops(self) -> bool:
        """Whether its images begin as crops that it looks for."""
        return self.config.init not in ("real", "noise") and self.config.ipc is not None

    def check_place(self, follows: StepKind | None) -> None:
        super().check_place(follows)
        if follows is not None and "init" in self.config.model_fields_set and self.config.init != "real":
            raise InputError(
                f"{self.name} begins with the images of the step before, and init asks for others",
                found=f"init: {self.config.init}",
                fix="remove init, or remove the step before",
            )

    def check_files(self) -> None:
        if self.config.relabel is not None:
            with placed("relabel"):
                self.config.relabel.check_files()

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        asked = self.config
        if asked.needs_priors and not isinstance(asked.priors, tuple) and not len(source.valid):
            raise InputError(
                "priors are measured on the validation split, and it is empty",
                where="priors",
                found="data.valid: 0",
                fix="set data.valid, such as 0.1, or give priors as numbers",
            )
        if self.looks_for_crops and asked.ipc is not None:
            refuse_mosaics(source, asked.ipc, asked.factor)
        networks = outlines(asked.teachers, source)
        refuse_sizes(networks, asked.recover, source.image_shape[0])
        if asked.recover.iterations and asked.recover.statistics:
            refuse_without_batch_norm(networks, where="recover.statistics", fix="set recover.statistics: 0")
        if asked.relabel is not None:
            with placed("relabel"):
                asked.relabel.check_teachers(
                    networks, classes=len(source.classes), image_shape=source.image_shape
                )
                asked.relabel.check_trainings([teacher.train for teacher in asked.teachers])

    def check_training(self, train: TrainConfig, *, classes: int) -> None:
        if self.config.relabel is not None:
            with placed("relabel"):
                self.config.relabel.check(train, classes=classes)
                if self.config.ipc is not None:
                    self.config.relabel.refuse_lonely_images(train, self.config.ipc * classes)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        asked = self.config
        images = self.images(classes=classes, before=before)
        batch = min(asked.recover.batch, images)
        judges = 1 if asked.recover.voters == "turns" else min(asked.drawn, len(asked.teachers))
        steps = asked.recover.iterations * -(-images // batch) * judges
        passes = [
            Passes(teacher.model, batch=batch, count=3 * steps // len(asked.teachers), kept=2)
            for teacher in asked.teachers
        ]
        if self.looks_for_crops and asked.ipc is not None:
            candidates = max(asked.candidates, asked.ipc * asked.factor**2)
            passes += crop_passes(asked.teachers, self.looks(candidates) * classes)
        trainings = estimated(asked.teachers, train)
        if asked.needs_priors and asked.priors == "measured":
            passes += prior_passes(asked.teachers, asked.prior, classes=classes)
            trainings += prior_trainings(asked.teachers, asked.prior, classes=classes)
        models = [teacher.model for teacher in asked.teachers]
        if asked.relabel is not None:
            passes += asked.relabel.fit_passes(models)
        return Estimate(
            images=images,
            trainings=trainings,
            passes=tuple(passes),
            labelling=None if asked.relabel is None else asked.relabel.estimate(models, classes=classes),
        )

    @abstractmethod
    def crops(self, ctx: Context, source: Source, networks: Sequence[Network]) -> Tensor:
        """The crops that images begin as, uint8 (N, Ch, H, W) on the host, class by class; see `looks_for_crops`."""

    @abstractmethod
    def looks(self, candidates: int) -> int:
        """How many crops teachers look at among so many candidate images, for a dry run."""

    def initial(
        self,
        ctx: Context,
        source: Source,
        previous: DistilledSet | Selection | None,
        networks: Sequence[Network],
    ) -> tuple[DistilledSet, Initial]:
        """A set of the right classes, and where its images begin."""
        plain = images_before(self, ctx, source, previous)
        if not self.looks_for_crops:
            return plain, given(plain.images, plain.preprocessing, ctx.device)
        images = self.crops(ctx, source, networks)
        return replace(plain, selection=None), given(images, plain.preprocessing, ctx.device)

    def mask(
        self, ctx: Context, networks: Sequence[Network], plain: DistilledSet, initial: Initial
    ) -> Mask | None:
        """What tells which pixels of these images may move; None where all may."""
        return None

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> DistilledSet:
        asked = self.config
        checkpoints = 1 if asked.relabel is None else asked.relabel.checkpoints
        networks = open_pool(ctx, source, asked.teachers, checkpoints=checkpoints)
        names = names_of(networks)
        plain, initial = self.initial(ctx, source, previous, networks)
        mask = self.mask(ctx, networks, plain, initial) if asked.recover.iterations else None
        priors = self._priors(ctx, source, networks, names)
        plain = self._images(ctx, source, plain, initial, mask, networks, names, priors)
        if asked.relabel is None:
            return plain
        # The step before may have changed the training.
        asked.relabel.check(plain.train, classes=len(source.classes))
        weights = (1 / len(networks),) * len(networks)
        if asked.label_weights == "prior":
            weights = prior_weights(priors, temperature=asked.label_weights_temperature)
        return with_labels(
            ctx,
            source,
            plain,
            asked.teachers,
            networks,
            weights,
            asked.relabel,
            temperature=asked.temperature,
        )

    def _priors(
        self, ctx: Context, source: Source, networks: Sequence[Network], names: Sequence[str]
    ) -> tuple[float, ...]:
        """Accuracies in percent, one a teacher; 0 where nothing depends on them."""
        asked = self.config
        if not asked.needs_priors:
            return (0.0,) * len(networks)
        if isinstance(asked.priors, tuple):
            return asked.priors
        kept = ctx.scratch / "priors.json"
        if kept.exists():
            return tuple(json.loads(kept.read_text()))
        began = time.perf_counter()
        if asked.priors == "valid":
            found = tuple(100 * network.facts["valid_accuracy"] for network in networks)
        else:
            found = measure_priors(
                ctx, source, networks, names, asked.prior, asked.recover, asked.temperature
            )
        seconds = time.perf_counter() - began
        told = ", ".join(f"{name} {prior:.1f}" for name, prior in zip(names, found, strict=True))
        ctx.progress.note(f"priors: {told} ({seconds:.0f} s)", priors=list(found), seconds=seconds)
        # What is learned and labelled after an interruption must go by the same ones to the last bit.
        write_bytes_atomically(kept, json.dumps(found).encode())
        return found

    def _images(
        self,
        ctx: Context,
        source: Source,
        plain: DistilledSet,
        initial: Initial,
        mask: Mask | None,
        networks: Sequence[Network],
        names: Sequence[str],
        priors: Sequence[float],
    ) -> DistilledSet:
        """The recovered images with their classes."""
        asked = self.config
        preprocessing = plain.preprocessing
        judges = judges_of(ctx, source, networks, names, asked.recover, preprocessing)
        ipc = int(torch.bincount(plain.labels).max())
        groups = self._groups(ctx, plain.labels, ipc, priors)
        images = recover(
            ctx,
            initial,
            plain.labels,
            groups,
            judges,
            asked.recover,
            preprocessing=preprocessing,
            mask=mask,
        )
        learned = asked.recover.iterations > 0 or plain.selection is None
        return replace(
            plain,
            images=images,
            soft=None if learned else plain.soft,
            selection=None if learned else plain.selection,
            provenance={"teachers": list(names), "priors": list(priors)},
        )

    def _groups(self, ctx: Context, labels: Tensor, ipc: int, priors: Sequence[float]) -> list[Group]:
        asked = self.config
        drawn = min(asked.drawn, len(priors))
        seed = ctx.derive("voting")

        def voters(number: int) -> Voters:
            teachers = draw_voters(number, ipc=ipc, priors=priors, drawn=drawn, seed=seed)
            return voices(
                teachers,
                asked.voting,
                priors=priors,
                temperature=asked.voting_temperature,
                number=number,
                seed=seed,
            )

        return groups_of(labels.tolist(), voters, classwise=asked.recover.classwise)


def judges_of(
    ctx: Context,
    source: Source,
    networks: Sequence[Network],
    names: Sequence[str],
    config: Recovery,
    preprocessing: Preprocessing,
) -> list[Judge]:
    """The teachers, ready to judge images."""
    if config.iterations == 0:
        return []
    return [
        Judge(
            network,
            name,
            preprocessing=preprocessing,
            device=ctx.device,
            statistics=config.statistics,
            classwise=_class_statistics(ctx, source, network) if config.classwise else None,
        )
        for network, name in zip(networks, names, strict=True)
    ]


def _class_statistics(ctx: Context, source: Source, network: Network) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance (C, D) of each batch norm's input, by class, over the training data."""
    found = ctx.cache.statistics(source.train, network, Statistics(of="batch_norm", per_class=True))
    return {name: (found[name].mean.to(ctx.device), found[name].var.to(ctx.device)) for name in found.layers}
