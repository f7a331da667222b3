"""Images that lead a network along the way of experts: trajectory matching with the exact gradient.

Students take T steps on the set from a checkpoint of an expert, and images, learning rate and labels learn to bring
them where the expert was M epochs later: equations, gradient and memory in distill/matching/gradient.py.

Sources: Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022 (the method); Cui et
al., "Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory", ICML 2023 (`gradient: first_order`, `labels:
target`); Guo et al., "Towards Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching", ICLR 2024
(`start_epochs`, `init: right`, `labels: learned`); Du et al., "Minimizing the Accumulated Trajectory Error to Improve
Dataset Distillation", CVPR 2023 (`average`, and the experts' `gsam_rho`).

Where this differs from the released codes: the gradient is exact in memory that does not fill with the steps; beta is
held as its logarithm; experts train no longer than they are read, unless they are asked to; augmentation is drawn for
each image; the set carries beta, the augmentation and, in pixels that anyone can show, unwhitened images; nothing is
chosen by test accuracy: the last step counts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from distill.cache.experts import record_trajectories
from distill.cache.trajectories import Trajectories
from distill.contracts import (
    Context,
    DistilledSet,
    Estimate,
    Passes,
    Preprocessing,
    Selection,
    Source,
    StepKind,
    Training,
)
from distill.errors import InputError, NonFiniteError
from distill.labels.codecs import encode
from distill.matching.admission import refuse_network, refuse_still
from distill.matching.gradient import Learned, Matched
from distill.matching.initial import mean_logits, noise, rightly_classified
from distill.matching.learning import Rates, State
from distill.matching.networks import FlatNetworks
from distill.matching.options import Experts, MatchingConfig
from distill.matching.students import Students
from distill.models import build, describe
from distill.models.cost import forward_cost
from distill.preprocessing import Transform
from distill.selection import Distiller, random_subset
from distill.training.batches import DeviceImages
from distill.training.config import TrainConfig
from distill.training.job import Pool
from distill.training.memory import memory_errors
from distill.training.threads import at_most_threads, useful_threads
from distill.whitening import fit_zca

_SAVE_SECONDS = 20.0
_TELL_STEPS = 50
_FALLEN = 0.01  # of the rate that students began with: they went astray, and matching has stopped them
_PATIENCE = 50
_FIX_MEMORY = "set gradient: exact, lower segment, students or inner_batch, or use a smaller network"


class TrajectoryMatching(Distiller):
    """Images that lead a network along the way of experts trained on the real data."""

    name = "trajectory"
    lacks = "does not know how many images to learn"
    takes = "begins with"

    Config = MatchingConfig
    config: MatchingConfig

    def check_place(self, follows: StepKind | None) -> None:
        super().check_place(follows)
        if follows is not None and self.config.init != "real":
            raise InputError(
                "trajectory begins with the images of the step before, and init asks for others",
                found=f"init: {self.config.init}",
                fix="remove init, or remove the step before",
            )

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        if self.config.ipc is not None:
            self._refuse_batch_beyond(self.config.ipc * len(source.classes))
        try:
            model = self.config.experts.model
            refuse_network(model, image_shape=source.image_shape, classes=len(source.classes))
        except InputError as error:
            error.where = error.where or "trajectory.experts.model"
            raise

    def check_previous(self, images: int) -> None:
        """Raise InputError where so many images of the step before cannot serve."""
        self._refuse_batch_beyond(images)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        config, asked = self.config, self.config.expert_config
        images = self.images(classes=classes, before=before)
        expert = Training(asked.model, asked.train, train, checkpoints=asked.train.epochs + 1)
        steps = config.iterations * config.students * config.inner_steps
        unrolled = config.inner_steps if config.gradient == "unroll" else config.segment
        matching = Passes(
            asked.model,
            batch=config.inner_batch or images,
            count=steps * (9 if config.gradient == "unroll" else 12),
            kept=4 * unrolled,
            copies=3 + config.inner_steps // unrolled,
            stacked=config.students,
        )
        return Estimate(
            images=images,
            trainings=(expert,) * asked.experts,
            passes=(matching,),
            pixel_bytes=2,
            whitening=config.zca,
        )

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> DistilledSet:
        config = self.config
        if previous is not None:
            self.check_previous(_size(previous))
        preprocessing = fit_zca(source.train.images) if config.zca else Preprocessing(source.mean, source.std)
        experts = record_trajectories(ctx, source, config.expert_config, preprocessing=preprocessing)
        if len(source.classes) > 1:
            window = config.start_epochs
            starts = range(window.first, window.last + 1)
            refuse_still(experts, starts=starts, epochs=config.expert_epochs)
        with memory_errors("trajectory matching", fix=_FIX_MEMORY):
            networks = _networks(config.experts, source, experts, ctx.device)
            last = _Checkpoints(experts, experts.epochs[-1], ctx.device)
            images, labels = self._begin(ctx, source, previous, preprocessing, networks, last)
            logits = None
            if config.labels == "learned":
                logits = mean_logits(networks, last, images, labels.to(ctx.device))
            students = self._students(ctx, networks, experts, len(images))
            with at_most_threads(self._threads(source, students.batch)):
                state = self._learn(ctx, source, students, images, labels.to(ctx.device), logits)
            if config.labels == "target":
                goals = _Checkpoints(experts, config.epochs_read, ctx.device)
                logits = mean_logits(networks, goals, state.result, None)
            elif config.labels == "learned":
                logits = state.labels
        return self._emit(ctx, source, state, labels, logits, preprocessing)

    def _begin(
        self,
        ctx: Context,
        source: Source,
        previous: DistilledSet | Selection | None,
        preprocessing: Preprocessing,
        networks: FlatNetworks,
        last: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Images as networks take them, (N, Ch, H, W) on the device, and classes (N,)."""
        if isinstance(previous, DistilledSet):
            if previous.soft is not None:
                ctx.progress.note(
                    f"the soft labels of the step before are left out: trajectory has labels: {self.config.labels}"
                )
            pool = Pool(previous.images, previous.labels, preprocessing)
            return _gather(DeviceImages(pool, ctx.device)), previous.labels
        train = Pool(source.train.images, source.train.labels, preprocessing)
        if previous is not None:
            rows = previous.indices
        else:
            budget, seed = self.budget(source), ctx.derive("images")
            if self.config.init == "right":
                whole = DeviceImages(train, ctx.device)
                rows = rightly_classified(source, whole, networks, last, budget, seed=seed)
            else:
                rows = random_subset(source, budget, seed=seed)
        chosen = torch.from_numpy(rows)
        labels = source.train.labels[chosen]
        if self.config.init == "noise":
            return noise(
                (len(rows), *source.image_shape), seed=ctx.derive("images"), device=ctx.device
            ), labels
        return _gather(DeviceImages(train, ctx.device, chosen=chosen)), labels

    def _students(self, ctx: Context, networks: FlatNetworks, experts: Trajectories, images: int) -> Students:
        config = self.config
        return Students(
            networks=networks,
            experts=experts,
            count=config.students,
            epochs=config.expert_epochs,
            start=config.start_epochs,
            steps=config.inner_steps,
            batch=config.inner_batch or images,
            augment=config.augment,
            gradient=config.gradient,
            segment=config.segment,
            seed=ctx.derive("matching"),
            device=ctx.device,
            stacked=ctx.device.type != "cpu",
        )

    def _threads(self, source: Source, batch: int) -> int:
        """What an inner step can keep busy on a CPU."""
        cost = forward_cost(self.config.experts.model, source.image_shape, len(source.classes))
        return useful_threads(3 * batch * cost.flops)

    def _learn(
        self,
        ctx: Context,
        source: Source,
        students: Students,
        images: Tensor,
        labels: Tensor,
        logits: Tensor | None,
    ) -> State:
        """Take the outer steps; from where a killed run left off."""
        config, path = self.config, _state_path(ctx)
        state = State.begin(images, lr=config.student_lr, labels=logits, average=config.average is not None)
        if len(source.classes) == 1:
            ctx.progress.note(
                "experts of one class learn nothing to match: the images stay what they began as"
            )
            return state
        identity = self._identity(ctx, source, state)
        state = self._left_off(ctx, state, identity)
        saved, whole = time.monotonic(), True
        losses: list[Tensor] = []
        title = f"match {describe(config.experts.model)}"
        with ctx.progress.task(title, total=config.iterations, unit="step") as task:
            task.advance(state.step)
            try:
                while state.step < config.iterations:
                    learned = Learned(
                        state.images,
                        labels if logits is None else state.labels,
                        state.lr,
                        learns_labels=logits is not None,
                    )
                    matched = students.match(state.step, learned, own_labels=config.labels == "target")
                    whole = False
                    taken = state.learn(matched, self._rates)
                    whole = True
                    if taken:
                        losses.append(matched.loss.mean())
                    elif state.skipped == 1:
                        self._tell_first_skip(ctx, state, matched)
                    task.advance(1)
                    ended = state.step == config.iterations
                    if ended or state.step % _TELL_STEPS == 0:
                        self._record(ctx, state, losses)
                    if ended or time.monotonic() - saved > _SAVE_SECONDS:
                        state.save(path, identity=identity)
                        saved = time.monotonic()
            except KeyboardInterrupt:
                if (
                    whole
                ):  # between two steps; one that was being taken is taken again, from the last state kept
                    state.save(path, identity=identity)
                raise
        self._tell(ctx, state)
        return state

    def _identity(self, ctx: Context, source: Source, state: State) -> str:
        """Names what a kept state must be a state of."""
        shapes = {name: list(value.shape) for name, value in vars(state).items() if isinstance(value, Tensor)}
        facts = [self.config.model_dump(mode="json"), ctx.seed, source.train.fingerprint, shapes]
        return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _left_off(self, ctx: Context, begun: State, identity: str) -> State:
        """Where a killed run left off, or where it begins."""
        path = _state_path(ctx)
        if not path.exists():
            return begun
        kept = State.load(path, ctx.device, identity=identity)
        if kept is None:
            ctx.progress.warn(f"{path} is damaged, or was kept by another run: matching begins anew")
            return begun
        ctx.progress.note(f"matching goes on after {kept.step} of {self.config.iterations} steps")
        return kept

    @property
    def _rates(self) -> Rates:
        config = self.config
        return Rates(
            images=config.lr_images,
            labels=config.lr_labels,
            log_lr=config.lr_log_lr,
            momentum=config.momentum,
            labels_momentum=config.labels_momentum,
            average=config.average,
            diverged=config.diverged,
            patience=min(_PATIENCE, config.iterations),
        )

    def _record(self, ctx: Context, state: State, losses: list[Tensor]) -> None:
        """To the log: the mean loss since the last record, null where all steps were left out, and beta."""
        loss = float(torch.stack(losses).mean()) if losses else None
        ctx.progress.record(
            "match", step=state.step, loss=loss, student_lr=float(state.lr), skipped=state.skipped
        )
        losses.clear()

    def _tell_first_skip(self, ctx: Context, state: State, matched: Matched) -> None:
        ctx.progress.warn(
            f"step {state.step} is left out: its loss is {float(matched.loss.max()):.4g}, or what it leads to is not "
            "finite; log.jsonl counts those that follow"
        )

    def _tell(self, ctx: Context, state: State) -> None:
        lr, began = float(state.lr), self.config.student_lr
        ctx.progress.note(f"the students' learning rate became {lr:.4g}")
        if lr < began * _FALLEN:
            ctx.progress.warn(
                f"the students' learning rate fell from {began:g} to {lr:.4g}: they hardly move, and the set has "
                "learned little; begin with a lower student_lr, or lower lr_log_lr"
            )
        if state.skipped:
            ctx.progress.warn(
                f"{state.skipped} of {state.step} steps were left out because their loss, or what they led to, was not "
                f"finite, or their loss above {self.config.diverged:g}; lower lr_images, lr_log_lr or inner_steps if "
                "they are many"
            )

    def _emit(
        self,
        ctx: Context,
        source: Source,
        state: State,
        labels: Tensor,
        logits: Tensor | None,
        preprocessing: Preprocessing,
    ) -> DistilledSet:
        """The set: pixels that anyone can show, and the training that it was made for."""
        teacher = describe(self.config.experts.model)
        soft = None
        training: dict[str, Any] = {
            "optimizer": "sgd",
            "lr": float(state.lr),
            "augment": self.config.augment,
            "mix": "none",
        }
        if logits is not None:
            soft = encode(logits.cpu()[None], codec="full", temperature=1.0, teacher=teacher)
            training |= {"temperature": 1.0, "loss": "cross_entropy"}
        return DistilledSet(
            images=_float16(Transform(preprocessing).pixels(state.result.cpu())),
            labels=labels,
            classes=source.classes,
            preprocessing=preprocessing,
            train=TrainConfig.model_validate({**ctx.train.model_dump(), **training}),
            soft=soft,
            provenance={"student_lr": float(state.lr), "steps": state.step, "skipped": state.skipped},
        )

    def _refuse_batch_beyond(self, images: int) -> None:
        batch = self.config.inner_batch
        if batch is not None and batch > images:
            raise InputError(
                "an inner batch is larger than the set",
                where="trajectory.inner_batch",
                found=f"{batch}, and {images} images",
                allowed=f"1 to {images}, or null for all",
                fix="lower inner_batch",
            )


class _Checkpoints(Sequence[Tensor]):
    """The weights (P,) of every expert after `epoch` epochs, read when they are asked for."""

    def __init__(self, experts: Trajectories, epoch: int, device: torch.device) -> None:
        self.experts, self.epoch, self.device = experts, epoch, device

    def __len__(self) -> int:
        return self.experts.shape[0]

    @overload
    def __getitem__(self, number: int) -> Tensor: ...
    @overload
    def __getitem__(self, number: slice) -> list[Tensor]: ...
    def __getitem__(self, number: int | slice) -> Tensor | list[Tensor]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.experts.after(number, self.epoch).to(self.device)


def _networks(asked: Experts, source: Source, experts: Trajectories, device: torch.device) -> FlatNetworks:
    module = build(asked.model, image_shape=source.image_shape, classes=len(source.classes), seed=0)
    return FlatNetworks(module.to(device), experts.layout)


def _float16(pixels: Tensor) -> Tensor:
    """Pixels as a set holds them.

    Raises:
        NonFiniteError: they have left what float16 can hold.
    """
    held = pixels.half().contiguous()
    if not bool(held.isfinite().all()):
        raise NonFiniteError(
            "learned images have left the range of float16, which a set holds",
            where="trajectory",
            found=f"pixels up to {float(pixels.abs().max()):g} times white",
            fix="lower lr_images (a tenth is a good next try)",
        )
    return held


def _gather(images: DeviceImages) -> Tensor:
    return images.gather(torch.arange(len(images), device=images.device))


def _size(previous: DistilledSet | Selection) -> int:
    return len(previous) if isinstance(previous, DistilledSet) else len(previous.indices)


def _state_path(ctx: Context) -> Path:
    return ctx.scratch / "matching.npz"
