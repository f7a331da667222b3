"""The options of trajectory matching, and what of them contradicts itself."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill.cache.experts import ExpertConfig, ExpertTraining
from distill.matching.gradient import Gradient
from distill.matching.windows import StartEpochs
from distill.models import ModelSpec, model_config
from distill.selection import ImagesConfig
from distill.training.config import Augment, NonNegative, Positive, Strict

Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Experts(Strict):
    """Networks trained on the data by plain SGD, whose ways are followed.

    `epochs: null` trains as long as matching reads: `start_epochs.last` + `expert_epochs`. More make better judges of
    them for `init: right` and `labels: learned`, which ask experts as they are in the end. A `gsam_rho` above 0 makes
    their ways flatter (Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022).
    """

    model: ModelSpec = Field(default_factory=lambda: model_config("convnet"))
    count: Count = 100
    epochs: Count | None = None
    lr: Positive = 0.01
    momentum: Share = 0.0
    batch_size: Count = 256
    gsam_rho: NonNegative = 0.0
    gsam_alpha: NonNegative = 0.3


class MatchingConfig(ImagesConfig):
    """Options.

    Step sizes are of plain SGD on what networks take (`lr_images`), on the logarithm of the students' learning rate
    (`lr_log_lr`) and on the logits of learned labels (`lr_labels`).
    """

    experts: Experts = Experts()
    start_epochs: StartEpochs = StartEpochs()
    expert_epochs: Count = 2
    iterations: Count = 5000
    students: Count = 1
    inner_steps: Count = 30
    inner_batch: Count | None = None
    gradient: Gradient = "exact"
    segment: Count = 1
    init: Literal["real", "right", "noise"] = "real"
    labels: Literal["hard", "target", "learned"] = "hard"
    student_lr: Positive = 0.01
    lr_images: Positive = 100.0
    lr_log_lr: NonNegative = 0.1
    lr_labels: Positive = 2.0
    momentum: Share = 0.5
    labels_momentum: Share = 0.9
    average: Share | None = None
    augment: Augment = "dsa"
    zca: bool = False
    diverged: Positive = 10.0

    @model_validator(mode="after")
    def _window_is_recorded(self) -> Self:
        recorded = self.experts.epochs
        if recorded is not None and recorded < self.epochs_read:
            raise ValueError(
                f"start_epochs.last {self.start_epochs.last} + expert_epochs {self.expert_epochs} reaches past the "
                f"experts.epochs {recorded} that are recorded: {self._less_to_read(recorded)}raise experts.epochs "
                f"to {self.epochs_read}"
            )
        if self.segment > 1 and self.gradient != "exact":
            raise ValueError(
                f"segment {self.segment} belongs to gradient: exact, and gradient is {self.gradient}"
            )
        if self.segment > self.inner_steps:
            raise ValueError(f"segment {self.segment} is beyond inner_steps {self.inner_steps}")
        return self

    def _less_to_read(self, recorded: int) -> str:
        """The option that could be lowered alone, as words; none where none can."""
        window = self.start_epochs
        last = recorded - self.expert_epochs
        if last >= max(window.first, window.grow_from or 0):
            return f"lower start_epochs.last to {last}, or "
        if recorded > window.last:
            return f"lower expert_epochs to {recorded - window.last}, or "
        return ""

    @property
    def epochs_read(self) -> int:
        """The last epoch of an expert that matching can read."""
        return self.start_epochs.last + self.expert_epochs

    @property
    def expert_config(self) -> ExpertConfig:
        asked = self.experts
        return ExpertConfig(
            model=asked.model,
            experts=asked.count,
            train=ExpertTraining(
                lr=asked.lr,
                momentum=asked.momentum,
                batch_size=asked.batch_size,
                epochs=asked.epochs or self.epochs_read,
                augment=self.augment,
                gsam_rho=asked.gsam_rho,
                gsam_alpha=asked.gsam_alpha,
            ),
        )
