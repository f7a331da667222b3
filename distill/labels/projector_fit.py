"""The fit of a projector to what several weak teachers say.

On real images x under the views and the mixing that students will see, with what the teachers say, Y', and the mixed
label y,

    L = mean (g(x) - Y')^2 + lambda CE(g(x), y).

Weak teachers are networks after several epochs of the teachers' trainings (HeLlO, ICCV 2025: nine along one training
of a ResNet-18). Where the paper is silent: s and b begin at the least squares fit of the first batch, AdamW with its
rate along a cosine, the encoder's batch norms stay as they are. Its optional update of images is left out (a tenth of
a point, as published).
"""

from __future__ import annotations

import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.cache.networks import Network
from distill.contracts import Context, DistilledSet, Source
from distill.errors import NonFiniteError
from distill.files import write_bytes_atomically
from distill.labels.ensemble import Ensemble, between
from distill.labels.projection import Projection, Projector, start_of
from distill.models.encoders import behind, open_encoder
from distill.randomness import generator
from distill.training.batches import DeviceImages, PlannedViews
from distill.training.config import TWO_IMAGES
from distill.training.job import Pool, ViewPlan
from distill.training.memory import memory_errors
from distill.training.precision import autocast

_SAVE_SECONDS = 2.0  # an adapter is small
_TELL_STEPS = 50


def weak_teachers(
    networks: Sequence[Network], weights: Sequence[float], epochs: Sequence[Sequence[int]]
) -> tuple[tuple[Network, ...], tuple[float, ...]]:
    """Each network after some epochs of its training, and as it is, with their weights.

    Args:
        networks: the teachers.
        weights: one each, shared by what comes of it.
        epochs: of each, after which it was kept.
    """
    found = []
    for network, weight, own in zip(networks, weights, epochs, strict=True):
        kept = [replace(network, state=network.kept[epoch], dynamics=None, kept={}) for epoch in own]
        members = [*kept, replace(network, kept={})]
        found += [(each, weight / len(members)) for each in members]
    return tuple(network for network, _ in found), tuple(weight for _, weight in found)


@dataclass(frozen=True)
class _Batch:
    """Views (B, Ch, H, W), what the weak teachers say of them (B, C), and their mixed labels (B, C)."""

    images: Tensor
    said: Tensor
    labels: Tensor


class Fit:
    """The fit of a projector; a killed one goes on behind what last reached the disk.

    Args:
        ctx, source: of the run.
        plain: the set's images.
        weak: the teachers that it is fitted to.
        how: options, with the encoder's file and its sha256.
        plan: of the views that it will label.
        seed: of the matrices A.
    """

    def __init__(
        self,
        ctx: Context,
        source: Source,
        plain: DistilledSet,
        weak: Ensemble,
        how: Projection,
        plan: ViewPlan,
        *,
        seed: int,
    ) -> None:
        self.ctx, self.how, self.device = ctx, how, ctx.device
        self.classes = len(source.classes)
        self.way = between(plain.preprocessing, behind(how.encoder), ctx.device)
        self.weak = weak.on(ctx.device)
        every = torch.randperm(len(source.train), generator=generator(ctx.seed, "projector images"))
        rows = every[: how.samples or how.steps * how.batch_size].sort().values
        pool = Pool(source.train.images, source.train.labels, plain.preprocessing)
        self.images = DeviceImages(pool, ctx.device, chosen=rows)
        self.labels = source.train.labels[rows].to(ctx.device)
        self.plan = replace(
            plan,
            seed=ctx.derive("projector views"),
            epochs=-(-how.steps * how.batch_size // len(rows)),
            batch_size=how.batch_size,
        )
        start = start_of(ctx, plain, how)
        self.projector = Projector(open_encoder(how.encoder), start, how, seed=seed).to(ctx.device)
        head = self.projector.head
        groups = [
            {"params": self.projector.matrices(), "weight_decay": how.weight_decay},
            {"params": [head.scale, head.bias], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW([group for group in groups if group["params"]], lr=how.lr, fused=True)
        # The encoder's file is no part of the recipe: a fit on another one is another fit.
        self.path = ctx.scratch / f"projector-{str(how.encoder.sha256)[:16]}.pt"

    def packed(self) -> bytes:
        """The fitted adapter.

        Raises:
            NonFiniteError: the loss became NaN or infinite.
            MemoryExhaustedError: a batch does not fit.
        """
        how, saved = self.how, time.monotonic()
        step = self._resume()
        with (
            memory_errors("fitting the projector", fix="lower projector.batch_size, or encoder.size"),
            self.ctx.progress.task("fit the projector", total=how.steps, unit="step") as task,
        ):
            task.advance(step)
            for batch in self._batches(step):
                if step == 0:
                    self._calibrate(batch)
                loss = self._loss(batch)
                self.adam.zero_grad(set_to_none=True)
                loss.backward()
                for group in self.adam.param_groups:
                    group["lr"] = how.lr * 0.5 * (1 + math.cos(math.pi * step / how.steps))
                self.adam.step()
                step += 1
                task.advance(1)
                if step % _TELL_STEPS == 0 or step == how.steps:
                    self._refuse_non_finite(float(loss.detach()), step)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save(step)
                    saved = time.monotonic()
        return self.projector.packed()

    def _said(self, images: Tensor) -> Tensor:
        """g of views, float32 (B, C)."""
        with autocast(self.device, self.ctx.engine.dtype):
            features = self.projector.encoder(self.way(images))
        return self.projector.head(features.float())

    def _loss(self, batch: _Batch) -> Tensor:
        logits = self._said(batch.images)
        entropy = -(batch.labels * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
        return F.mse_loss(logits, batch.said) + self.how.class_weight * entropy

    @torch.no_grad()
    def _calibrate(self, batch: _Batch) -> None:
        """s and b by least squares, with one slope for all classes."""
        near, head = self._said(batch.images), self.projector.head
        said = batch.said - batch.said.mean(dim=0)
        apart = near - near.mean(dim=0)
        head.scale.copy_((apart * said).sum() / apart.square().sum().clamp(min=1e-12))
        head.bias.copy_(batch.said.mean(dim=0) - head.scale * near.mean(dim=0))

    def _batches(self, done: int) -> Iterator[_Batch]:
        """The batches behind so many steps."""
        views = PlannedViews(self.plan, self.images, scattered=True)
        for step in range(done, self.how.steps):
            epoch, place = divmod(step, len(views.starts))
            images, index = views.batch(epoch, views.starts[place])
            yield _Batch(images, self.weak.logits(images), self._mixed(views, epoch, index))

    def _mixed(self, views: PlannedViews, epoch: int, index: Tensor) -> Tensor:
        """The labels of mixed views, float32 (B, C)."""
        own, other = F.one_hot(self.plan.pairs(epoch, index, self.labels), self.classes).float().unbind(1)
        if self.plan.mix not in TWO_IMAGES:
            return own
        ratio = views.looks.mix(epoch, index[None]).ratio[:, None]
        return ratio * own + (1 - ratio) * other

    def _refuse_non_finite(self, loss: float, step: int) -> None:
        self.ctx.progress.record("fit projector", step=step, loss=loss)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the projector's loss became {loss} by step {step}", fix="lower projector.lr"
            )

    def _save(self, step: int) -> None:
        buffer = io.BytesIO()
        learned = [each.detach().cpu() for each in self.projector.learned()]
        torch.save({"step": step, "learned": learned, "adam": self.adam.state_dict()}, buffer)
        write_bytes_atomically(self.path, buffer.getvalue())

    def _resume(self) -> int:
        """Steps that are done."""
        if not self.path.exists():
            return 0
        kept = torch.load(self.path, map_location=self.device, weights_only=True)
        with torch.no_grad():
            for own, value in zip(self.projector.learned(), kept["learned"], strict=True):
                own.copy_(value)
        self.adam.load_state_dict(kept["adam"])
        return int(kept["step"])
