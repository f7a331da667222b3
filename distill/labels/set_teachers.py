"""The teachers of a set, asked again: for online labels, and for real images that are to be labelled as the set is.

A set carries what its teachers are and how they label, not the teachers: they are taken from the cache, or trained
again as they were. Networks that are not the set's own, by the sha256 of definition and weights, are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from distill.cache.networks import Network
from distill.contracts import Context, DistilledSet, SoftLabels, Source
from distill.errors import InputError
from distill.labels.calibration import Calibration
from distill.labels.codecs import PROJECTOR, is_stored
from distill.labels.ensemble import BatchNormMode, Combine, Ensemble
from distill.labels.pool import PoolTeacher, open_pool
from distill.labels.projector import open_projector
from distill.labels.view_labels import CodedLabels, OnlineLabels, checked, plan_of
from distill.models import describe
from distill.portable import plain_without_paths
from distill.training.batches import DeviceImages
from distill.training.config import NonNegative, Positive
from distill.training.job import Pool, ViewLabels, ViewPlan

_BLOCK = 256  # images a forward pass


class _Told(BaseModel):
    """How a set's attributes tell who labels it."""

    model_config = ConfigDict(extra="ignore")

    teachers: Annotated[tuple[PoolTeacher, ...], Field(min_length=1)]
    identities: tuple[str, ...]
    weights: tuple[NonNegative, ...]
    combine: Combine
    batch_norm: BatchNormMode
    micro_batches: Annotated[int, Field(ge=1)]
    temperature: Positive
    calibration: Calibration | None

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        if not len(self.teachers) == len(self.identities) == len(self.weights):
            raise ValueError("teachers, identities and weights are not one each")
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"weights sum to {sum(self.weights):g}, not 1")
        return self


def told(
    ensemble: Ensemble, teachers: Sequence[PoolTeacher], calibration: Calibration | None = None
) -> dict[str, Any]:
    """What a set's attributes say of who labels it.

    Args:
        ensemble: the teachers as they are.
        teachers: as they are configured.
        calibration: of the labels.
    """
    return {
        "teacher": ", ".join(ensemble.names),
        "weights": list(ensemble.weights),
        "combine": ensemble.combine,
        "batch_norm": ensemble.batch_norm,
        "micro_batches": ensemble.micro_batches,
        "calibration": None if calibration is None else calibration.model_dump(mode="json"),
        "temperature": float(ensemble.temperature),
        "teachers": [plain_without_paths(teacher) for teacher in teachers],
        "identities": [identity_of(network) for network in ensemble.networks],
    }


def identity_of(network: Network) -> str:
    """sha256 (hex) of everything that decides what a network says."""
    text = json.dumps(network.identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class SetTeachers:
    """Who labels a set, and which views of it.

    Args:
        ensemble: the teachers.
        plan: of the views; None where they label images as they are.
        calibration: of the labels of views.
        soft: the set's labels, whose codec others go through as well.
        device: where they label images as they are.
    """

    ensemble: Ensemble
    plan: ViewPlan | None
    calibration: Calibration | None
    soft: SoftLabels
    device: torch.device

    def online(self, classes: Tensor) -> OnlineLabels:
        """Labels of the views of images of these classes, int64 (N,)."""
        assert self.plan is not None, "labels of views"
        return OnlineLabels(self.plan, self.ensemble, classes, self.calibration)

    def label(self, pool: Pool) -> Pool:
        """Images, labelled as the set's own are; the pool's targets are classes."""
        if self.plan is not None:
            views: ViewLabels = self.online(pool.targets)
            if is_stored(self.soft):
                views = CodedLabels(views, replace(self.soft, arrays={}), pool.targets)
            return replace(pool, views=views)
        images, labellers = DeviceImages(pool, self.device), self.ensemble.on(self.device)
        blocks = torch.arange(len(images), device=self.device).split(_BLOCK)
        logits = [labellers.logits(images.gather(rows)).cpu() for rows in blocks]
        return replace(pool, targets=torch.cat(logits))


def set_teachers(
    ctx: Context, source: Source, distilled: DistilledSet, *, encoder: Path | None = None
) -> SetTeachers:
    """The teachers of a set's soft labels.

    Args:
        ctx, source: where they are had from.
        distilled: the set.
        encoder: the file of the encoder that a projector needs, where the cache has no such projector.

    Raises:
        InputError: no teacher gave its labels, or they cannot be had here.
    """
    soft = distilled.soft
    if soft is not None and soft.codec == PROJECTOR:
        network = open_projector(ctx, source, distilled, encoder=encoder)
        alone = Ensemble((network,), (1.0,), soft.attributes["temperature"], distilled.preprocessing)
        return SetTeachers(alone, plan_of(soft), None, soft, ctx.device)
    if soft is None or "teachers" not in soft.attributes:
        raise InputError(
            "no teacher of its own labels the set, which could label other images alike",
            found="hard labels"
            if soft is None
            else f"soft labels of {soft.attributes.get('teacher', 'no teacher')}",
            fix="leave random_soft out of evaluate.against, or label the set by soft_label or committee",
        )
    asked = checked(_Told, dict(soft.attributes), what="the set does not say who labels it")
    made = (distilled.provenance.get("source") or {}).get("train_fingerprint", source.train.fingerprint)
    if made != source.train.fingerprint:
        raise InputError(
            "these are not the training data that the set was made from, so that its teachers cannot be had",
            found=f"data of sha256 {source.train.fingerprint[:12]}",
            allowed=made[:12],
            fix="evaluate on the set's own data; without its teachers, in other regimes and without random_soft",
        )
    networks = open_pool(ctx, source, asked.teachers)
    for network, identity in zip(networks, asked.identities, strict=True):
        if identity_of(network) != identity:
            raise InputError(
                f"the teacher {describe(network.model)} is not the one that labels this set",
                found=f"a network of identity {identity_of(network)[:12]}",
                allowed=identity[:12],
                fix="evaluate on the data and with the seed that the set was made from, on the same kind of device",
            )
    ensemble = Ensemble(
        tuple(networks),
        asked.weights,
        asked.temperature,
        distilled.preprocessing,
        combine=asked.combine,
        batch_norm=asked.batch_norm,
        micro_batches=asked.micro_batches,
    )
    return SetTeachers(ensemble, plan_of(soft), asked.calibration, soft, ctx.device)
