"""How soft labels are stored: one class a codec, found by name in `CODECS`.

A codec turns the logits of V label sets into named arrays and back. V = 1 is one label for the un-augmented
image; V > 1 are labels of V views of it. What a codec must know beyond its arrays is in the attributes, such
as the temperature at which the labels are meant to be softened: softmax(logits / temperature).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError, InputError, NonFiniteError
from distill.registry import nearest


class Codec(ABC):
    """A way to store logits. A subclass sets `name` and is marked `@register`; that is all it takes."""

    name: ClassVar[str]

    @abstractmethod
    def encode(self, logits: Tensor, attributes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Arrays that hold `logits`, float (V, N, C) and finite, on any device."""

    @abstractmethod
    def decode(self, soft: SoftLabels) -> Tensor:
        """float32 logits (V, N, C), on the CPU."""

    @abstractmethod
    def check(self, soft: SoftLabels, *, images: int, classes: int) -> None:
        """Raise DamagedDataError where the arrays do not hold logits (V, `images`, `classes`)."""


CODECS: dict[str, Codec] = {}


def register(codec: type[Codec]) -> type[Codec]:
    """Class decorator: adds the codec to `CODECS` under its name."""
    assert codec.name not in CODECS, f"two codecs named {codec.name}"
    CODECS[codec.name] = codec()
    return codec


@register
class Full(Codec):
    """Every logit, rounded to float16: array `logits` (V, N, C)."""

    name = "full"

    def encode(self, logits: Tensor, attributes: Mapping[str, Any]) -> dict[str, np.ndarray]:
        stored = logits.to("cpu", torch.float16, copy=True)
        if not stored.isfinite().all():
            raise NonFiniteError(
                "logits do not fit float16, in which soft labels are stored",
                found=f"a logit of magnitude {float(logits.abs().max()):g}",
                allowed=f"magnitudes up to {torch.finfo(torch.float16).max:g}",
                fix="train the teacher with a lower learning rate or more weight decay",
            )
        return {"logits": stored.contiguous().numpy()}

    def decode(self, soft: SoftLabels) -> Tensor:
        return torch.from_numpy(soft.arrays["logits"].astype(np.float32))

    def check(self, soft: SoftLabels, *, images: int, classes: int) -> None:
        if set(soft.arrays) != {"logits"}:
            raise DamagedDataError(
                "soft labels of codec 'full' have the wrong arrays",
                found=", ".join(sorted(soft.arrays)) or "none",
                allowed="logits",
            )
        logits = soft.arrays["logits"]
        if logits.dtype != np.float16 or logits.ndim != 3 or logits.shape[1:] != (images, classes):
            raise DamagedDataError(
                "soft labels do not match the images and classes",
                found=f"{logits.dtype} {logits.shape}",
                allowed=f"float16 (V, {images}, {classes})",
            )
        if len(logits) == 0 or not np.isfinite(logits).all():
            raise DamagedDataError(
                "soft labels are empty, NaN or infinite", allowed="V >= 1 sets of finite logits"
            )


def encode(
    logits: Tensor | np.ndarray,
    *,
    codec: str,
    temperature: float,
    teacher: str | Mapping[str, Any],
    **attributes: Any,
) -> SoftLabels:
    """Store soft labels.

    Args:
        logits: float (V, N, C), V >= 1 label sets.
        codec: name in `CODECS`.
        temperature: at which the labels are meant to be softened, above 0.
        teacher: who labelled, JSON-able.
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
    return SoftLabels(codec, _codec(codec).encode(values, facts), facts)


def decode(soft: SoftLabels) -> Tensor:
    """float32 logits (V, N, C) of stored labels, on the CPU."""
    return _codec(soft.codec).decode(soft)


def probabilities(soft: SoftLabels) -> Tensor:
    """float32 (N, C): softmax(logits / stored temperature), the mean over the V label sets."""
    logits = decode(soft)
    total = torch.zeros(logits.shape[1:])
    for view in logits:
        total += (view / soft.attributes["temperature"]).softmax(dim=1)
    return total / len(logits)


def label_bytes(soft: SoftLabels) -> int:
    """Bytes of the stored arrays, exactly, before the file's lossless compression."""
    return sum(array.nbytes for array in soft.arrays.values())


def check(soft: SoftLabels, *, images: int, classes: int) -> None:
    """Raise DamagedDataError where `soft` cannot label `images` images of `classes` classes."""
    if soft.codec not in CODECS:
        raise DamagedDataError(
            f"unknown soft-label codec {soft.codec!r}",
            allowed=", ".join(sorted(CODECS)),
            fix="update distill, if the set was made by a newer version",
        )
    temperature = soft.attributes.get("temperature")
    if not isinstance(temperature, float | int) or not (math.isfinite(temperature) and temperature > 0):
        raise DamagedDataError("soft labels lack a valid temperature", found=repr(temperature), allowed="> 0")
    if "teacher" not in soft.attributes:
        raise DamagedDataError("soft labels do not say which teacher gave them")
    CODECS[soft.codec].check(soft, images=images, classes=classes)


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
