"""Codecs that store logits: all of them, the largest k, or all in few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError, NonFiniteError
from distill.labels.codec import Codec, index_dtype, register


@register
class Full(Codec):
    """Every logit, rounded to float16: array `logits` (V, N, C)."""

    name = "full"

    def encode(
        self, logits: Tensor, attributes: Mapping[str, Any], pairs: Tensor | None
    ) -> dict[str, np.ndarray]:
        return {"logits": half(logits).numpy()}

    def decode(self, soft: SoftLabels, pairs: Tensor | None) -> Tensor:
        return _float(soft.arrays["logits"])

    def shapes(
        self, soft: SoftLabels, *, images: int, classes: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"logits": ("f2", (images, classes))}


@register
class TopK(Codec):
    """The k largest logits, and one number for the rest, which keeps the softmax's normaliser.

    Arrays: `values` float16 and `index` (V, N, k), the largest first; `tail` float16 (V, N), the logit that each of the
    C - k others is given, T log(mean of exp(z / T)). At the labels' temperature T the k probabilities are then what
    they were.
    """

    name = "topk"
    options = ("k",)
    belongs_to_temperature = True

    def encode(
        self, logits: Tensor, attributes: Mapping[str, Any], pairs: Tensor | None
    ) -> dict[str, np.ndarray]:
        k, temperature = attributes["k"], attributes["temperature"]
        values, index = logits.float().topk(k, dim=2)
        rest = logits.float().scatter(2, index, -math.inf)
        others = max(logits.shape[2] - k, 1)
        tail = temperature * ((rest / temperature).logsumexp(dim=2) - math.log(others))
        tail = torch.where(tail.isfinite(), tail, torch.zeros_like(tail))  # k is C: there is no rest
        return {
            "values": half(values).numpy(),
            "index": index.cpu().numpy().astype(index_dtype(logits.shape[2])),
            "tail": half(tail).numpy(),
        }

    def decode(self, soft: SoftLabels, pairs: Tensor | None) -> Tensor:
        classes = soft.attributes["classes"]
        tail = _float(soft.arrays["tail"])
        logits = tail[..., None].expand(*tail.shape, classes).clone()
        return logits.scatter_(2, _index(soft), _float(soft.arrays["values"]))

    def shapes(
        self, soft: SoftLabels, *, images: int, classes: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        k = _k(soft, classes)
        return {
            "values": ("f2", (images, k)),
            "index": (index_dtype(classes).str, (images, k)),
            "tail": ("f2", (images,)),
        }

    def check_values(self, soft: SoftLabels, *, classes: int) -> None:
        super().check_values(soft, classes=classes)
        check_index(soft, classes)


@register
class Quantised(Codec):
    """Every logit in 8 or 4 bits between the least and the largest of its row.

    Arrays: `levels` uint8 (V, N, C), or (V, N, ceil(C / 2)) with two levels a byte, the earlier class in the low bits;
    `low` and `step` float16 (V, N): a logit is low + step * level.
    """

    name = "quantised"
    options = ("bits",)

    def encode(
        self, logits: Tensor, attributes: Mapping[str, Any], pairs: Tensor | None
    ) -> dict[str, np.ndarray]:
        most = (1 << attributes["bits"]) - 1
        logits = logits.float()
        low = logits.amin(dim=2).half().float()
        # Rounded up, so that the largest logit stays within reach.
        step = ((logits.amax(dim=2) - low) / most).clamp(min=1e-6) * (1 + 2**-10)
        step = step.half().float()
        levels = ((logits - low[..., None]) / step[..., None]).round().clamp(0, most).to(torch.uint8)
        packed = levels.cpu().numpy()
        if attributes["bits"] == 4:
            packed = _pack(packed)
        return {"levels": packed, "low": half(low).numpy(), "step": half(step).numpy()}

    def decode(self, soft: SoftLabels, pairs: Tensor | None) -> Tensor:
        levels = soft.arrays["levels"]
        if soft.attributes["bits"] == 4:
            levels = _unpack(levels, soft.attributes["classes"])
        low, step = _float(soft.arrays["low"]), _float(soft.arrays["step"])
        return torch.from_numpy(levels.astype(np.float32)) * step[..., None] + low[..., None]

    def shapes(
        self, soft: SoftLabels, *, images: int, classes: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        bits = soft.attributes.get("bits")
        if bits not in (4, 8) or soft.attributes.get("classes") != classes:
            raise DamagedDataError(
                "quantised labels lack bits and classes", found=repr(bits), allowed="4 or 8"
            )
        width = classes if bits == 8 else -(-classes // 2)
        return {"levels": ("u1", (images, width)), "low": ("f2", (images,)), "step": ("f2", (images,))}


def half(logits: Tensor) -> Tensor:
    """float16 on the host; NonFiniteError where a logit does not fit."""
    stored = logits.to("cpu", torch.float16, copy=True)
    if not stored.isfinite().all():
        raise NonFiniteError(
            "logits do not fit float16, in which soft labels are stored",
            found=f"a logit of magnitude {float(logits.abs().max()):g}",
            allowed=f"magnitudes up to {torch.finfo(torch.float16).max:g}",
            fix="train the teacher with a lower learning rate or more weight decay",
        )
    return stored.contiguous()


def check_index(soft: SoftLabels, classes: int) -> None:
    """Raise DamagedDataError where `index` names a class that is none, or one twice for a view."""
    for rows in soft.arrays["index"]:
        if int(rows.max()) >= classes:
            raise DamagedDataError(
                "soft labels name a class that is none",
                found=str(int(rows.max())),
                allowed=f"0 to {classes - 1}",
            )


def _k(soft: SoftLabels, classes: int) -> int:
    k = soft.attributes.get("k")
    if not isinstance(k, int) or not 1 <= k <= classes or soft.attributes.get("classes") != classes:
        raise DamagedDataError(
            "soft labels lack k and classes", found=repr(k), allowed=f"k of 1 to {classes}"
        )
    return k


def _index(soft: SoftLabels) -> Tensor:
    return torch.from_numpy(soft.arrays["index"].astype(np.int64))


def _float(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _pack(levels: np.ndarray) -> np.ndarray:
    """Two levels below 16 a byte, along the last dimension."""
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], axis=-1)
    return levels[..., ::2] | (levels[..., 1::2] << 4)


def _unpack(packed: np.ndarray, classes: int) -> np.ndarray:
    both = np.stack([packed & 15, packed >> 4], axis=-1)
    return both.reshape(*packed.shape[:-1], -1)[..., :classes]
