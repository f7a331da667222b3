"""Batches for K jobs: samples stay on the device as they are stored and become views there.

Orders, views and mixing come from counters (seed, epoch, sample), so a batch is a function of its job, epoch and
place: it does not depend on how many jobs are computed together, or where.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.augment import apply_mix, apply_views
from distill.contracts import Preprocessing
from distill.preprocessing import Transform
from distill.randomness import counter_integers, counter_permutation, derive_seed, pass_order
from distill.training.config import DISTANCE_LOSSES, LOGIT_LOSSES, TrainConfig
from distill.training.job import Job, Pool, ViewLabels, ViewPlan
from distill.training.looks import Looks
from distill.training.memory import memory_errors
from distill.training.rows import places, used_rows

_MOVED_AT_ONCE = 1024  # images
_ORDERS_KEPT = 1 << 22  # places in the orders of passes

_FIX_MEMORY = "use fewer images (data.cap) or smaller ones (data.resize), or a device with more memory"


class DeviceImages:
    """A pool's images on the device, ready to be gathered.

    Images are kept as stored, (n, H, W, Ch): a gathered batch is then channels_last without a copy. Whitened images
    (ZCA) cannot be had from pixels cheaply and are kept as float32.

    Args:
        pool: where they are.
        device: where they are wanted.
        chosen: int64 (n,), the samples wanted; all if None.

    Raises:
        MemoryExhaustedError: they do not fit.
    """

    def __init__(self, pool: Pool, device: torch.device, *, chosen: Tensor | None = None) -> None:
        self.shape = pool.image_shape
        self.device = device
        self.preprocessing = pool.preprocessing
        self.whitened = pool.preprocessing.zca is not None
        count = len(pool) if chosen is None else len(chosen)
        size = " x ".join(map(str, self.shape))
        with memory_errors(f"putting {count} images of {size} on the device ({device})", fix=_FIX_MEMORY):
            self.images = _to_device(pool, chosen, device)
        self.scale, self.offset = _affine(pool.preprocessing, pool.images.dtype, device)

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, rows: Tensor) -> Tensor:
        """Normalised float32 (B, Ch, H, W), channels_last, of the samples `rows` (int64 (B,))."""
        pixels = self.images.index_select(0, rows).float()
        if not self.whitened:
            pixels = torch.addcmul(self.offset, pixels, self.scale)
        return pixels.permute(0, 3, 1, 2)

    def blocks(self, size: int) -> Iterator[Tensor]:
        """All images in order, `size` at a time."""
        for start in range(0, len(self.images), size):
            stop = min(start + size, len(self.images))
            yield self.gather(torch.arange(start, stop, device=self.device))


def _affine(preprocessing: Preprocessing, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Factor and summand (Ch,) that take a stored pixel to a normalised one: `Transform` in one pass."""
    full = 255.0 if dtype == torch.uint8 else 1.0
    std = torch.tensor(preprocessing.std, dtype=torch.float64)
    mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
    return (1 / (full * std)).float().to(device), (-mean / std).float().to(device)


def _to_device(pool: Pool, chosen: Tensor | None, device: torch.device) -> Tensor:
    """(n, H, W, Ch): as stored, or float32 whitened; in blocks, so that there is never a second copy of all."""
    whiten = Transform(pool.preprocessing) if pool.preprocessing.zca is not None else None
    stored = pool.images.permute(0, 2, 3, 1)
    if whiten is None and chosen is None and stored.is_contiguous():
        return stored.to(device)
    count = len(pool) if chosen is None else len(chosen)
    dtype = stored.dtype if whiten is None else torch.float32
    out = torch.empty((count, *stored.shape[1:]), dtype=dtype, device=device)
    for start in range(0, count, _MOVED_AT_ONCE):
        rows = slice(start, start + _MOVED_AT_ONCE)
        images = pool.images[rows if chosen is None else chosen[rows]]
        out[rows] = (images if whiten is None else _whitened(images, whiten)).permute(0, 2, 3, 1)
    return out


def _whitened(images: Tensor, whiten: Transform) -> Tensor:
    """float32 (n, Ch, H, W), n at most `_MOVED_AT_ONCE`.

    Products of matrices of another size are rounded in another way. So they are always of one size: an image looks the
    same whichever others are moved with it.
    """
    padding = images[:1].expand(_MOVED_AT_ONCE - len(images), *images.shape[1:])
    return whiten(torch.cat([images, padding]))[: len(images)]


@dataclass(frozen=True)
class Batch:
    """One step's data for K networks.

    Args:
        images: float32 (K, B, Ch, H, W).
        targets: int64 (K, B) classes, or float32 (K, B, C): probabilities, or logits where the loss takes these.
        index: int64 (K, B), numbers of the samples in their jobs.
        weights: of the views, float32 (K, B), whose mean is taken by them; None where all count alike.
        counts: how much each sample counts in a plain mean, float32 (K, B), see `mixed_counts`; None where all alike.
        pairs: int64 (K, B, 2), the classes of the image and of the one that is mixed in, for losses that ask for them.
        ratio: float32 (K, B), the share of the image itself, beside `pairs`.
    """

    images: Tensor
    targets: Tensor
    index: Tensor
    weights: Tensor | None = None
    counts: Tensor | None = None
    pairs: Tensor | None = None
    ratio: Tensor | None = None

    def for_networks(self, count: int) -> Batch:
        """The batch of one network as that of `count` networks."""
        parts = (None if x is None else x.expand(count, *x.shape[1:]) for x in vars(self).values())
        return Batch(*parts)  # type: ignore[arg-type]

    def parts(self, count: int) -> list[Batch]:
        """The batch in `count` parts whose sizes differ by one at most; of one sample each where there are fewer."""
        count = min(count, self.index.shape[1])
        if count == 1:
            return [self]
        cut = [[None] * count if x is None else x.tensor_split(count, dim=1) for x in vars(self).values()]
        return [Batch(*part) for part in zip(*cut, strict=True)]

    def share(self, whole: Batch) -> Tensor | float:
        """How much this part counts in the mean over the whole batch; (K,) where views have weights."""
        if self.weights is None or whole.weights is None:
            return self.index.shape[1] / whole.index.shape[1]
        return self.weights.sum(dim=1) / whole.weights.sum(dim=1).clamp(min=1e-12)


class Batches:
    """The batches of K jobs of one shape (same model, config, number of samples and classes)."""

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        first = jobs[0]
        self.config, self.samples, self.device = first.config, first.samples, device
        self.count = len(jobs)
        chosen = {pool: used_rows(sharing) for pool, sharing in _by_pool(jobs).items()}
        self.pools = {pool: _on_device(pool, first, rows, device) for pool, rows in chosen.items()}
        self.pool_of = [job.pool for job in jobs]
        self.rows = [places(job, chosen[job.pool]).to(device) for job in jobs]
        self.order_seeds = [derive_seed(job.seed, "order") for job in jobs]
        _, height, width = first.pool.image_shape
        self.looks = Looks(
            first.config,
            seeds=[derive_seed(job.seed, "views") for job in jobs],
            samples=self.samples,
            size=(height, width),
            device=device,
        )
        self.temperature = first.config.temperature if first.pool.soft else 1.0
        self.planned = self._planned(jobs)

    def _planned(self, jobs: Sequence[Job]) -> PlannedBatches | None:
        """The batches of labelled views, which are the same for all jobs; None where views are a job's own."""
        pool = jobs[0].pool
        if pool.views is None:
            return None
        assert all(job.pool is pool and job.indices is None for job in jobs), "one plan, all of its images"
        return PlannedBatches(
            pool.views, self.pools[pool].images, jobs[0].config, classes=pool.targets, counts=pool.weights
        )

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch; the last may be short."""
        if self.planned is not None:
            for batch in self.planned.epoch(number):
                yield batch.for_networks(self.count)
            return
        orders = [
            counter_permutation(seed, number, self.samples, device=self.device) for seed in self.order_seeds
        ]
        order = torch.stack(orders)  # (K, n)
        for start in range(0, self.samples, self.config.batch_size):
            yield self._batch(number, order[:, start : start + self.config.batch_size])

    def _batch(self, epoch: int, index: Tensor) -> Batch:
        images = apply_views(self._look(index), self.looks.views(epoch, index))
        targets, counts = self._targets(index), self._counts(index)
        if self.config.mix != "none":
            images, targets, counts = self._mix(epoch, index, images, targets, counts)
        return Batch(images.view(*index.shape, *images.shape[1:]), targets, index, counts=counts)

    def _look(self, index: Tensor) -> Tensor:
        """The samples `index` (K, B) as they are: (K*B, Ch, H, W)."""
        parts = [
            self.pools[pool].images.gather(rows[numbers])
            for pool, rows, numbers in zip(self.pool_of, self.rows, index, strict=True)
        ]
        return parts[0] if self.count == 1 else torch.cat(parts)

    def _targets(self, index: Tensor) -> Tensor:
        parts = [
            self.pools[pool].targets[rows[numbers]]
            for pool, rows, numbers in zip(self.pool_of, self.rows, index, strict=True)
        ]
        return torch.stack(parts)

    def _counts(self, index: Tensor) -> Tensor | None:
        """How much the samples `index` (K, B) count, float32 (K, B); None where all count alike."""
        if self.pool_of[0].weights is None:
            return None
        parts = []
        for pool, rows, numbers in zip(self.pool_of, self.rows, index, strict=True):
            weights = self.pools[pool].weights
            assert weights is not None, "networks trained together all have weights, or none"
            parts.append(weights[rows[numbers]])
        return torch.stack(parts)

    def _mix(
        self, epoch: int, index: Tensor, images: Tensor, targets: Tensor, counts: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Mix each sample with its partner's own view of the same epoch, and the targets and counts alike."""
        mix = self.looks.mix(epoch, index)
        partner = mix.partner.view_as(index)
        others = apply_views(self._look(partner), self.looks.partner_views(epoch, partner))
        ratio = mix.ratio.view_as(index)
        if counts is not None:
            theirs = self._counts(partner)
            assert theirs is not None
            ratio, counts = mixed_counts(counts, theirs, ratio)
        targets = targets * ratio[..., None] + self._targets(partner) * (1 - ratio[..., None])
        return apply_mix(images, others, mix), targets, counts


def mixed_counts(counts: Tensor, others: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """How much a mixed sample counts, and the share of its own target in it.

    A share r of a sample of weight w and 1 - r of one of weight v count r w + (1 - r) v together; cross-entropy, which
    is linear in the target, then is r w times the first one's and (1 - r) v times the second's.

    Args:
        counts, others: w and v, of one shape.
        ratio: r.

    Returns:
        The share r w / (r w + (1 - r) v), r itself where both weights are 0, and the weight.
    """
    own, whole = ratio * counts, ratio * counts + (1 - ratio) * others
    return torch.where(whole > 0, own / whole.clamp(min=1e-12), ratio), whole


class PassOrders:
    """The orders of a plan's passes; those asked for last are kept.

    Args:
        plan: whose passes.
        count: N.
        device: where orders are wanted.
    """

    def __init__(self, plan: ViewPlan, count: int, device: torch.device) -> None:
        self.plan, self.count, self.device = plan, count, device
        self._kept: OrderedDict[int, Tensor] = OrderedDict()

    def __getitem__(self, epoch: int) -> Tensor:
        """int64 (N,)."""
        if epoch not in self._kept:
            while len(self._kept) >= max(1, _ORDERS_KEPT // self.count):
                self._kept.popitem(last=False)
            self._kept[epoch] = pass_order(self.plan.seed, epoch, self.count, device=self.device)
        return self._kept[epoch]


class PlannedViews:
    """The views of a plan, batch by batch: what a teacher labels and a student sees again.

    Args:
        plan: which views, in which order.
        images: of the set, on the device.
        scattered: whether batches are asked for in any order.
    """

    def __init__(self, plan: ViewPlan, images: DeviceImages, *, scattered: bool = False) -> None:
        self.plan, self.images = plan, images
        self._orders = PassOrders(plan, len(images), images.device)
        self.starts = range(0, len(images), plan.batch_size)
        _, height, width = images.shape
        self.looks = Looks(
            plan,
            seeds=[plan.seed],
            samples=len(images),
            size=(height, width),
            device=images.device,
            scattered=scattered,
        )

    def order(self, epoch: int) -> Tensor:
        """The order of a pass: int64 (N,)."""
        return self._orders[epoch]

    def batch(self, epoch: int, start: int) -> tuple[Tensor, Tensor]:
        """Views (B, Ch, H, W), and the numbers of their images, int64 (B,)."""
        index = self.order(epoch)[start : start + self.plan.batch_size]
        views = apply_views(self.images.gather(index), self.looks.views(epoch, index[None]))
        if self.plan.mix == "none":
            return views, index
        mix = self.looks.mix(epoch, index[None])
        others = self.images.gather(mix.partner)
        others = apply_views(others, self.looks.partner_views(epoch, mix.partner[None]))
        return apply_mix(views, others, mix), index


class PlannedBatches:
    """The batches of students that learn from labelled views.

    Where the plan has as many passes as the training has epochs, they come one after the other. Else each epoch draws
    its batches with replacement from all that are labelled (Xiao and He, "Are Large-scale Soft Labels Necessary for
    Large-scale Dataset Distillation?", NeurIPS 2024, section 3.3): the fewer passes, the fewer labels are stored.
    """

    def __init__(
        self,
        labels: ViewLabels,
        images: DeviceImages,
        config: TrainConfig,
        *,
        classes: Tensor,
        counts: Tensor | None = None,
    ) -> None:
        self.labels = labels.on(images.device)
        self.classes = classes.to(images.device)
        self.counts = None if counts is None else counts.to(images.device)  # (N,), how much each image counts
        self.views = PlannedViews(labels.plan, images, scattered=labels.plan.epochs != config.epochs)
        self.config = config

    def epoch(self, number: int) -> Iterator[Batch]:
        for epoch, start in self._places(number):
            images, index = self.views.batch(epoch, start)
            logits, weights = self.labels.batch(epoch, start, images, index)
            targets = soft_targets(logits, self.config)
            pairs, ratio = self._mixed(epoch, index)
            counts = self._counted(epoch, index)
            parts = (images, targets, index, weights, counts, pairs, ratio)
            yield Batch(*(None if x is None else x[None] for x in parts))  # type: ignore[arg-type]

    def _mixed(self, epoch: int, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The classes (B, 2) of the two images of each view, and the share of the first (B,), where the loss asks."""
        if self.config.loss not in DISTANCE_LOSSES:
            return None, None
        mix = self.views.looks.mix(epoch, index[None])
        return self.views.plan.pairs(epoch, index, self.classes), mix.ratio

    def _counted(self, epoch: int, index: Tensor) -> Tensor | None:
        """How much the views of the images `index` (B,) count, (B,); None where all count alike."""
        if self.counts is None or self.views.plan.mix == "none":
            return None if self.counts is None else self.counts[index]
        mix = self.views.looks.mix(epoch, index[None])
        return mixed_counts(self.counts[index], self.counts[mix.partner], mix.ratio)[1]

    def _places(self, number: int) -> Iterator[tuple[int, int]]:
        """Pass and start of each batch of an epoch."""
        plan, starts = self.views.plan, self.views.starts
        if plan.epochs == self.config.epochs:
            yield from ((number, start) for start in starts)
            return
        seed = derive_seed(plan.seed, "drawn batches")
        places = torch.arange(len(starts))
        drawn = counter_integers(seed, number, places, 0, below=plan.epochs * len(starts))
        yield from ((place // len(starts), starts[place % len(starts)]) for place in drawn.tolist())


@dataclass(frozen=True)
class _OnDevice:
    images: DeviceImages
    targets: Tensor
    weights: Tensor | None


def _by_pool(jobs: Sequence[Job]) -> dict[Pool, list[Job]]:
    """Each distinct pool with the jobs that share it."""
    found: dict[Pool, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.pool, []).append(job)
    return found


def _on_device(pool: Pool, job: Job, chosen: Tensor | None, device: torch.device) -> _OnDevice:
    """The pool's chosen samples, with their targets in the form that the loss of `job` takes."""
    targets = pool.targets if chosen is None else pool.targets[chosen]
    weights = pool.weights if pool.weights is None or chosen is None else pool.weights[chosen]
    return _OnDevice(
        DeviceImages(pool, device, chosen=chosen),
        _loss_targets(targets, job.config, job.classes).to(device),
        None if weights is None else weights.to(device),
    )


def soft_targets(logits: Tensor, config: TrainConfig) -> Tensor:
    """What the loss compares a network's logits with: logits float32 (..., C), or probabilities."""
    logits = logits.float()
    return logits if config.loss in LOGIT_LOSSES else F.softmax(logits / config.temperature, dim=-1)


def _loss_targets(targets: Tensor, config: TrainConfig, classes: int) -> Tensor:
    """Classes stay int64 (N,) where nothing blends them; else probabilities float32 (N, C)."""
    if targets.is_floating_point():
        return soft_targets(targets, config)
    if config.mix == "none":
        return targets
    smooth = config.label_smoothing
    return F.one_hot(targets, classes) * (1 - smooth) + smooth / classes
