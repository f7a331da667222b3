"""How soft labels are stored: one class a codec, found by name in `CODECS`.

A codec turns the logits of V label sets into named arrays and back. V = 1 is one label for the un-augmented
image; V > 1 are labels of V views of it. What a codec must know beyond its arrays is in the attributes, such
as the temperature at which the labels are meant to be softened: softmax(logits / temperature).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.augment import class_pairs
from distill.contracts import SoftLabels
from distill.errors import DamagedDataError, InputError, NonFiniteError
from distill.labels import distance_codec, logit_codecs, probability_codecs
from distill.labels.codec import CODECS, Codec, register
from distill.randomness import pass_order
from distill.registry import nearest
from distill.training.config import DISTANCE_LOSSES, LOGIT_LOSSES, TWO_IMAGES, Strict, TrainConfig

__all__ = ["CODECS", "Codec", "CodecConfig", "check", "decode", "encode", "label_bytes", "register"]

# Beside a codec's own arrays: uint8 (V, N), 1 where a view is learned from, 0 where calibration drops it.
KEPT = "kept"

# The attribute that holds the plan of the labelled views; without it labels are of images as they are.
VIEWS = "views"

# In the place of a codec's name: no labels are stored, the teachers are asked as students train.
ONLINE = "online"

# Likewise, where the teacher is an adapted public encoder: of it, only the adapter is stored.
PROJECTOR = "projector"
_MAX_ADAPTER_BYTES = 64 << 20
_MAX_TEMPERATURE = 1e300
_MAX_ENCODER_BYTES = 1 << 40

CodecName = Literal["full", "topk", "quantised", "marginal_smoothing", "marginal_renormalised", "dbr"]
assert {distance_codec, logit_codecs, probability_codecs}  # imported for the codecs that they register


_DEFAULTS = {"k": 10, "bits": 8}


class CodecConfig(Strict):
    """How labels are stored; see docs/labels.md for what each costs.

    `k` is for `topk`, `marginal_smoothing` and `marginal_renormalised` (10 if left out), `bits`, 8 or 4, for
    `quantised` (8 if left out).
    """

    name: CodecName = "full"
    k: Annotated[int, Field(ge=1)] | None = None
    bits: Literal[4, 8] | None = None

    @model_validator(mode="after")
    def _options_belong(self) -> Self:
        for option in ("k", "bits"):
            if getattr(self, option) is not None and option not in CODECS[self.name].options:
                raise ValueError(f"{option} does not belong to codec {self.name}")
        return self

    @property
    def options(self) -> dict[str, int]:
        """The options of the codec with their defaults."""
        asked = {"k": self.k, "bits": self.bits}
        return {option: asked[option] or _DEFAULTS[option] for option in CODECS[self.name].options}

    def view_bytes(self, classes: int) -> int:
        """Bytes of the label of one view of C classes."""
        options = {
            name: min(value, classes) if name == "k" else value for name, value in self.options.items()
        }
        one = encode(
            torch.zeros(1, 1, classes),
            codec=self.name,
            temperature=1.0,
            teacher="",
            pairs=torch.zeros(1, 1, 2, dtype=torch.int64),
            **options,
        )
        return label_bytes(one)

    def check(self, classes: int) -> None:
        """Raise InputError where labels of C classes cannot be stored so."""
        k = self.options.get("k", 1)
        if k > classes:
            raise InputError(
                f"codec {self.name} keeps more classes than there are",
                where="codec.k",
                found=str(k),
                allowed=f"1 to {classes}, the number of classes",
                fix=f"set codec.k to {classes} or less, or use codec full",
            )


def refuse_loss(codec: str, loss: str, *, fix: str) -> None:
    """Raise InputError where the loss compares logits, and the codec keeps none.

    Args:
        codec: its name; online labels are logits.
        loss: `train.loss`.
        fix: what to do.
    """
    if loss in LOGIT_LOSSES and codec not in (ONLINE, PROJECTOR) and not _codec(codec).holds_logits:
        raise InputError(
            f"the loss {loss} compares logits, which codec {codec} does not keep",
            where="train.loss",
            found=loss,
            allowed="cross_entropy, kl, dbr_l1 or dbr_l2; or codec full, topk or quantised",
            fix=fix,
        )


def refuse_unmixed(train: TrainConfig, codec: str, *, fix: str) -> None:
    """Raise InputError where distances to two classes are asked for, and views are of one image."""
    for where, what, asked in (
        ("train.loss", f"the loss {train.loss}", train.loss in DISTANCE_LOSSES),
        ("codec", f"codec {codec}", is_of_pairs(codec)),
    ):
        if asked and train.mix not in TWO_IMAGES:
            raise InputError(
                f"{what} takes distances to the classes of the two images that a view is mixed from",
                where=where,
                found=f"train.mix: {train.mix}",
                allowed=f"train.mix: {' or '.join(TWO_IMAGES)}",
                fix=fix,
            )


def refuse_distances(loss: str, *, fix: str) -> None:
    """Raise InputError where the loss compares distances of mixed views, and labels are of images as they are."""
    if loss in DISTANCE_LOSSES:
        raise InputError(
            f"the loss {loss} compares distances of mixed views, and the labels are of images as they are",
            where="train.loss",
            found=loss,
            allowed="cross_entropy, kl, mse or cosine",
            fix=fix,
        )


def encode(
    logits: Tensor | np.ndarray,
    *,
    codec: str,
    temperature: float,
    teacher: str | Mapping[str, Any],
    pairs: Tensor | None = None,
    **attributes: Any,
) -> SoftLabels:
    """Store soft labels.

    Args:
        logits: float (V, N, C), V >= 1 label sets.
        codec: name in `CODECS`.
        temperature: at which the labels are meant to be softened, above 0.
        teacher: who labelled, JSON-able.
        pairs: int64 (V, N, 2), the classes of the two images of each mixed view; for codecs `of_pairs`.
        attributes: further JSON-able facts, and the options of the codec.

    Raises:
        InputError: no such codec, or a temperature that is none.
        NonFiniteError: NaN or infinite logits, or logits that the codec cannot hold.
    """
    values = torch.as_tensor(logits).detach()
    if values.ndim != 3 or not values.is_floating_point() or values.numel() == 0:
        raise ValueError(f"logits must be float (V, N, C), not {values.dtype} {tuple(values.shape)}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(
            "the temperature of soft labels is out of range", found=str(temperature), allowed="> 0"
        )
    if not values.isfinite().all():
        raise NonFiniteError(
            "the teacher gave NaN or infinite logits", fix="train the teacher with a lower learning rate"
        )
    facts = {**attributes, "teacher": teacher, "temperature": float(temperature)}
    if _codec(codec).options or _codec(codec).of_pairs:
        facts["classes"] = values.shape[2]
    for option in _codec(codec).options:
        facts.setdefault(
            option, min(_DEFAULTS[option], values.shape[2]) if option == "k" else _DEFAULTS[option]
        )
    return SoftLabels(codec, _codec(codec).encode(values, facts, pairs), facts)


def decode(soft: SoftLabels, pairs: Tensor | None = None) -> Tensor:
    """float32 logits (V, N, C) of stored labels, on the CPU; `pairs` as in `encode`."""
    return _codec(soft.codec).decode(soft, pairs)


def decode_rows(soft: SoftLabels, view: int, rows: slice, pairs: Tensor | None = None) -> Tensor:
    """float32 logits (n, C) of some rows of one label set; nothing else is read where the arrays are mapped files.

    Args:
        soft: the labels.
        view: which label set.
        rows: which rows of it.
        pairs: int64 (n, 2), as in `encode`.
    """
    arrays = {name: array[view : view + 1, rows] for name, array in soft.arrays.items() if name != KEPT}
    part = SoftLabels(soft.codec, arrays, soft.attributes)
    return _codec(soft.codec).decode(part, None if pairs is None else pairs[None])[0]


def is_of_pairs(codec: str) -> bool:
    """Whether labels of that codec are told with the classes of the two images of each mixed view."""
    return codec in CODECS and CODECS[codec].of_pairs


def probabilities(soft: SoftLabels, *, classes: Tensor, passes: int | None = None) -> Tensor:
    """float32 (N, C): softmax(logits / stored temperature), the mean over the V label sets, or the first `passes`.

    Labels of views lie in the order in which students see them; here each image has its own. Under mixing a view's
    label tells of two images, and so does the mean. Views that calibration drops do not count, but for images that have
    no other.

    Args:
        soft: the labels.
        classes: of the images, int64 (N,).
        passes: how many label sets count.
    """
    assert is_stored(soft), "stored labels"
    any_array = next(array for name, array in soft.arrays.items() if name != KEPT)
    images = any_array.shape[1]
    plan = soft.attributes.get(VIEWS)
    count = min(len(any_array), passes or len(any_array))
    kept = soft.arrays.get(KEPT)
    total: Tensor | None = None
    weights = torch.zeros(images, 1)
    every: Tensor | None = None
    for view in range(count):
        rows = torch.arange(images) if plan is None else pass_order(plan["seed"], view, images)
        pairs = _pairs(soft, view, rows, classes)
        found = (decode_rows(soft, view, slice(None), pairs) / soft.attributes["temperature"]).softmax(dim=1)
        if total is None or every is None:
            total, every = torch.zeros_like(found), torch.zeros_like(found)
        weight = torch.ones(images, 1) if kept is None else torch.from_numpy(kept[view].astype("f4"))[:, None]
        total[rows] += weight * found
        weights[rows] += weight
        every[rows] += found
    assert total is not None and every is not None, "a label set"
    return torch.where(weights > 0, total / weights.clamp(min=1), every / count)


def _pairs(soft: SoftLabels, view: int, rows: Tensor, classes: Tensor) -> Tensor | None:
    """The pairs (N, 2) of a label set whose row n is a view of image `rows[n]`; None where the codec needs none."""
    if not is_of_pairs(soft.codec):
        return None
    plan = soft.attributes[VIEWS]
    return class_pairs(plan["mix"], classes, seed=plan["seed"], epoch=view, index=rows)


def is_stored(soft: SoftLabels | None) -> bool:
    """Whether there are soft labels to be read; else somebody gives them as students train."""
    return soft is not None and soft.codec not in (ONLINE, PROJECTOR)


def label_bytes(soft: SoftLabels) -> int:
    """Bytes of the stored arrays, exactly, before the file's lossless compression."""
    return sum(array.nbytes for array in soft.arrays.values())


def check(soft: SoftLabels, *, images: int, classes: int) -> None:
    """Raise DamagedDataError where `soft` cannot label `images` images of `classes` classes."""
    if soft.codec not in CODECS and soft.codec not in (ONLINE, PROJECTOR):
        raise DamagedDataError(
            f"unknown soft-label codec {soft.codec!r}",
            allowed=", ".join(sorted([*CODECS, ONLINE, PROJECTOR])),
            fix="update distill, if the set was made by a newer version",
        )
    temperature = soft.attributes.get("temperature")
    if not isinstance(temperature, float | int) or not 0 < temperature <= _MAX_TEMPERATURE:
        raise DamagedDataError(
            "soft labels lack a valid temperature",
            found=repr(temperature)[:50],
            allowed=f"> 0 and <= {_MAX_TEMPERATURE:g}",
        )
    if "teacher" not in soft.attributes:
        raise DamagedDataError("soft labels do not say which teacher gave them")
    if soft.codec == ONLINE:
        if soft.arrays:
            raise DamagedDataError("online labels store nothing", found=", ".join(sorted(soft.arrays)))
        return
    if soft.codec == PROJECTOR:
        _check_adapter(soft)
        return
    if KEPT in soft.arrays:
        _check_kept(soft.arrays[KEPT], images)
        _check_passes(soft)
        soft = SoftLabels(
            soft.codec, {name: a for name, a in soft.arrays.items() if name != KEPT}, soft.attributes
        )
    CODECS[soft.codec].check(soft, images=images, classes=classes)
    _check_passes(soft)
    if is_of_pairs(soft.codec):
        _check_mixed(soft)


def _check_adapter(soft: SoftLabels) -> None:
    """Labels by a projector store the bytes of its adapter."""
    found = {name: (array.dtype, array.ndim) for name, array in soft.arrays.items()}
    if found != {"adapter": (np.dtype("u1"), 1)} or soft.arrays["adapter"].nbytes > _MAX_ADAPTER_BYTES:
        raise DamagedDataError(
            "labels by a projector have the wrong arrays",
            found=", ".join(f"{name}: {dtype}, {ndim} dimensions" for name, (dtype, ndim) in found.items())
            or "none",
            allowed=f"adapter: uint8 (bytes,), at most {_MAX_ADAPTER_BYTES:,}",
        )
    if not isinstance(soft.attributes.get(VIEWS), dict):
        raise DamagedDataError("labels by a projector do not say of which views they are")
    told = soft.attributes.get(PROJECTOR)
    encoder = (
        told["projection"].get("encoder")
        if isinstance(told, dict) and isinstance(told.get("projection"), dict)
        else None
    )
    facts = encoder if isinstance(encoder, dict) else {}
    if not (
        isinstance(facts.get("name"), str)
        and isinstance(facts.get("sha256"), str)
        and isinstance(told, dict)
        and isinstance(told.get("bytes"), int)
        and 0 <= told["bytes"] <= _MAX_ENCODER_BYTES
    ):
        raise DamagedDataError(
            "the set does not say which encoder labels it",
            allowed="the encoder's name, the sha256 of its weights, and their bytes",
            fix="fetch or make the set again",
        )


def _check_passes(soft: SoftLabels) -> None:
    """Labels of views have one label set a pass of their plan."""
    plan = soft.attributes.get(VIEWS)
    if plan is None:
        return
    passes = plan.get("epochs") if isinstance(plan, dict) else None
    found = {len(array) for array in soft.arrays.values()}
    if found != {passes}:
        raise DamagedDataError(
            "the labels do not match the plan of their views",
            found=f"{', '.join(map(str, sorted(found)))} label sets",
            allowed=f"{passes}, one a pass",
        )


def _check_mixed(soft: SoftLabels) -> None:
    """Labels of pairs have a plan of views of two images."""
    plan = soft.attributes.get(VIEWS)
    mix = plan.get("mix") if isinstance(plan, dict) else None
    if mix not in TWO_IMAGES:
        raise DamagedDataError(
            f"labels by codec {soft.codec} do not say which two images their views are mixed from",
            found=f"mix: {mix}",
            allowed=f"views with mix: {' or '.join(TWO_IMAGES)}",
        )


def _check_kept(kept: np.ndarray, images: int) -> None:
    if kept.dtype != np.uint8 or kept.ndim != 2 or kept.shape[1] != images or int(kept.max()) > 1:
        raise DamagedDataError(
            "the marks of kept views do not match the images",
            found=f"{kept.dtype} {kept.shape}",
            allowed=f"uint8 (V, {images}) of 0 and 1",
        )


def _codec(name: str) -> Codec:
    if name not in CODECS:
        close = nearest(name, CODECS)
        raise InputError(
            f"unknown soft-label codec {name!r}",
            found=name,
            allowed=", ".join(sorted(CODECS)),
            fix=f"did you mean {close!r}?" if close else None,
        )
    return CODECS[name]
