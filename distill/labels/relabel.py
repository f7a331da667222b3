"""Relabelling: teachers label the views that students will see.

One pass over the images an epoch, in the plan's order, in batches of the plan's size, so that labels that depend on
their batch (batch-specific soft labels, mixing) are those of the batch the student sees. Views are never stored: they
follow from the plan's counters. A killed run goes on behind the last pass that reached the disk.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from distill.contracts import Context, DistilledSet, Labelling, Passes, SoftLabels
from distill.errors import InputError
from distill.files import disk_errors, reserve, write_bytes_atomically
from distill.labels.calibration import Calibration
from distill.labels.codecs import KEPT, VIEWS, CodecConfig, encode, is_of_pairs, refuse_loss, refuse_unmixed
from distill.labels.ensemble import BatchNormMode, Combine, refuse_without_batch_norm
from distill.labels.projection import Projection
from distill.labels.view_labels import OnlineLabels, plan_attributes
from distill.models.projector import ProjectorModel
from distill.training.batches import DeviceImages, PlannedViews
from distill.training.config import LOGIT_LOSSES, Strict, TrainConfig
from distill.training.job import Pool, ViewPlan

_SAVE_SECONDS = 20.0
_WHOLE_BYTES = 1 << 30  # labels up to this many bytes leave their files and live in memory
_FEW_KEPT = 0.2  # share of views below which calibration is warned of


class Relabelling(Strict):
    """Options of relabelling; which views there are follows from the recipe's `train`.

    `passes` over the images are labelled, as many as the students' epochs if left out; with fewer, students draw
    batches from them. `labels: online` stores none: the teachers are asked again as students train. `batch_norm: batch`
    normalises by the (micro-)batch at hand. `calibration` drops and softens labels by the teachers' certainty. With a
    `projector` a public encoder learns to label as the teachers do, and the set stores how it differs.
    """

    passes: Annotated[int, Field(ge=1)] | None = None
    labels: Literal["stored", "online"] = "stored"
    codec: CodecConfig = CodecConfig()
    combine: Combine = "logits"
    batch_norm: BatchNormMode = "running"
    calibration: Calibration | None = None
    projector: Projection | None = None

    @property
    def checkpoints(self) -> int:
        """How many networks along a teacher's training label."""
        return 1 if self.projector is None else self.projector.checkpoints

    def check_teachers(
        self, networks: Mapping[str, nn.Module], *, classes: int, image_shape: tuple[int, int, int]
    ) -> None:
        """Raise InputError where these teachers, known by their names, cannot give such labels of C classes."""
        self.codec.check(classes)
        if self.projector is not None:
            with placed("projector"):
                self.projector.check(image_shape)
        if self.batch_norm == "batch":
            refuse_without_batch_norm(networks, where="batch_norm: batch", fix="leave batch_norm out")

    def check_files(self) -> None:
        """Raise InputError where a file that labels need is not there; costs nothing."""
        if self.projector is not None:
            with placed("projector"):
                self.projector.check_files()

    def check_trainings(self, trainings: Sequence[TrainConfig | None]) -> None:
        """Raise InputError where teachers trained so, or read from a file (None), cannot label as is asked for."""
        if self.projector is not None:
            with placed("projector"):
                self.projector.check_trainings(trainings)

    def check(self, train: TrainConfig, *, classes: int) -> None:
        """Raise InputError where students of `train` cannot learn from such labels of C classes."""
        if self.projector is not None:
            self._refuse_beside_projector()
        if self.labels == "online":
            if self.codec != CodecConfig():
                raise InputError(
                    "online labels are not stored, so that a codec has nothing to do",
                    where="codec",
                    found=self.codec.name,
                    fix="leave codec out, or set labels: stored",
                )
        else:
            self.codec.check(classes)
            refuse_loss(self.codec.name, train.loss, fix="change train.loss or the codec")
        refuse_unmixed(train, self.codec.name, fix="set train.mix: cutmix, or take another loss or codec")
        if self.calibration is not None and train.loss in LOGIT_LOSSES:
            raise InputError(
                f"the loss {train.loss} compares logits, and calibration softens labels as probabilities",
                where="calibration",
                found=f"train.loss: {train.loss}",
                allowed="cross_entropy or kl",
                fix="change train.loss, or leave calibration out",
            )
        if self.calibration is not None and train.mix not in ("none", "selfmix"):
            raise InputError(
                "views that are mixed with other images have no class of their own to be calibrated by",
                where="calibration",
                found=f"train.mix: {train.mix}",
                allowed="mix: none or selfmix",
                fix="change train.mix, or leave calibration out",
            )

    def _refuse_beside_projector(self) -> None:
        """Raise InputError for options that say how others label or store."""
        for name in ("labels", "codec", "batch_norm", "calibration"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise InputError(
                    f"a projector labels as students train, and {name} is of labels by the teachers themselves",
                    where=name,
                    found=str(getattr(self, name)),
                    fix=f"leave {name} out, or leave projector out",
                )

    def refuse_lonely_images(self, train: TrainConfig, images: int) -> None:
        """Raise InputError where a teacher would normalise a micro-batch of one image by itself."""
        if self.batch_norm == "running":
            return
        least = images % train.batch_size or min(train.batch_size, images)
        if least // min(train.micro_batches, least) < 2:
            raise InputError(
                "a micro-batch of one image has no statistics to be normalised by",
                where="batch_norm: batch",
                found=f"{images} images in batches of {train.batch_size}, the last in {train.micro_batches} parts of "
                f"{least} images",
                allowed="two images or more in every part",
                fix="change train.batch_size or train.micro_batches, or set batch_norm: running",
            )

    def estimate(self, models: Sequence[Strict], *, classes: int) -> Labelling:
        """What labelling by these teachers takes, for a dry run."""
        if self.projector is not None:
            return Labelling((ProjectorModel(encoder=self.projector.encoder),), self.passes, 0)
        return Labelling(
            tuple(models),
            self.passes,
            0 if self.labels == "online" else self.codec.view_bytes(classes) + (self.calibration is not None),
        )

    def fit_passes(self, models: Sequence[Strict]) -> list[Passes]:
        """What fitting a projector to these teachers takes, for a dry run."""
        if self.projector is None:
            return []
        how = self.projector
        passes = [
            Passes(model, how.batch_size, how.steps * how.checkpoints, kept=1, copies=1) for model in models
        ]
        encoder = ProjectorModel(encoder=how.encoder)
        return [*passes, Passes(encoder, how.batch_size, 3 * how.steps, kept=2, copies=1)]

    def plan(self, train: TrainConfig, *, seed: int) -> ViewPlan:
        """The views that students of `train` will see."""
        return ViewPlan(
            seed=seed,
            epochs=min(self.passes or train.epochs, train.epochs),
            batch_size=train.batch_size,
            augment=train.augment,
            crop_scale=train.crop_scale,
            mix=train.mix,
            mix_alpha=train.mix_alpha,
        )


@contextmanager
def placed(option: str) -> Iterator[None]:
    """Put the name that a method gives these options before the place of an error in them."""
    fields = Projection.model_fields if option == "projector" else Relabelling.model_fields
    try:
        yield
    except InputError as error:
        if re.split("[.:]", error.where or "")[0] in fields:
            error.where = f"{option}.{error.where}"
        raise


def relabel(
    ctx: Context,
    plain: DistilledSet,
    labels: OnlineLabels,
    *,
    codec: CodecConfig,
    attributes: Mapping[str, Any],
) -> SoftLabels:
    """The labels of all views of the plan, stored by a codec.

    Args:
        ctx: its device, progress, and the folder where labels lie until the set is written.
        plain: the images.
        labels: who labels which views.
        codec: how they are stored.
        attributes: facts that the labels carry, `teacher` and `temperature` among them.

    Raises:
        NonFiniteError: a teacher gave NaN or infinite logits; the error names it.
    """
    images = DeviceImages(Pool(plain.images, plain.labels, plain.preprocessing), ctx.device)
    views = PlannedViews(labels.plan, images)
    ready = labels.on(ctx.device)
    facts: dict[str, Any] = {**attributes, VIEWS: plan_attributes(labels.plan)}
    store = _Store(ctx.scratch / "labels", passes=labels.plan.epochs)
    if store.done:
        ctx.progress.note(f"labelling goes on behind {store.done} of {labels.plan.epochs} passes")
    saved = time.monotonic()
    with ctx.progress.task("label views", total=labels.plan.epochs, unit="pass") as task:
        task.advance(store.done)
        for epoch in range(store.done, labels.plan.epochs):
            logits, kept = _pass(ready, views, epoch)
            pairs = labels.plan.pairs(epoch, views.order(epoch), ready.classes)[None]
            soft = encode(logits[None], codec=codec.name, pairs=pairs, **{**facts, **codec.options})
            arrays = dict(soft.arrays)
            if kept is not None:
                arrays[KEPT] = kept.cpu().numpy().astype(np.uint8)[None]
            store.put(epoch, arrays)
            task.advance(1)
            if time.monotonic() - saved > _SAVE_SECONDS:
                store.save(epoch + 1)
                saved = time.monotonic()
    store.save(labels.plan.epochs)
    stored = store.arrays()
    if labels.calibration is not None:
        tell_kept(ctx, float(stored[KEPT].mean()))
    told = codec.options or is_of_pairs(codec.name)
    options = {**codec.options, "classes": len(plain.classes)} if told else {}
    return SoftLabels(codec.name, stored, {**facts, **options})


def tell_kept(ctx: Context, share: float) -> None:
    """Say which share of the views calibration keeps.

    Raises:
        InputError: it keeps not one.
    """
    fix = "widen hopeless and trivial, train the teachers longer or shorter, or leave calibration out"
    if share == 0:
        raise InputError("calibration drops every view", where="calibration", found="0% kept", fix=fix)
    text = f"calibration keeps {share:.1%} of the views"
    if share < _FEW_KEPT:
        ctx.progress.warn(f"{text}: {fix}", kept=share)
    else:
        ctx.progress.note(text, kept=share)


def kept_of_first_pass(ctx: Context, plain: DistilledSet, labels: OnlineLabels) -> float:
    """The share of views that calibration keeps, by one pass."""
    images = DeviceImages(Pool(plain.images, plain.labels, plain.preprocessing), ctx.device)
    _, kept = _pass(labels.on(ctx.device), PlannedViews(labels.plan, images), 0)
    return 1.0 if kept is None else float(kept.mean())


def _pass(labels: OnlineLabels, views: PlannedViews, epoch: int) -> tuple[Tensor, Tensor | None]:
    """Logits (N, C) and kept (N,) of one pass, in its order."""
    found = list(_batches(labels, views, epoch))
    kept = [each for _, each in found if each is not None]
    return torch.cat([logits for logits, _ in found]), torch.cat(kept) if kept else None


def _batches(labels: OnlineLabels, views: PlannedViews, epoch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in views.starts:
        images, index = views.batch(epoch, start)
        yield labels.batch(epoch, start, images, index)


class _Store:
    """Arrays (passes, ...) in files of a folder, which grow pass by pass.

    Args:
        folder: theirs alone.
        passes: how many there will be.
    """

    def __init__(self, folder: Path, *, passes: int) -> None:
        self.folder, self.passes = folder, passes
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._mark = folder / "done.json"
        told: dict[str, Any] = {"passes": 0, "names": []}
        if self._mark.exists():
            told = json.loads(self._mark.read_text())
        self.done: int = told["passes"]
        self._files: dict[str, np.memmap] = {
            name: np.lib.format.open_memmap(self._path(name), mode="r+") for name in told["names"]
        }

    def put(self, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays (1, ...) of one pass."""
        for name, array in arrays.items():
            if name not in self._files:
                path = self._path(name)
                with disk_errors(path):
                    self._files[name] = np.lib.format.open_memmap(
                        path, mode="w+", dtype=array.dtype, shape=(self.passes, *array.shape[1:])
                    )
                    reserve(path)
            self._files[name][number] = array[0]

    def save(self, done: int) -> None:
        """Bring everything to disk, then say how many passes are."""
        for name, file in self._files.items():
            with disk_errors(self._path(name)):
                file.flush()
        write_bytes_atomically(
            self._mark, json.dumps({"passes": done, "names": sorted(self._files)}).encode()
        )
        self.done = done

    def arrays(self) -> dict[str, np.ndarray]:
        """All of them; in memory where they are small."""
        whole = sum(file.nbytes for file in self._files.values()) <= _WHOLE_BYTES
        return {name: np.array(file) if whole else file for name, file in self._files.items()}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"
