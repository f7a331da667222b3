"""Labelled views for a training loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from distill.contracts import DistilledSet
from distill.errors import InputError
from distill.labels import codecs
from distill.labels.view_labels import StoredLabels, plan_of
from distill.training.batches import DeviceImages, PlannedBatches
from distill.training.job import Pool


class HoldsSet(Protocol):
    """What `distill.load` gives."""

    set: DistilledSet


def views(
    distilled: DistilledSet | HoldsSet, epoch: int, *, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch as students of a set see them: views made again, with their own labels.

    Args:
        distilled: the set, or `distill.load("set.h5")`.
        epoch: from 0; the train recipe's `epochs` of them make a training.
        device: where.

    Yields:
        Normalised float32 views (B, Ch, H, W), and targets float32 (B, C): probabilities at the stored temperature, or
        logits where the train recipe's loss compares those. Of codec `dbr` they are the marginal target; which two
        classes it is of, and their shares, is not told. Views that calibration drops are left out.

    Raises:
        InputError: the set stores no labels of views, or no such epoch.
    """
    if not isinstance(distilled, DistilledSet):
        if not hasattr(distilled, "set"):
            raise InputError("not a set", found=repr(distilled), fix='give distill.load("set.h5")')
        distilled = distilled.set
    soft, train = distilled.soft, distilled.train
    if soft is None or plan_of(soft) is None or not codecs.is_stored(soft):
        raise InputError(
            "the set stores no labels of views",
            found="no soft labels" if soft is None else f"labels by codec {soft.codec}",
            fix="make it with relabel (committee) or views (soft_label), and labels: stored; students of labels that "
            "are given as they train (online, or by a projector) are trained by `distill evaluate`",
        )
    if epoch not in range(train.epochs):
        raise InputError("no such epoch", found=str(epoch), allowed=f"0 to {train.epochs - 1}")
    images = DeviceImages(
        Pool(distilled.images, distilled.labels, distilled.preprocessing), torch.device(device)
    )
    labels = StoredLabels(soft, distilled.labels)
    for batch in PlannedBatches(labels, images, train, classes=distilled.labels).epoch(epoch):
        kept = slice(None) if batch.weights is None else batch.weights[0] > 0
        yield batch.images[0][kept], batch.targets[0][kept]
