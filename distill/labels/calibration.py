"""Region calibration: what to make of views that teach nothing, or the wrong thing.

By the teacher's greatest probability p of a view (Shen, "FerKD: Surgical Label Adaptation for Efficient Distillation",
ICCV 2023): a view below `hopeless` or above `trivial` is not learned from; one below `uncertain` gets a softened hard
label, 1 - e on its class and e / (C - 1) on the others; the rest keep the teacher's. The paper's training code was
never released and its thresholds are quoted from memory, so that they are to be taken as ours.

Where views are mixed with other images they have no one class, and calibration is refused.
"""

from __future__ import annotations

from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.training.config import Strict

Probability = Annotated[float, Field(ge=0, le=1)]


class Calibration(Strict):
    """Thresholds on the teacher's greatest probability, and the smoothing of hard labels."""

    hopeless: Probability = 0.15
    uncertain: Probability = 0.3
    trivial: Probability = 0.95
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.hopeless <= self.uncertain <= self.trivial:
            raise ValueError(
                f"thresholds must rise: hopeless {self.hopeless:g}, uncertain {self.uncertain:g}, "
                f"trivial {self.trivial:g}"
            )
        return self

    def apply(self, logits: Tensor, classes: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
        """Calibrated logits (B, C), and which views to learn from, bool (B,).

        Args:
            logits: of the teachers, float32 (B, C).
            classes: of the images, int64 (B,).
            temperature: at which labels are softened; the probabilities compared with the thresholds are those at 1.
        """
        best = logits.softmax(dim=1).amax(dim=1)
        kept = (best >= self.hopeless) & (best <= self.trivial)
        count = logits.shape[1]
        hard = torch.full_like(logits, self.smoothing / max(count - 1, 1))
        hard.scatter_(1, classes[:, None], 1 - self.smoothing)
        as_logits = (hard.log() * temperature).half().float()
        return torch.where((best < self.uncertain)[:, None], as_logits, logits), kept
