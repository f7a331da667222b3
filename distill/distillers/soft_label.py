"""Real images, each with one soft label from an early-stopped teacher.

The label of image x is the teacher's logits z(x) on the image as it is; a student learns softmax(z(x) / T).

Source: Qin et al., "A Label is Worth a Thousand Images in Dataset Distillation", NeurIPS 2024, section 3: with one
soft label an image, and a teacher stopped early (the fewer images, the earlier), random real images match or beat
synthesised ones. The released code's `--temp` multiplies the logits by T, that is, uses 1/T; here T divides, as
written in the paper. The paper tunes the teacher's epochs for each budget; here they are the recipe's
`teacher.train.epochs`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distill.cache import Network
from distill.cache.forward import logits_of
from distill.cache.teachers import TeacherConfig, train_teacher
from distill.contracts import (
    Context,
    DistilledSet,
    Estimate,
    Selection,
    Source,
    Split,
    Training,
)
from distill.labels.codecs import encode
from distill.models import describe
from distill.selection import Distiller, ImagesConfig, materialise, random_subset
from distill.training.config import Positive


class SoftLabel(Distiller):
    """Real images with one soft label each from an early-stopped teacher."""

    name = "soft_label"
    lacks = "has no images to label"
    takes = "labels"

    class Config(ImagesConfig):
        """Options.

        `ipc` random images a class are labelled; without it, the images of the step before.
        """

        teacher: TeacherConfig = TeacherConfig()
        temperature: Positive = 1.0

    config: Config

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        teacher = self.config.teacher
        images = self.images(classes=classes, before=before)
        return Estimate(images=images, trainings=(Training(teacher.model, teacher.train, train),))

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> DistilledSet:
        plain = self._images(ctx, source, previous)
        teacher = train_teacher(ctx, source, self.config.teacher, name="teacher")
        logits = _label(plain, teacher, ctx.device)
        right = float((logits.argmax(axis=1) == plain.labels.numpy()).mean())
        ctx.progress.note(
            f"the teacher gives the true class to {right:.1%} of {len(plain)} images", right=right
        )
        soft = encode(
            logits[None],
            codec="full",
            temperature=self.config.temperature,
            teacher=describe(teacher.model),
            teacher_epochs=self.config.teacher.train.epochs,
            teacher_valid_accuracy=teacher.facts["valid_accuracy"],
        )
        train = plain.train.model_copy(update={"temperature": self.config.temperature})
        return replace(plain, soft=soft, train=train)

    def _images(
        self, ctx: Context, source: Source, previous: DistilledSet | Selection | None
    ) -> DistilledSet:
        """The images to label: those of the step before, or random ones."""
        if isinstance(previous, DistilledSet):
            return previous
        if previous is None:
            chosen = random_subset(source, self.budget(source), seed=ctx.derive("images"))
            ones = np.ones(len(chosen), dtype=np.float32)
            previous = Selection(chosen, ones, np.zeros_like(ones), {"score": "none, always 0"})
        return materialise(previous, source, ctx.train)


def _label(plain: DistilledSet, teacher: Network, device: torch.device) -> np.ndarray:
    """The teacher's logits on the set's images as they are: float32 (N, C).

    Computed from the set itself and not from cached rows: a set's bytes then do not depend on what the cache holds.
    """
    split = Split(plain.images, plain.labels, fingerprint="")
    return logits_of(teacher, split, device=device).cpu().numpy()
