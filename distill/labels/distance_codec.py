"""The codec of distance-based representative transfer (DBR): two numbers a view.

A view x is mixed from images of classes o and a. With teacher probabilities p = softmax(z(x) / T), what is kept are
the teacher's distances to the two one-hot labels by cross-entropy (Tran et al., "Enhancing Dataset Distillation via
Non-Critical Region Refinement", CVPR 2025; "two distances per instance", which with a storage of 1/500 of full labels
at 1000 classes can only mean per view),

    d_o = -log p_o,    d_a = -log p_a.

The classes cost nothing: they follow from the views' counters and the images' labels. So the two numbers are a
marginal of two classes (compare marginal smoothing in probability_codecs.py, which must store which classes they
are), and what they decode to are logits whose probabilities at T are p_o, p_a, and the rest shared equally by the
others: (1 - p_o - p_a) / (C - 2). Where o and a are one class, its p counts once, and the others share 1 - p_o.

A student may learn from them as they are (`train.loss: dbr_l1` or `dbr_l2`, the paper's form with the norm left open)
or as that marginal target (`kl`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.contracts import SoftLabels
from distill.errors import DamagedDataError
from distill.labels.codec import Codec, register
from distill.labels.logit_codecs import half

_NEVER = 1e-30  # stands for a probability of 0, whose logarithm no network could be compared with


@register
class Distances(Codec):
    """The distances to the classes of the two images of a mixed view: array `distances` float16 (V, N, 2)."""

    name = "dbr"
    holds_logits = False
    belongs_to_temperature = True
    of_pairs = True

    def encode(
        self, logits: Tensor, attributes: Mapping[str, Any], pairs: Tensor | None
    ) -> dict[str, np.ndarray]:
        assert pairs is not None, "the classes of the two images of each view"
        scaled = logits.float() / attributes["temperature"]
        distances = -F.log_softmax(scaled, dim=2).gather(2, pairs.to(logits.device))
        return {"distances": half(distances.clamp(min=0)).numpy()}

    def decode(self, soft: SoftLabels, pairs: Tensor | None) -> Tensor:
        assert pairs is not None, "the classes of the two images of each view"
        classes = soft.attributes["classes"]
        own, other = torch.from_numpy(np.exp(-soft.arrays["distances"].astype(np.float32))).unbind(dim=2)
        pairs = pairs.cpu()
        two = pairs[..., 0] != pairs[..., 1]
        left = (1 - own - torch.where(two, other, 0.0)).clamp(min=0)
        rest = left / (classes - 1 - two.float()).clamp(min=1)
        p = rest[..., None].expand(*rest.shape, classes).clone()
        # Of one class twice both numbers are the same.
        p.scatter_(2, pairs, torch.stack([own, torch.where(two, other, own)], dim=2))
        return p.clamp(min=_NEVER).log() * soft.attributes["temperature"]

    def shapes(
        self, soft: SoftLabels, *, images: int, classes: int
    ) -> dict[str, tuple[str, tuple[int, ...]]]:
        if soft.attributes.get("classes") != classes:
            raise DamagedDataError(
                "distances do not say of how many classes they are",
                found=repr(soft.attributes.get("classes")),
                allowed=str(classes),
            )
        return {"distances": ("f2", (images, 2))}

    def check_values(self, soft: SoftLabels, *, classes: int) -> None:
        super().check_values(soft, classes=classes)
        if any(float(rows.min()) < 0 for rows in soft.arrays["distances"]):
            raise DamagedDataError("soft labels hold distances below 0", allowed="0 or more")
