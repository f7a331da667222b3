"""Batches for K jobs: samples stay on the device as they are stored and become views there.

Orders, views and mixing come from counters (seed, epoch, sample), so a batch is a function of its job, epoch and
place: it does not depend on how many jobs are computed together, or where.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.augment import Views, apply_mix, apply_views, draw_mix, draw_views
from distill.contracts import Preprocessing
from distill.preprocessing import Transform
from distill.randomness import counter_permutation, derive_seed
from distill.training.config import TrainConfig
from distill.training.job import Job, Pool
from distill.training.memory import memory_errors
from distill.training.rows import places, used_rows

# Views are drawn for several epochs at once until this many: small sets would spend their time drawing few.
_VIEWS_AT_ONCE = 4096
_MOVED_AT_ONCE = 1024  # images

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
        targets: int64 (K, B) classes, or float32 (K, B, C) probabilities.
        index: int64 (K, B), numbers of the samples in their jobs.
    """

    images: Tensor
    targets: Tensor
    index: Tensor


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
        self.view_seeds = torch.tensor([derive_seed(job.seed, "views") for job in jobs], device=device)
        soft = first.pool.targets.is_floating_point()
        self.temperature = first.config.temperature if soft else 1.0
        self._drawn: tuple[range, Views] = (range(0), Views())

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of one epoch; the last may be short."""
        orders = [
            counter_permutation(seed, number, self.samples, device=self.device) for seed in self.order_seeds
        ]
        order = torch.stack(orders)  # (K, n)
        for start in range(0, self.samples, self.config.batch_size):
            yield self._batch(number, order[:, start : start + self.config.batch_size])

    def _batch(self, epoch: int, index: Tensor) -> Batch:
        images = self._look(epoch, index)
        targets = self._targets(index)
        if self.config.mix != "none":
            images, targets = self._mix(epoch, index, images, targets)
        return Batch(images.view(*index.shape, *images.shape[1:]), targets, index)

    def _look(self, epoch: int, index: Tensor) -> Tensor:
        """Views (K*B, Ch, H, W) of the samples `index` (K, B)."""
        parts = [
            self.pools[pool].images.gather(rows[numbers])
            for pool, rows, numbers in zip(self.pool_of, self.rows, index, strict=True)
        ]
        images = parts[0] if self.count == 1 else torch.cat(parts)
        if self.config.augment == "none":
            return images
        return apply_views(images, self._views(epoch).rows(self._flat(epoch, index)))

    def _views(self, epoch: int) -> Views:
        """The views of all samples of all jobs in a range of epochs that holds `epoch`: rows (epoch, job, sample)."""
        if epoch not in self._drawn[0]:
            at_once = max(1, _VIEWS_AT_ONCE // (self.count * self.samples))
            epochs = range(epoch, min(epoch + at_once, self.config.epochs))
            shape = (len(epochs), self.count, self.samples)
            numbers = torch.tensor(list(epochs), device=self.device)[:, None, None].expand(shape)
            seeds = self.view_seeds[None, :, None].expand(shape)
            samples = torch.arange(self.samples, device=self.device).expand(shape)
            _, height, width = self._image_shape
            views = draw_views(
                self.config.augment,
                seed=seeds.reshape(-1),
                epoch=numbers.reshape(-1),
                index=samples.reshape(-1),
                height=height,
                width=width,
            )
            self._drawn = (epochs, views)
        return self._drawn[1]

    def _flat(self, epoch: int, index: Tensor) -> Tensor:
        """Rows of `_views(epoch)` for the samples `index` (K, B); int64 (K*B,)."""
        self._views(epoch)
        block = (epoch - self._drawn[0].start) * self.count + torch.arange(self.count, device=self.device)
        return (block[:, None] * self.samples + index).reshape(-1)

    def _targets(self, index: Tensor) -> Tensor:
        parts = [
            self.pools[pool].targets[rows[numbers]]
            for pool, rows, numbers in zip(self.pool_of, self.rows, index, strict=True)
        ]
        return torch.stack(parts)

    def _mix(self, epoch: int, index: Tensor, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mix each sample with its partner's own view of the same epoch, and the targets alike."""
        _, height, width = self._image_shape
        mix = draw_mix(
            self.config.mix,
            alpha=self.config.mix_alpha,
            seed=self.view_seeds[:, None].expand_as(index).reshape(-1),
            epoch=epoch,
            index=index.reshape(-1),
            count=self.samples,
            height=height,
            width=width,
        )
        partner = mix.partner.view_as(index)
        images = apply_mix(images, self._look(epoch, partner), mix)
        ratio = mix.ratio.view_as(index)[..., None]
        return images, targets * ratio + self._targets(partner) * (1 - ratio)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return self.pool_of[0].image_shape


@dataclass(frozen=True)
class _OnDevice:
    images: DeviceImages
    targets: Tensor


def _by_pool(jobs: Sequence[Job]) -> dict[Pool, list[Job]]:
    """Each distinct pool with the jobs that share it."""
    found: dict[Pool, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.pool, []).append(job)
    return found


def _on_device(pool: Pool, job: Job, chosen: Tensor | None, device: torch.device) -> _OnDevice:
    """The pool's chosen samples, with their targets in the form that the loss of `job` takes."""
    targets = pool.targets if chosen is None else pool.targets[chosen]
    images = DeviceImages(pool, device, chosen=chosen)
    return _OnDevice(images, _loss_targets(targets, job.config, job.classes).to(device))


def _loss_targets(targets: Tensor, config: TrainConfig, classes: int) -> Tensor:
    """Classes stay int64 (N,) where nothing blends them; else probabilities float32 (N, C)."""
    if targets.is_floating_point():
        return F.softmax(targets.float() / config.temperature, dim=1)
    if config.mix == "none":
        return targets
    smooth = config.label_smoothing
    return F.one_hot(targets, classes) * (1 - smooth) + smooth / classes
