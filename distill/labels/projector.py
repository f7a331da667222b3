"""Labels by a projector: a public encoder, adapted by little, that labels as students train.

Source: HeLlO, "Heavy Labels Out! Dataset Distillation with Label Space Lightening", ICCV 2025, of which no code was
released. The projector is

    g(x) = s (W + B A) f(x) / |f(x)| + b,

with features f of a frozen encoder whose layers have low-rank updates of their own (distill/labels/adapters.py). On
real images under the views and the mixing that students will see it is fitted to what several weak teachers say, Y',

    L = mean (g(x) - Y')^2 + lambda CE(g(x), y),

where y is the mixed label. Weak teachers are networks after several epochs of the teachers' trainings. A set stores
the low-rank matrices, s and b, as safetensors, and of the encoder its name and sha256.

W costs nothing: it is made again from what a reader has. `text` takes the embeddings of the classes' prompts, with
which an encoder of CLIP is a zero-shot classifier. `class_means`, for any encoder, takes the mean of the set's own
images of each class, as the encoder as it came sees them, less the mean over the classes, at length 1.

Where the paper is silent: s and b begin at the least squares fit of the first batch, AdamW along a cosine, the
encoder's batch norms stay as they are. Its optional update of images is left out (a tenth of a point, as published).
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from distill.cache.forward import logits_of
from distill.cache.identity import cache_key
from distill.cache.networks import Network, load_network, save_network
from distill.contracts import Context, DistilledSet, SoftLabels, Source
from distill.errors import DamagedDataError, InputError, NonFiniteError
from distill.files import write_bytes_atomically
from distill.labels.adapters import Ranks, attach, merge, pack, parameters, unpack
from distill.labels.codecs import PROJECTOR, VIEWS
from distill.labels.ensemble import Ensemble, between
from distill.labels.view_labels import checked, plan_attributes
from distill.models.encoders import (
    PROMPT,
    Encoder,
    EncoderConfig,
    behind,
    feature_count,
    file_facts,
    open_encoder,
    outline,
    text_embeddings,
)
from distill.models.projector import ProjectorModel
from distill.randomness import generator
from distill.training.batches import DeviceImages, PlannedViews, class_pairs
from distill.training.config import NonNegative, Positive, Strict
from distill.training.job import Pool, ViewPlan
from distill.training.memory import memory_errors
from distill.training.precision import autocast

Count = Annotated[int, Field(ge=1)]
Rank = Annotated[int, Field(ge=0)]
_BLOCK = 256  # images a forward pass
_SAVE_SECONDS = 20.0
_TELL_STEPS = 50


class Projection(Strict):
    """Options of labels by a projector.

    `conv_rank` and `linear_rank` are those of the encoder's layers that fit the patterns `layers`, `head_rank` that of
    W; with `learn_down: false` the matrices A follow from the seed and are not stored. `checkpoints` networks along
    each teacher's training are its weak teachers. `class_weight` is lambda.
    """

    encoder: EncoderConfig
    conv_rank: Rank = 8
    linear_rank: Rank = 8
    head_rank: Rank = 64
    layers: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    learn_down: bool = True
    start: Literal["class_means", "text"] = "class_means"
    templates: Annotated[tuple[str, ...], Field(min_length=1)] = (PROMPT,)
    checkpoints: Count = 1
    steps: Count = 1000
    batch_size: Annotated[int, Field(ge=2)] = 64
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.0
    class_weight: NonNegative = 0.1

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise InputError or DamagedDataError where it cannot be fitted; reads the encoder's file."""
        if self.start == "text" and not self.encoder.name.startswith("open_clip/"):
            raise InputError(
                f"{self.encoder.name} has no text tower to begin with",
                where="start",
                found="text",
                allowed="class_means; or an encoder of open_clip",
                fix="set start: class_means",
            )
        found, _ = file_facts(self.encoder)
        if self.encoder.sha256 not in (None, found):
            raise DamagedDataError(
                "the encoder's weights have another sha256 than asked for",
                where=str(self.encoder.weights),
                found=found,
                allowed=self.encoder.sha256,
                fix="get the file again, or correct sha256 if you trust this file",
            )
        encoder = outline(self.encoder)
        feature_count(encoder, image_shape, name=self.encoder.describe())
        self.adapt(encoder, seed=0)

    def adapt(self, encoder: Encoder, *, seed: int) -> None:
        """Give the encoder its adapters, in place."""
        ranks = Ranks(self.conv_rank, self.linear_rank, layers=self.layers, learn_down=self.learn_down)
        if ranks.conv or ranks.linear:
            attach(encoder, ranks, seed=seed)


class _Told(BaseModel):
    """How a set's attributes tell which projector labels it."""

    model_config = ConfigDict(extra="ignore")

    projection: Projection
    bytes: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]


class _Head(nn.Module):
    """g behind the encoder: features (B, D) -> logits (B, C)."""

    scale: nn.Parameter
    bias: nn.Parameter

    def __init__(self, start: Tensor, how: Projection, *, seed: int) -> None:
        super().__init__()
        classes, width = start.shape
        self.linear = nn.Linear(width, classes, bias=False)
        self.linear.weight = nn.Parameter(start.clone())
        self.linear.requires_grad_(False)
        if how.head_rank:
            attach(self, Ranks(0, how.head_rank, learn_down=how.learn_down), seed=seed)
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, features: Tensor) -> Tensor:
        return self.scale * self.linear(F.normalize(features, dim=1)) + self.bias


class _Projector(nn.Module):
    """The encoder with its adapters, and the head.

    Args:
        encoder: with the weights of its file; taken over.
        start: W, (C, D).
        how: options.
        seed: of A.
    """

    def __init__(self, encoder: Encoder, start: Tensor, how: Projection, *, seed: int) -> None:
        super().__init__()
        how.adapt(encoder, seed=seed)
        self.encoder = encoder
        self.head = _Head(start, how, seed=seed)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images).float())

    def learned(self) -> list[nn.Parameter]:
        return [*parameters(self), self.head.scale, self.head.bias]

    def packed(self, sha256: str) -> bytes:
        extra = {"scale": self.head.scale, "bias": self.head.bias}
        return pack(self, about={"encoder": sha256}, extra=extra)

    @torch.no_grad()
    def load(self, data: bytes, sha256: str) -> None:
        extra = unpack(self, data, about={"encoder": sha256})
        for name, own in (("scale", self.head.scale), ("bias", self.head.bias)):
            if name not in extra or extra[name].shape != own.shape:
                raise InputError(
                    "an adapter for another set of classes", where=name, allowed=str(tuple(own.shape))
                )
            own.copy_(extra[name])

    @torch.no_grad()
    def state(self) -> dict[str, Tensor]:
        """The state of a `ProjectorModel` that says the same; the adapters are merged for good."""
        merge(self)
        encoder = {f"body.encoder.{name}": value for name, value in self.encoder.state_dict().items()}
        weight = self.head.scale * self.head.linear.weight
        return {**encoder, "classifier.weight": weight, "classifier.bias": self.head.bias.detach().clone()}


def project(
    ctx: Context,
    source: Source,
    plain: DistilledSet,
    weak: Ensemble,
    how: Projection,
    plan: ViewPlan,
    *,
    attributes: dict[str, Any],
) -> SoftLabels:
    """Fit a projector, and give the labels that a set stores of it.

    Args:
        ctx, source: of the run.
        plain: the set's images.
        weak: the teachers that it is fitted to.
        how: options.
        plan: of the views that it will label.
        attributes: facts that the labels carry.

    Raises:
        NonFiniteError: its loss became NaN or infinite.
    """
    sha256, size = file_facts(how.encoder)
    known = replace_encoder(how, sha256=sha256)
    seed = ctx.derive("projector")
    path = ctx.scratch / "projector.safetensors"
    if not path.exists():
        data = _Fit(ctx, source, plain, weak, known, plan, seed=seed).packed()
        write_bytes_atomically(path, data)
    told = {
        "projection": known.model_dump(mode="json", exclude={"encoder": {"weights"}}),
        "bytes": size,
        "seed": seed,
    }
    facts = {**attributes, "projector": told, VIEWS: plan_attributes(plan)}
    adapter = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    soft = SoftLabels(PROJECTOR, {"adapter": adapter}, facts)
    network = open_projector(ctx, source, replace(plain, soft=soft), encoder=Path(str(how.encoder.weights)))
    _tell(ctx, source, network, adapter.nbytes)
    return soft


def replace_encoder(how: Projection, **changes: Any) -> Projection:
    """The options with another encoder's."""
    return how.model_copy(update={"encoder": how.encoder.model_copy(update=changes)})


def encoder_of(soft: SoftLabels | None) -> tuple[str, int] | None:
    """Name and bytes of the encoder that labels need, None for labels that need none."""
    if soft is None or soft.codec != PROJECTOR:
        return None
    told = _told(soft)
    return told.projection.encoder.name, told.bytes


def open_projector(
    ctx: Context, source: Source, distilled: DistilledSet, *, encoder: Path | None = None
) -> Network:
    """The projector that labels a set: from the cache, or from its adapter and the encoder's file.

    Args:
        ctx: its cache and device.
        source: whose classes it tells apart.
        distilled: the set.
        encoder: the file of the encoder's weights.

    Raises:
        InputError: the projector is not in the cache, and no file was named; or the adapter does not fit.
        DamagedDataError: a file of another sha256.
    """
    soft = distilled.soft
    assert soft is not None and soft.codec == PROJECTOR, "labels by a projector"
    told = _told(soft)
    data = soft.arrays["adapter"].tobytes()
    model = ProjectorModel(encoder=told.projection.encoder.model_copy(update={"weights": None}))
    preprocessing = behind(told.projection.encoder)
    key = cache_key("network", _identity(distilled, told, data))
    known = load_network(
        ctx.cache.networks_folder,
        key,
        model=model,
        image_shape=source.image_shape,
        classes=len(source.classes),
        preprocessing=preprocessing,
        progress=ctx.progress,
    )
    if known is not None:
        return known
    how = _with_file(told.projection, encoder)
    began = time.perf_counter()
    start = _start(ctx, distilled, how)
    projector = _Projector(open_encoder(how.encoder), start, how, seed=told.seed)
    projector.load(data, str(how.encoder.sha256))
    facts = {
        "seconds": time.perf_counter() - began,
        "peak_bytes": 0,
        "valid_accuracy": None,
        "loss": None,
        "data": None,
        "model": model.describe(),
        "epochs": 0,
    }
    network = Network(model, source.image_shape, len(source.classes), preprocessing, projector.state(), facts)
    save_network(ctx.cache.networks_folder, key, network)
    return network


def _told(soft: SoftLabels) -> _Told:
    return checked(
        _Told, soft.attributes.get("projector"), what="the set does not say which projector labels it"
    )


def _identity(distilled: DistilledSet, told: _Told, data: bytes) -> dict[str, Any]:
    """Everything that decides what the projector says."""
    images = distilled.images.permute(0, 2, 3, 1).contiguous().numpy()
    return {
        "projector": told.model_dump(mode="json"),
        "adapter": hashlib.sha256(data).hexdigest(),
        "images": hashlib.sha256(images.tobytes()).hexdigest(),
        "labels": hashlib.sha256(distilled.labels.numpy().tobytes()).hexdigest(),
        "classes": list(distilled.classes),
    }


def _with_file(how: Projection, encoder: Path | None) -> Projection:
    if encoder is None:
        raise InputError(
            f"a public encoder labels this set, {how.encoder.name}, and its weights are not at hand",
            found="no file of weights, and no such projector in the cache",
            allowed=f"the file of sha256 {how.encoder.sha256}",
            fix="name it: distill evaluate SET --encoder FILE",
        )
    return replace_encoder(how, weights=str(encoder))


def _start(ctx: Context, distilled: DistilledSet, how: Projection) -> Tensor:
    """W, float32 (C, D), on the host."""
    if how.start == "text":
        return text_embeddings(how.encoder, distilled.classes, templates=how.templates)
    encoder = open_encoder(how.encoder).to(ctx.device)
    way = between(distilled.preprocessing, behind(how.encoder), ctx.device)
    images = DeviceImages(Pool(distilled.images, distilled.labels, distilled.preprocessing), ctx.device)
    with torch.no_grad():
        features = torch.cat([F.normalize(encoder(way(part)), dim=1).cpu() for part in images.blocks(_BLOCK)])
    onehot = F.one_hot(distilled.labels, len(distilled.classes)).float()
    means = onehot.T @ features / onehot.sum(dim=0).clamp(min=1)[:, None]
    return F.normalize(means - means.mean(dim=0), dim=1)


def _tell(ctx: Context, source: Source, network: Network, size: int) -> None:
    told = ""
    if len(source.valid):
        logits = logits_of(network, source.valid, device=ctx.device)
        right = float((logits.argmax(dim=1).cpu() == source.valid.labels).float().mean())
        told = f", {right:.1%} right on {len(source.valid)} validation images"
    ctx.progress.note(f"{network.facts['model']}: {size:,} bytes are stored{told}", bytes=size)


@dataclass(frozen=True)
class _Views:
    """One batch of the fit: views (B, Ch, H, W) and what the weak teachers say of them (B, C); mixed labels (B, C)."""

    images: Tensor
    said: Tensor
    labels: Tensor


class _Fit:
    """The fit of a projector; a killed one goes on behind what last reached the disk."""

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
        self.sha256 = str(how.encoder.sha256)
        self.way = between(plain.preprocessing, behind(how.encoder), ctx.device)
        self.weak = weak.on(ctx.device)
        every = torch.randperm(len(source.train), generator=generator(ctx.seed, "projector images"))
        rows = every[: how.steps * how.batch_size].sort().values
        pool = Pool(source.train.images, source.train.labels, plain.preprocessing)
        self.images = DeviceImages(pool, ctx.device, chosen=rows)
        self.labels = source.train.labels[rows].to(ctx.device)
        self.plan = replace(
            plan,
            seed=ctx.derive("projector views"),
            epochs=-(-how.steps * how.batch_size // len(rows)),
            batch_size=how.batch_size,
        )
        start = _start(ctx, plain, how)
        self.projector = _Projector(open_encoder(how.encoder), start, how, seed=seed).to(ctx.device)
        self.adam = torch.optim.AdamW(
            self.projector.learned(), lr=how.lr, weight_decay=how.weight_decay, fused=True
        )
        self.path = ctx.scratch / "projector.pt"

    def packed(self) -> bytes:
        """The fitted adapter."""
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
                self.adam.param_groups[0]["lr"] = how.lr * 0.5 * (1 + math.cos(math.pi * step / how.steps))
                self.adam.step()
                step += 1
                task.advance(1)
                if step % _TELL_STEPS == 0 or step == how.steps:
                    self._refuse_non_finite(loss, step)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    self._save(step)
                    saved = time.monotonic()
        return self.projector.packed(self.sha256)

    def _loss(self, batch: _Views) -> Tensor:
        with autocast(self.device, self.ctx.engine.dtype):
            logits = self.projector(self.way(batch.images)).float()
        entropy = -(batch.labels * F.log_softmax(logits, dim=1)).sum(dim=1).mean()
        return F.mse_loss(logits, batch.said) + self.how.class_weight * entropy

    @torch.no_grad()
    def _calibrate(self, batch: _Views) -> None:
        """s and b by least squares, with one slope for all classes."""
        near, head = self.projector(self.way(batch.images)), self.projector.head
        said = batch.said - batch.said.mean(dim=0)
        apart = near - near.mean(dim=0)
        head.scale.copy_((apart * said).sum() / apart.square().sum().clamp(min=1e-12))
        head.bias.copy_(batch.said.mean(dim=0) - head.scale * near.mean(dim=0))

    def _batches(self, done: int) -> Iterator[_Views]:
        """The batches behind so many steps."""
        views = PlannedViews(self.plan, self.images, scattered=True)
        for step in range(done, self.how.steps):
            epoch, place = divmod(step, len(views.starts))
            images, index = views.batch(epoch, views.starts[place])
            yield _Views(images, self.weak.logits(images), self._mixed(views, epoch, index))

    def _mixed(self, views: PlannedViews, epoch: int, index: Tensor) -> Tensor:
        """The labels of mixed views, float32 (B, C)."""
        own, other = (
            F.one_hot(class_pairs(self.plan, epoch, index, self.labels), self.classes).float().unbind(1)
        )
        if self.plan.mix in ("none", "selfmix"):
            return own
        ratio = views.looks.mix(epoch, index[None]).ratio[:, None]
        return ratio * own + (1 - ratio) * other

    def _refuse_non_finite(self, loss: Tensor, step: int) -> None:
        self.ctx.progress.record("fit projector", step=step, loss=float(loss.detach()))
        if not bool(torch.isfinite(loss)):
            raise NonFiniteError(
                f"the projector's loss became {float(loss)} by step {step}", fix="lower projector.lr"
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
        return kept["step"]


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
