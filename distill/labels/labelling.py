"""A set's labels from its teachers: stored now, or promised and asked for as students train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from distill.cache.networks import Network
from distill.contracts import Context, DistilledSet, SoftLabels, Source
from distill.labels.codecs import ONLINE, VIEWS
from distill.labels.ensemble import Ensemble
from distill.labels.pool import PoolTeacher
from distill.labels.relabel import Relabelling, kept_of_first_pass, relabel, tell_kept
from distill.labels.set_teachers import SetTeachers, set_teachers, told
from distill.labels.view_labels import OnlineLabels, StoredLabels, plan_attributes, plan_of
from distill.training.job import ViewLabels


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
        ctx: of the run.
        plain: the images, and the training of students, which says which views there are.
        teachers, networks: who labels, as configured and as trained.
        weights: one each, sum 1.
        how: options.
        temperature: T of the labels.
        attributes: further facts that the labels carry.
    """
    how.refuse_lonely_images(plain.train, len(plain))
    train = plain.train.model_copy(update={"temperature": temperature})
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
    facts = {**told(ensemble, teachers, how.calibration), **(attributes or {})}
    if how.labels == "stored":
        soft = relabel(ctx, plain, labels, codec=how.codec, attributes=facts)
    else:
        if how.calibration is not None:
            tell_kept(ctx, kept_of_first_pass(ctx, plain, labels))
        soft = SoftLabels(ONLINE, {}, {**facts, VIEWS: plan_attributes(plan)})
    return replace(plain, soft=soft, train=train)


def view_labels(
    ctx: Context, source: Source, distilled: DistilledSet, *, teachers: SetTeachers | None = None
) -> ViewLabels | None:
    """The labels of a set's views; None where it has none.

    Args:
        ctx, source: where teachers are had from.
        distilled: the set.
        teachers: of the set, where they are at hand already.

    Raises:
        InputError: labels are online, and their teachers cannot be had here.
    """
    soft = distilled.soft
    if soft is None or plan_of(soft) is None:
        return None
    if soft.codec != ONLINE:
        return StoredLabels(soft, distilled.labels)
    teachers = teachers or set_teachers(ctx, source, distilled)
    return teachers.online(distilled.labels)
