"""A set's labels from its teachers: stored now, or promised and asked for as students train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.cache.networks import Network
from distill.cache.teachers import checkpoint_epochs
from distill.contracts import Context, DistilledSet, SoftLabels, Source
from distill.labels.codecs import ONLINE, VIEWS, CodecConfig, is_stored
from distill.labels.ensemble import Ensemble
from distill.labels.pool import PoolTeacher
from distill.labels.projector import project
from distill.labels.projector_fit import weak_teachers
from distill.labels.relabel import Relabelling, kept_of_first_pass, relabel, tell_kept
from distill.labels.set_teachers import SetTeachers, set_teachers, told
from distill.labels.view_labels import OnlineLabels, StoredLabels, plan_attributes, plan_of
from distill.training.job import ViewLabels, ViewPlan

_SHARED_BYTES = 1 << 30


def with_labels(
    ctx: Context,
    source: Source,
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
        ctx, source: of the run.
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
    if how.projector is not None:
        soft = _projected(ctx, source, plain, teachers, ensemble, plan, how)
        return replace(
            plain, soft=replace(soft, attributes={**(attributes or {}), **soft.attributes}), train=train
        )
    labels = OnlineLabels(plan, ensemble, plain.labels, how.calibration)
    facts = {**told(ensemble, teachers, how.calibration), **(attributes or {})}
    if how.labels == "stored":
        soft = relabel(ctx, plain, labels, codec=how.codec, attributes=facts)
    else:
        if how.calibration is not None:
            tell_kept(ctx, kept_of_first_pass(ctx, plain, labels))
        soft = SoftLabels(ONLINE, {}, {**facts, VIEWS: plan_attributes(plan)})
    return replace(plain, soft=soft, train=train)


def _projected(
    ctx: Context,
    source: Source,
    plain: DistilledSet,
    teachers: Sequence[PoolTeacher],
    ensemble: Ensemble,
    plan: ViewPlan,
    how: Relabelling,
) -> SoftLabels:
    """Labels by a projector that is fitted to these teachers, and to what they were earlier in their trainings."""
    assert how.projector is not None, "labels by a projector"
    count = how.projector.checkpoints
    epochs = [checkpoint_epochs(teacher.train, count) for teacher in teachers]
    networks, weights = weak_teachers(ensemble.networks, ensemble.weights, epochs)
    weak = replace(ensemble, networks=networks, weights=weights, micro_batches=1)
    names = ", ".join(ensemble.names)
    facts = {
        "teacher": f"projector on {how.projector.encoder.describe()}, fitted to {names}",
        "temperature": float(ensemble.temperature),
    }
    return project(ctx, source, plain, weak, how.projector, plan, attributes=facts)


def shares_labels(views: int, classes: int, *, students: int) -> bool:
    """Whether students share labels of so many views that are given as they train: asked for once, and remembered."""
    return students > 1 and views * CodecConfig().view_bytes(classes) <= _SHARED_BYTES


def view_labels(
    ctx: Context,
    source: Source,
    distilled: DistilledSet,
    *,
    teachers: SetTeachers | None = None,
    encoder: Path | None = None,
    students: int = 1,
) -> ViewLabels | None:
    """The labels of a set's views; None where it has none.

    Args:
        ctx, source: where teachers are had from, and a folder for labels that several students share.
        distilled: the set.
        teachers: of the set, where they are at hand already.
        encoder: the file of the encoder that a projector needs, where the cache has no such projector.
        students: how many learn from these labels. Labels that are given as students train are asked for once, where
            there are several and the labels of all views fit in `_SHARED_BYTES`.

    Raises:
        InputError: labels are online, and their teachers cannot be had here.
    """
    soft = distilled.soft
    if soft is None or plan_of(soft) is None:
        return None
    if is_stored(soft):
        return StoredLabels(soft, distilled.labels)
    teachers = teachers or set_teachers(ctx, source, distilled, encoder=encoder)
    labels = teachers.online(distilled.labels)
    views = labels.plan.epochs * len(distilled)
    if not shares_labels(views, len(distilled.classes), students=students):
        return labels
    facts = {"teacher": soft.attributes["teacher"], "temperature": soft.attributes["temperature"]}
    shared = relabel(ctx, distilled, labels, codec=CodecConfig(), attributes=facts)
    return StoredLabels(shared, distilled.labels)
