"""Codecs that store the k largest probabilities at the labels' temperature T, p = softmax(z / T).

Source: Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022 (marginal smoothing
and marginal re-normalisation), where T is 1. What they decode to are logits with these probabilities at T.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError
from distill.labels.codec import Codec, index_dtype, register
from distill.labels.logit_codecs import check_index

_NEVER = 1e-30  # stands for a probability of 0, whose logarithm no network could be compared with


class _Marginal(Codec):
    """The k largest probabilities: arrays `values` float16 and `index` (V, N, k), the largest first."""

    options = ("k",)
    holds_logits = False
    belongs_to_temperature = True

    def encode(
        self, logits: Tensor, attributes: Mapping[str, Any], pairs: Tensor | None
    ) -> dict[str, np.ndarray]:
        values, index = (
            (logits.float() / attributes["temperature"]).softmax(dim=2).topk(attributes["k"], dim=2)
        )
        return {
            "values": values.to("cpu", torch.float16).numpy(),
            "index": index.cpu().numpy().astype(index_dtype(logits.shape[2])),
        }

    def shapes(
        self, soft: SoftLabels, *, images: int, classes: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        k = soft.attributes.get("k")
        if not isinstance(k, int) or not 1 <= k <= classes or soft.attributes.get("classes") != classes:
            raise DamagedDataError(
                "soft labels lack k and classes", found=repr(k), allowed=f"k of 1 to {classes}"
            )
        return {"values": ("f2", (images, k)), "index": (index_dtype(classes).str, (images, k))}

    def check_values(self, soft: SoftLabels, *, classes: int) -> None:
        super().check_values(soft, classes=classes)
        check_index(soft, classes)
        if any(float(rows.min()) < 0 or float(rows.max()) > 1 for rows in soft.arrays["values"]):
            raise DamagedDataError("soft labels hold probabilities out of range", allowed="0 to 1")

    def _scattered(self, soft: SoftLabels, values: Tensor, rest: Tensor) -> Tensor:
        """Logits of probabilities `values` (V, N, k), and `rest` (V, N) for every other class."""
        index = torch.from_numpy(soft.arrays["index"].astype(np.int64))
        p = rest[..., None].expand(*rest.shape, soft.attributes["classes"]).clone()
        return p.scatter_(2, index, values).clamp(min=_NEVER).log() * soft.attributes["temperature"]


@register
class MarginalSmoothing(_Marginal):
    """The k largest probabilities, and what is left of 1 shared equally by the other classes."""

    name = "marginal_smoothing"

    def decode(self, soft: SoftLabels, pairs: Tensor | None) -> Tensor:
        values = torch.from_numpy(soft.arrays["values"].astype(np.float32))
        others = max(soft.attributes["classes"] - soft.attributes["k"], 1)
        return self._scattered(soft, values, (1 - values.sum(dim=2)).clamp(min=0) / others)


@register
class MarginalRenormalised(_Marginal):
    """The k largest probabilities, made to sum to 1; the other classes have none."""

    name = "marginal_renormalised"

    def decode(self, soft: SoftLabels, pairs: Tensor | None) -> Tensor:
        values = torch.from_numpy(soft.arrays["values"].astype(np.float32))
        total = values.sum(dim=2, keepdim=True).clamp(min=_NEVER)
        return self._scattered(soft, values / total, torch.zeros(values.shape[:2]))
