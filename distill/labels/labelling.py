"""A set's labels from its teachers: stored now, or promised and asked for as students train.

A set with online labels carries what its teachers are and how they label, not the teachers: they are taken from the
cache, or trained again as they were.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from distill.cache.networks import Network
from distill.contracts import Context, DistilledSet, SoftLabels, Source
from distill.errors import InputError
from distill.labels.calibration import Calibration
from distill.labels.codecs import ONLINE, VIEWS
from distill.labels.ensemble import BatchNormMode, Combine, Ensemble
from distill.labels.pool import PoolTeacher, open_pool
from distill.labels.relabel import Relabelling, relabel
from distill.labels.view_labels import OnlineLabels, StoredLabels, checked, plan_attributes, plan_of
from distill.models import describe
from distill.portable import plain_without_paths
from distill.training.job import ViewLabels


class _Told(BaseModel):
    """How a set's attributes tell who labels it online."""

    model_config = ConfigDict(extra="ignore")

    teachers: tuple[PoolTeacher, ...]
    identities: tuple[str, ...]
    weights: tuple[float, ...]
    combine: Combine
    batch_norm: BatchNormMode
    micro_batches: int
    temperature: float
    calibration: Calibration | None


def with_labels(
    ctx: Context,
    plain: DistilledSet,
    teachers: Sequence[PoolTeacher],
    networks: Sequence[Network],
    weights: Sequence[float],
    how: Relabelling,
    *,
    temperature: float,
    attributes: Mapping[str, Any] | None = None,
) -> DistilledSet:
    """The set with labels of the views that its students will see.

    Args:
        ctx: its `train` says which views.
        plain: the images.
        teachers, networks: who labels, as configured and as trained.
        weights: one each, sum 1.
        how: options.
        temperature: T of the labels.
        attributes: further facts that the labels carry.
    """
    train = ctx.train.model_copy(update={"temperature": temperature})
    ensemble = Ensemble(
        tuple(networks),
        tuple(weights),
        temperature,
        plain.preprocessing,
        combine=how.combine,
        batch_norm=how.batch_norm,
        micro_batches=train.micro_batches,
    )
    plan = how.plan(train, seed=ctx.derive("label views"))
    labels = OnlineLabels(plan, ensemble, plain.labels, how.calibration)
    told = {
        "teacher": ", ".join(ensemble.names),
        "weights": list(weights),
        "combine": how.combine,
        "batch_norm": how.batch_norm,
        "micro_batches": train.micro_batches,
        "calibration": None if how.calibration is None else how.calibration.model_dump(mode="json"),
        **(attributes or {}),
    }
    if how.labels == "stored":
        soft = relabel(ctx, plain, labels, codec=how.codec, attributes=told)
    else:
        soft = SoftLabels(
            ONLINE,
            {},
            {
                **told,
                VIEWS: plan_attributes(plan),
                "temperature": float(temperature),
                "teachers": [plain_without_paths(teacher) for teacher in teachers],
                "identities": [identity_of(network) for network in networks],
            },
        )
    return replace(plain, soft=soft, train=train)


def identity_of(network: Network) -> str:
    """sha256 (hex) of everything that decides what a network says."""
    text = json.dumps(network.identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def view_labels(ctx: Context, source: Source, distilled: DistilledSet) -> ViewLabels | None:
    """The labels of a set's views; None where it has none.

    Raises:
        InputError: labels are online, and their teachers cannot be had here.
    """
    soft = distilled.soft
    if soft is None or plan_of(soft) is None:
        return None
    return StoredLabels(soft) if soft.codec != ONLINE else _online(ctx, source, distilled, soft)


def _online(ctx: Context, source: Source, distilled: DistilledSet, soft: SoftLabels) -> OnlineLabels:
    told = checked(_Told, dict(soft.attributes), what="the set does not say who labels it")
    networks = open_pool(ctx, source, told.teachers)
    for network, identity in zip(networks, told.identities, strict=True):
        if identity_of(network) != identity:
            raise InputError(
                f"the teacher {describe(network.model)} is not the one that labels this set",
                found=f"a network of identity {identity_of(network)[:12]}",
                allowed=identity[:12],
                fix="evaluate on the data and with the seed that the set was made from, on the same kind of device; or "
                "make the set with labels: stored",
            )
    plan = plan_of(soft)
    assert plan is not None
    ensemble = Ensemble(
        tuple(networks),
        told.weights,
        told.temperature,
        distilled.preprocessing,
        combine=told.combine,
        batch_norm=told.batch_norm,
        micro_batches=told.micro_batches,
    )
    return OnlineLabels(plan, ensemble, distilled.labels, told.calibration)
