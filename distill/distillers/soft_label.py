"""Real or given images, with soft labels from a teacher: one label an image, or one of every view.

Without `views` the label of image x is the teacher's logits z(x) on the image as it is; a student learns
softmax(z(x) / T). Source: Qin et al., "A Label is Worth a Thousand Images in Dataset Distillation", NeurIPS 2024,
section 3: with one soft label an image, and a teacher stopped early (the fewer images, the earlier), random real images
match or beat synthesised ones. The released code's `--temp` multiplies the logits by T, that is, uses 1/T; here T
divides, as written in the paper. The paper tunes the teacher's epochs for each budget; here they are the recipe's
`teacher.train.epochs`.

With `views` the teacher labels every view that students will see (Shen and Xing, "A Fast Knowledge Distillation
Framework for Visual Recognition", ECCV 2022): distill/labels/relabel.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distill.cache import Network
from distill.cache.forward import logits_of
from distill.cache.teachers import TeacherConfig, checkpoint_epochs, train_teacher
from distill.contracts import (
    Context,
    DistilledSet,
    Estimate,
    Selection,
    Source,
    Split,
    StepKind,
    Training,
)
from distill.labels.codecs import encode, refuse_distances
from distill.labels.ensemble import Ensemble
from distill.labels.labelling import with_labels
from distill.labels.pool import PoolTeacher, outlines
from distill.labels.relabel import Relabelling, placed
from distill.labels.set_teachers import told
from distill.selection import Distiller, ImagesConfig, images_before
from distill.training.config import Positive, TrainConfig


class SoftLabel(Distiller):
    """Real images with one soft label each from an early-stopped teacher."""

    name = "soft_label"
    lacks = "has no images to label"
    takes = "labels"

    class Config(ImagesConfig):
        """Options.

        `ipc` random images a class are labelled; without it, the images of the step before. `views` labels every view
        that students see, and not the images as they are.
        """

        teacher: TeacherConfig = TeacherConfig()
        temperature: Positive = 1.0
        views: Relabelling | None = None

    config: Config

    @property
    def asks_teachers(self) -> bool:
        return True

    def check_files(self) -> None:
        if self.config.views is not None:
            with placed("views"):
                self.config.views.check_files()

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        if self.config.views is not None:
            teacher = PoolTeacher(model=self.config.teacher.model, train=self.config.teacher.train)
            with placed("views"):
                self.config.views.check_teachers(
                    outlines([teacher], source), classes=len(source.classes), image_shape=source.image_shape
                )
                self.config.views.check_trainings([teacher.train])

    def check_training(self, train: TrainConfig, *, classes: int) -> None:
        if self.config.views is None:
            refuse_distances(train.loss, fix="change train.loss, or have views labelled (views: {})")
        else:
            with placed("views"):
                self.config.views.check(train, classes=classes)
                if self.config.ipc is not None:
                    self.config.views.refuse_lonely_images(train, self.config.ipc * classes)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        teacher = self.config.teacher
        images = self.images(classes=classes, before=before)
        views = self.config.views
        return Estimate(
            images=images,
            passes=() if views is None else tuple(views.fit_passes([teacher.model])),
            trainings=(Training(teacher.model, teacher.train, train),),
            labelling=None if views is None else views.estimate([teacher.model], classes=classes),
        )

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> DistilledSet:
        asked = self.config
        plain = images_before(self, ctx, source, previous)
        if asked.views is not None:  # the step before may have changed the training
            asked.views.check(plain.train, classes=len(source.classes))
        epochs = checkpoint_epochs(asked.teacher.train, 1 if asked.views is None else asked.views.checkpoints)
        teacher = train_teacher(ctx, source, asked.teacher, name="teacher", checkpoints=epochs)
        logits = _label(plain, teacher, ctx.device)
        right = float((logits.argmax(axis=1) == plain.labels.numpy()).mean())
        ctx.progress.note(
            f"the teacher gives the true class to {right:.1%} of {len(plain)} images", right=right
        )
        facts = {
            "teacher_epochs": asked.teacher.train.epochs,
            "teacher_valid_accuracy": teacher.facts["valid_accuracy"],
        }
        pooled = [PoolTeacher(model=asked.teacher.model, train=asked.teacher.train)]
        if asked.views is not None:
            return with_labels(
                ctx,
                source,
                plain,
                pooled,
                [teacher],
                [1.0],
                asked.views,
                temperature=asked.temperature,
                attributes=facts,
            )
        ensemble = Ensemble((teacher,), (1.0,), asked.temperature, plain.preprocessing)
        soft = encode(logits[None], codec="full", **told(ensemble, pooled), **facts)
        train = plain.train.model_copy(update={"temperature": asked.temperature})
        return replace(plain, soft=soft, train=train)


def _label(plain: DistilledSet, teacher: Network, device: torch.device) -> np.ndarray:
    """The teacher's logits on the set's images as they are: float32 (N, C).

    Computed from the set itself and not from cached rows: a set's bytes then do not depend on what the cache holds.
    """
    split = Split(plain.images, plain.labels, fingerprint="")
    return logits_of(teacher, split, device=device).cpu().numpy()
