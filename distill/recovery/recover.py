"""Recovery: images are learned until teachers take them for their classes and know their statistics.

Images come in groups whose statistics are taken together: one of each class, up to 100 classes, for each number of an
image within its class; or all of one class, where statistics are those of classes. Groups are learned together, as many
as `batch` allows, and mean what they mean alone: each teacher sees those that it votes on as one batch, Adam works
number by number, and every draw follows from (seed, step, image). A shard of groups that is done stays done when the
run is killed.

A mask multiplies the update and not the gradient: Adam divides a gradient by its own size, so that a scaled one moves a
pixel as far as a whole one. Where a mask is 0 a pixel stays what it was, to the bit.

With several segments (Cui et al., FADRM, NeurIPS 2025) images are optimised at one size after the other, begin each
segment with a new Adam, and take back a share 1 - a of what they began with; the cosine runs over all steps.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from distill.augment import apply_views, draw_views
from distill.contracts import Context, Preprocessing
from distill.errors import InputError, NonFiniteError
from distill.files import disk_errors, write_bytes_atomically
from distill.recovery.initial import Initial, pixels
from distill.recovery.objective import Judge
from distill.training.config import Augment, NonNegative, Positive, Share, Strict
from distill.training.memory import memory_errors
from distill.training.precision import autocast

Count = Annotated[int, Field(ge=1)]
# Images float32 (B, Ch, H, W) and classes int64 (B,) -> what each pixel's update is multiplied by, (B, 1, H, W).
Mask = Callable[[Tensor, Tensor], Tensor]
_CLASSES_A_GROUP = 100
_TELL_STEPS = 50
_FIX_MEMORY = "lower batch, or use smaller teachers"


class Recovery(Strict):
    """Options of recovery; the defaults are those of committee voting for small images.

    `statistics` is the weight of the distance of batch norm's statistics, `classwise` takes them class by class.
    `iterations: 0` keeps the initial images. `batch` bounds how many images are learned at once and changes results by
    rounding alone. Each segment begins at the next of `sizes` (in turn; the image's own where left out) and with
    `residual` of what was learned, the rest being what the images began with.
    """

    iterations: Annotated[int, Field(ge=0)] = 1000
    lr: Positive = 0.25
    statistics: NonNegative = 0.01
    classwise: bool = False
    augment: Augment = "crop_flip"
    crop_scale: Share = 0.08
    batch: Count = 500
    segments: Count = 1
    sizes: tuple[Count, ...] = ()
    residual: Annotated[float, Field(ge=0, le=1)] = 1.0
    voters: Literal["all", "turns"] = "all"

    @model_validator(mode="after")
    def _segments_have_steps(self) -> Self:
        if self.iterations and self.segments > self.iterations:
            raise ValueError(f"segments {self.segments} is above iterations {self.iterations}")
        if len(self.sizes) > self.segments:
            raise ValueError(
                f"{len(self.sizes)} sizes for {self.segments} segments: some would never be used"
            )
        if self.residual < 1 and self.segments == 1:
            raise ValueError(
                "residual belongs to the second segment and later ones: set segments to 2 or more"
            )
        return self


@dataclass(frozen=True)
class Group:
    """Images whose statistics are taken together.

    Args:
        images: their numbers.
        voters: which judges, and the weight of each.
    """

    images: tuple[int, ...]
    voters: tuple[tuple[int, float], ...]


def groups_of(
    labels: Sequence[int], voters: Callable[[int], tuple[tuple[int, float], ...]], *, classwise: bool
) -> list[Group]:
    """The groups of a set.

    Args:
        labels: of all images, (N,).
        voters: who judges the images of a number within their classes; where groups are classes, the group's number.
        classwise: whether groups are classes.
    """
    place: dict[int, int] = {}
    found: dict[tuple[int, int], list[int]] = {}
    for image, label in enumerate(labels):
        number = place[label] = place.get(label, -1) + 1
        key = (label, 0) if classwise else (number, label // _CLASSES_A_GROUP)
        found.setdefault(key, []).append(image)
    return [Group(tuple(images), voters(first)) for (first, _), images in sorted(found.items())]


def recover(
    ctx: Context,
    initial: Initial,
    labels: Tensor,
    groups: Sequence[Group],
    judges: Sequence[Judge],
    config: Recovery,
    *,
    preprocessing: Preprocessing,
    mask: Mask | None = None,
) -> Tensor:
    """Learn images.

    Args:
        ctx: its device, dtype, seed, progress, and the folder where finished shards lie.
        initial: where images begin.
        labels: int64 (N,).
        groups: all images, each once.
        judges: the teachers.
        config: how.
        preprocessing: of the images.
        mask: of the images as they begin, a shard at a time; None lets all pixels move alike.

    Returns:
        uint8 (N, Ch, H, W) on the host, rounded.

    Raises:
        NonFiniteError: a teacher's losses, or the images, became NaN or infinite.
        MemoryExhaustedError: a batch does not fit.
    """
    images = torch.empty((len(labels), *initial.shape), dtype=torch.uint8)
    shards = _shards(groups, config.batch)
    total = config.iterations * len(shards)
    with ctx.progress.task("recover images", total=total, unit="step") as task:
        for shard in shards:
            rows = torch.tensor([image for group in shard for image in group.images])
            path = _shard_path(ctx.scratch, rows)
            if path.exists():
                task.advance(config.iterations)
            else:
                with memory_errors("recovery", fix=_FIX_MEMORY):
                    learner = _Shard(ctx, initial.rows(rows), labels[rows], rows, shard, judges, config, mask)
                    learned = learner.learn(preprocessing, task.advance)
                _keep(path, pixels(learned, preprocessing))
            images[rows] = torch.from_numpy(np.load(path))
    return images


def _shards(groups: Sequence[Group], batch: int) -> list[list[Group]]:
    """Groups that are learned at once: of the same size, at most `batch` images, at least one group."""
    alike: dict[int, list[Group]] = {}
    for group in groups:
        alike.setdefault(len(group.images), []).append(group)
    found = []
    for size, members in alike.items():
        at_once = max(1, batch // size)
        found += [members[start : start + at_once] for start in range(0, len(members), at_once)]
    return found


def _shard_path(folder: Path, rows: Tensor) -> Path:
    name = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
    return folder / "recovered" / f"{name}.npy"


def _keep(path: Path, images: Tensor) -> None:
    buffer = io.BytesIO()
    np.save(buffer, images.numpy())
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, buffer.getvalue())


class _Shard:
    """Groups that are learned at once."""

    def __init__(
        self,
        ctx: Context,
        initial: Tensor,
        labels: Tensor,
        rows: Tensor,
        groups: Sequence[Group],
        judges: Sequence[Judge],
        config: Recovery,
        mask: Mask | None,
    ) -> None:
        self.ctx, self.initial, self.config = ctx, initial, config
        self.labels, self.rows = labels.to(ctx.device), rows.to(ctx.device)
        self.judges = judges
        self.mask = None if mask is None or config.iterations == 0 else mask(initial, self.labels)
        self.voters = [group.voters for group in groups]
        rounds = 1
        if config.voters == "turns":
            rounds = math.lcm(*(len(voters) for voters in self.voters))
        self.turns = [self._turn(step) for step in range(rounds)]
        self.seed = ctx.derive("recovery views")
        # Of each judge, the first step in which its losses were NaN or infinite.
        self.broken = torch.full((len(judges),), torch.inf, device=ctx.device)

    def learn(self, preprocessing: Preprocessing, report: Callable[[int], None]) -> Tensor:
        """The learned images (B, Ch, H, W) as networks take them."""
        config, size = self.config, tuple(self.initial.shape[2:])
        images = self.initial
        bounds = _bounds(preprocessing, self.ctx.device)
        step = 0
        for segment in range(config.segments if config.iterations else 0):
            asked = config.sizes[segment % len(config.sizes)] if config.sizes else None
            images = _resized(images, size if asked is None else (asked, asked))
            if segment and config.residual < 1:
                began = _resized(self.initial, tuple(images.shape[2:]))
                images = config.residual * images + (1 - config.residual) * began
            until = config.iterations * (segment + 1) // config.segments
            images = self._segment(images, range(step, until), bounds, report)
            step = until
        self._refuse_broken()
        images = _resized(images, size)
        if not bool(torch.isfinite(images).all()):
            raise NonFiniteError("recovered images became NaN or infinite", fix="lower lr")
        return images

    def _segment(
        self, images: Tensor, steps: range, bounds: tuple[Tensor, Tensor], report: Callable[[int], None]
    ) -> Tensor:
        """Optimise for these steps with an Adam of their own."""
        images = images.detach().clone(memory_format=torch.channels_last).requires_grad_()
        adam = torch.optim.Adam([images], lr=self.config.lr, betas=(0.5, 0.9), eps=1e-8)
        for step in steps:
            done = step / self.config.iterations
            adam.param_groups[0]["lr"] = self.config.lr * 0.5 * (1 + math.cos(math.pi * done))
            losses, images.grad = self._losses(images, step)
            before = None if self.mask is None else images.detach().clone()
            adam.step()
            with torch.no_grad():
                torch.maximum(torch.minimum(images, bounds[1], out=images), bounds[0], out=images)
                if self.mask is not None and before is not None:  # last: bounds are rounded, too
                    torch.lerp(before, images, self.mask, out=images)
            if step % _TELL_STEPS == 0:
                self._refuse_broken()
                self._tell(step, losses)
            report(1)
        return images.detach()

    def _losses(self, images: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """L of each group, (G,), and the gradient of their sum, of the images' shape."""
        config = self.config
        views = draw_views(
            config.augment,
            seed=self.seed,
            epoch=step,
            index=self.rows,
            height=images.shape[2],
            width=images.shape[3],
            crop_scale=config.crop_scale,
        )
        seen = apply_views(images, views)
        looked_at = seen.detach().requires_grad_()
        total = torch.zeros(len(self.voters), device=images.device)
        for number, groups, weights in self.turns[step % len(self.turns)]:
            losses = weights * self._judged(number, looked_at, groups)
            losses.sum().backward()  # one judge at a time: no more than its activations are kept
            losses = losses.detach()
            total.index_add_(0, groups, losses)
            sound = torch.isfinite(losses).all()
            self.broken[number] = torch.where(sound, torch.inf, float(step)).minimum(self.broken[number])
        assert looked_at.grad is not None, "somebody judges"
        (gradient,) = torch.autograd.grad(seen, images, looked_at.grad)
        return total, gradient

    def _turn(self, step: int) -> list[tuple[int, Tensor, Tensor]]:
        """Who judges in a step: the judge's number, its groups, int64 (n,), and their weights (n,)."""
        found: dict[int, list[tuple[int, float]]] = {}
        for group, voters in enumerate(self.voters):
            if self.config.voters == "turns":
                voters = ((voters[step % len(voters)][0], 1.0),)
            for number, weight in voters:
                found.setdefault(number, []).append((group, weight))
        device = self.ctx.device
        return [
            (
                number,
                torch.tensor([group for group, _ in members], device=device),
                torch.tensor([weight for _, weight in members], device=device),
            )
            for number, members in sorted(found.items())
        ]

    def _judged(self, number: int, images: Tensor, groups: Tensor) -> Tensor:
        """L of these groups for one judge, (n,)."""
        labels = self.labels
        if len(groups) < len(self.voters):
            size = len(images) // len(self.voters)
            rows = (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
            images, labels = images[rows], labels[rows]
        with autocast(self.ctx.device, self.ctx.engine.dtype):
            return self.judges[number].loss(images, labels, groups=len(groups))

    def _refuse_broken(self) -> None:
        """Raise NonFiniteError naming the judge whose losses were the first to be NaN or infinite."""
        if bool(torch.isfinite(self.broken).any()):
            name = self.judges[int(self.broken.argmin())].name
            raise NonFiniteError(
                f"the teacher {name} gave NaN or infinite losses on the images it is to judge",
                fix="lower lr or statistics, check the teacher's training, or leave it out",
            )

    def _tell(self, step: int, losses: Tensor) -> None:
        self.ctx.progress.record("recover", step=step, loss=float(losses.mean()), images=len(self.rows))


def _bounds(preprocessing: Preprocessing, device: torch.device) -> tuple[Tensor, Tensor]:
    """The least and the greatest a pixel can be, (1, Ch, 1, 1), as networks take it."""
    mean, std = (
        torch.tensor(values, device=device)[None, :, None, None]
        for values in (preprocessing.mean, preprocessing.std)
    )
    return -mean / std, (1 - mean) / std


def _resized(images: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=list(size), mode="bilinear", align_corners=False, antialias=True)


def refuse_sizes(networks: Mapping[str, nn.Module], config: Recovery, channels: int) -> None:
    """Raise InputError where a teacher cannot take images of one of the sizes.

    Args:
        networks: by name, on the meta device.
        config: whose sizes.
        channels: of the images.
    """
    for size in config.sizes:
        for name, network in networks.items():
            try:
                with torch.no_grad():
                    network.eval()(torch.zeros(2, channels, size, size, device="meta"))
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"the teacher {name} cannot take images of {size} x {size} px",
                    where="recover.sizes",
                    found=str(error).splitlines()[0],
                    fix="leave sizes out, or use teachers that pool over all pixels, such as resnet18",
                ) from error
