"""Labels of views on their way to students: read from the set, or asked of the teachers again.

Both give the same numbers for the same plan; the second needs the teachers and no room.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError
from distill.labels.calibration import Calibration
from distill.labels.codecs import KEPT, VIEWS, decode, decode_rows, encode, is_of_pairs
from distill.labels.ensemble import Ensemble, Labellers
from distill.training.batches import PassOrders
from distill.training.config import Augment, Mixing
from distill.training.job import ViewLabels, ViewPlan

_Form = TypeVar("_Form", bound=BaseModel)


class _Plan(BaseModel):
    """A plan as a set's attributes hold it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seed: int = Field(ge=0, lt=1 << 63)
    epochs: int = Field(ge=1, le=1_000_000_000)
    batch_size: int = Field(ge=1)
    augment: Augment
    crop_scale: float = Field(gt=0, le=1)
    mix: Mixing
    mix_alpha: float = Field(gt=0, allow_inf_nan=False)


def plan_of(soft: SoftLabels) -> ViewPlan | None:
    """The plan of the views that labels belong to; None where they are of images as they are."""
    told = soft.attributes.get(VIEWS)
    if told is None:
        return None
    plan = checked(_Plan, told, what="the plan of labelled views does not hold what belongs there")
    return ViewPlan(**plan.model_dump())


def checked(form: type[_Form], told: object, *, what: str) -> _Form:
    """What a set tells, in its form; DamagedDataError, beginning with `what`, where it has another."""
    try:
        return form.model_validate_json(json.dumps(told))  # as it was stored: JSON has no tuples
    except ValidationError as error:
        problem = error.errors()[0]
        raise DamagedDataError(
            what,
            found=f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}",
            fix="fetch or make the set again",
        ) from error


def plan_attributes(plan: ViewPlan) -> dict[str, Any]:
    """The plan as a set's attributes hold it."""
    return dict(vars(plan))


class StoredLabels(ViewLabels):
    """Labels that a set stores, one pass of the plan a label set, in the plan's order.

    Args:
        soft: the labels.
        classes: of the images, int64 (N,).
    """

    def __init__(self, soft: SoftLabels, classes: Tensor) -> None:
        plan = plan_of(soft)
        assert plan is not None, "labels of views"
        self.plan, self.soft, self.classes = plan, soft, classes
        self.device = torch.device("cpu")
        # Of the host's own: a GPU's index would have to be waited for.
        self._orders = PassOrders(plan, len(classes), self.device)

    def on(self, device: torch.device) -> StoredLabels:
        ready = StoredLabels(self.soft, self.classes)
        ready.device = device
        return ready

    def batch(self, epoch: int, start: int, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        rows = slice(start, start + len(images))
        pairs = None
        if is_of_pairs(self.soft.codec):
            pairs = self.plan.pairs(epoch, self._orders[epoch][rows], self.classes)
        logits = decode_rows(self.soft, epoch, rows, pairs).to(self.device, non_blocking=True)
        if KEPT not in self.soft.arrays:
            return logits, None
        kept = torch.from_numpy(self.soft.arrays[KEPT][epoch, rows].astype("f4"))
        return logits, kept.to(self.device, non_blocking=True)


@dataclass(eq=False)
class CodedLabels(ViewLabels):
    """Labels as they would come back from a codec.

    Args:
        labels: as the teachers give them.
        soft: labels that were stored by the codec; its arrays are not read.
        classes: of the images, int64 (N,).
    """

    labels: ViewLabels
    soft: SoftLabels
    classes: Tensor

    def __post_init__(self) -> None:
        self.plan = self.labels.plan

    def on(self, device: torch.device) -> CodedLabels:
        return replace(self, labels=self.labels.on(device))

    def batch(self, epoch: int, start: int, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, kept = self.labels.batch(epoch, start, images, index)
        pairs = None
        if is_of_pairs(self.soft.codec):
            pairs = self.plan.pairs(epoch, index.cpu(), self.classes)[None]
        coded = encode(logits[None], codec=self.soft.codec, pairs=pairs, **self.soft.attributes)
        return decode(coded, pairs)[0].to(logits.device), kept


@dataclass(eq=False)
class OnlineLabels(ViewLabels):
    """Labels that teachers give as they are asked for.

    Args:
        plan: which views.
        ensemble: the teachers.
        classes: of the images, int64 (N,).
        calibration: see `distill.labels.calibration`.
    """

    plan: ViewPlan
    ensemble: Ensemble
    classes: Tensor
    calibration: Calibration | None = None
    labellers: Labellers | None = None

    def on(self, device: torch.device) -> OnlineLabels:
        return replace(self, labellers=self.ensemble.on(device), classes=self.classes.to(device))

    def batch(self, epoch: int, start: int, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.labellers is not None, "on a device"
        logits = self.labellers.logits(images)
        if self.calibration is None:
            return logits, None
        logits, kept = self.calibration.apply(
            logits, self.classes[index], temperature=self.ensemble.temperature
        )
        return logits, kept.float()
