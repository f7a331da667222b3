"""Critical pixels: those that an image's class rests on; crops that are full of them, and masks that protect them.

Source: Tran et al., "Enhancing Dataset Distillation via Non-Critical Region Refinement" (NRR-DD), CVPR 2025, of which
no code was released. With a teacher's critical map of an image's own class (distill/cache/critical_maps.py), enlarged
to the image and brought to 0 .. 1 by its least and its greatest value, C, the mean over teachers where there are
several:

- Initial images (critical-based initial data discovery): of every candidate image several random square crops, of which
  the one with the greatest mean of C is kept; of these, in each class, the share `critical` with most; and of these
  the ones whose class teachers are least sure of, which is what recovery then mends. factor^2 of them make one image.
- Masks: M = max(0, epsilon - C), which multiplies every update of a pixel (distill/recovery/recover.py), so that pixels
  with C of epsilon or more never move.

The paper does not say, and here it is so: the content of a crop is the mean of C (a sum would always prefer the largest
crop); one crop an image, so that a class is not made of one image; C is taken once, of the images as they begin: what
is critical is then defined by real content, and costs one pass. A map that is the same everywhere singles nothing out
and counts as 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.augment import Views, apply_views
from distill.cache import CriticalMaps
from distill.cache.critical_maps import MapPass, map_layer
from distill.cache.forward import exact_convolutions
from distill.cache.networks import Network
from distill.contracts import Context, Preprocessing, Source, Split
from distill.errors import InputError
from distill.labels.ensemble import between, equal_ensemble, names_of
from distill.models import describe
from distill.recovery.initial import Crops, Initial, cut, draw_crops, pixels, tiled
from distill.selection import by_class, random_pick
from distill.training.batches import DeviceImages
from distill.training.job import Pool

_BLOCK = 256  # images a forward pass
_HELD = 4096  # candidates in memory
_SAME = 1e-5  # differences within a map, as a share of its greatest value, that mean nothing
_LEAST_FREE = 0.01  # share of the pixels that may move, below which a mask protects everything


Pick = Literal["least_sure", "middle", "surest"]


@dataclass(frozen=True)
class CriticalSearch(Crops):
    """How critical crops are looked for.

    Args:
        critical: share of the crops, those with most critical content, from which the wanted are taken.
        pick: by how sure teachers are of their class.
    """

    critical: float
    pick: Pick


def normalised(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """C of one teacher: maps (B, h, w), 0 or more, enlarged to `size` and brought to 0 .. 1: (B, 1, H, W)."""
    large = F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)
    low, high = large.amin(dim=(2, 3), keepdim=True), large.amax(dim=(2, 3), keepdim=True)
    spread = high - low
    tells = spread > _SAME * high  # what is left of a constant map is rounding
    return torch.where(tells, (large - low) / torch.where(tells, spread, 1.0), 0.0)


class CriticalMasks:
    """Masks of images by the maps of one teacher or several.

    Args:
        networks: the teachers.
        epsilon: pixels with C of so much or more never move.
        preprocessing: of the images.
        device: where.

    Raises:
        InputError: a teacher has no map of features.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        *,
        epsilon: float,
        preprocessing: Preprocessing,
        device: torch.device,
    ) -> None:
        self.epsilon = epsilon
        self.ways = [between(preprocessing, network.preprocessing, device) for network in networks]
        self.passes = []
        for network, name in zip(networks, names_of(networks), strict=True):
            module = network.module(device)
            self.passes.append(MapPass(module, map_layer(module, network.image_shape, name=name)))

    def critical(self, images: Tensor, labels: Tensor) -> Tensor:
        """C, float32 (B, 1, H, W), of images (B, Ch, H, W) and their classes, int64 (B,)."""
        height, width = images.shape[2:]
        found = []
        with exact_convolutions():  # as the maps that crops are found by
            for part, classes in zip(images.split(_BLOCK), labels.split(_BLOCK), strict=True):
                maps = [
                    normalised(each.run(way(part), classes)[1], (height, width))
                    for each, way in zip(self.passes, self.ways, strict=True)
                ]
                found.append(torch.stack(maps).mean(dim=0))
        return torch.cat(found)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """M, float32 (B, 1, H, W)."""
        return (self.epsilon - self.critical(images, labels)).clamp(min=0)

    def check(self, ctx: Context, initial: Initial, labels: Tensor) -> None:
        """Tell which share of a set's pixels may move.

        Args:
            ctx: its device and progress.
            initial: where its images begin.
            labels: int64 (N,).

        Raises:
            InputError: hardly a pixel may move.
        """
        free = torch.cat(
            [
                (self(initial.rows(rows), labels[rows].to(ctx.device)) > 0).float().mean(dim=(1, 2, 3)).cpu()
                for rows in torch.arange(len(labels)).split(_BLOCK)
            ]
        )
        share, stuck = float(free.mean()), int((free == 0).sum())
        if share < _LEAST_FREE:
            raise InputError(
                "the masks protect everything: hardly a pixel lies below epsilon, and nothing would be refined",
                where="epsilon",
                found=f"epsilon {self.epsilon:g}, with which {share:.2%} of the pixels may move",
                allowed=f"one with which {_LEAST_FREE:.0%} or more may move",
                fix="raise epsilon, or set mask: none to let all pixels move",
            )
        ctx.progress.note(f"{share:.1%} of the pixels are not critical and may move", free=share)
        if stuck:
            ctx.progress.warn(f"{stuck} of {len(labels)} images are critical everywhere and stay as they are")


def critical_mosaics(
    ctx: Context, source: Source, networks: Sequence[Network], budget: np.ndarray, how: CriticalSearch
) -> Tensor:
    """Images uint8 (N, Ch, H, W), class by class, on the host.

    Args:
        ctx: its device, seed, cache and progress.
        source: whose train split crops come from.
        networks: the teachers, who count alike.
        budget: images of each class, (C,).
        how: which crops.

    `refuse_mosaics` has been asked before.
    """
    labels = source.train.labels.numpy()
    classes = by_class(np.arange(len(labels)), labels, len(source.classes))
    chosen = [
        random_pick(samples, max(how.candidates, _wanted(count, how)), seed=ctx.derive("crops"), name=number)
        for number, (samples, count) in enumerate(zip(classes, budget, strict=True))
    ]
    made = []
    with ctx.progress.task("look for critical crops", total=len(budget), unit="class") as task:
        for members in _together([len(samples) for samples in chosen]):
            looker = _Looker(ctx, source, networks, np.concatenate([chosen[each] for each in members]), how)
            start = 0
            for number in members:
                rows = torch.arange(start, start + len(chosen[number]))
                crops = looker.picked(rows, number, _wanted(budget[number], how))
                made.append(pixels(tiled(crops, how.factor), looker.preprocessing))
                start += len(rows)
                task.advance(1)
    return torch.cat(made)


def _together(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Classes whose candidates are held at once: numbers in order, at most `_HELD` images, at least one class."""
    members: list[int] = []
    for number, size in enumerate(sizes):
        if members and sum(sizes[each] for each in members) + size > _HELD:
            yield members
            members = []
        members.append(number)
    yield members


def _wanted(images: int, how: CriticalSearch) -> int:
    return int(images) * how.factor**2


class _Looker:
    """Candidate images and their maps.

    Args:
        ctx, source, networks, how: as in `critical_mosaics`.
        samples: int64 (n,), the candidates.
    """

    def __init__(
        self,
        ctx: Context,
        source: Source,
        networks: Sequence[Network],
        samples: np.ndarray,
        how: CriticalSearch,
    ) -> None:
        self.how, self.device = how, ctx.device
        self.preprocessing = Preprocessing(source.mean, source.std)
        self.samples = torch.from_numpy(samples)
        self.split = _part(source.train, self.samples)
        self.size = source.image_shape[1:]
        self.seed = ctx.derive("crops", "places")
        self.teachers = equal_ensemble(networks, self.preprocessing).on(ctx.device)
        self.maps = [
            (
                ctx.cache.request(self.split, network, [CriticalMaps()])[CriticalMaps()],
                map_layer(network.outline.eval(), network.image_shape, name=describe(network.model)),
            )
            for network in networks
        ]

    def picked(self, rows: Tensor, label: int, wanted: int) -> Tensor:
        """The wanted crops of these candidates, of one class, enlarged to whole images (wanted, Ch, H, W)."""
        how = self.how
        samples = self.samples[rows].to(self.device)
        crops = draw_crops(samples, how.crops, least=how.crop_scale, seed=self.seed)  # (n, crops, 4)
        content, which = self._content(rows, crops).max(dim=1)
        most = max(wanted, round(how.critical * len(rows)))
        kept = content.argsort(descending=True, stable=True)[:most]
        pool = Pool(self.split.images[rows], self.split.labels[rows], self.preprocessing)
        images = DeviceImages(pool, self.device)
        best = crops[kept, which[kept]]
        sure = torch.cat(
            [
                self.teachers.logits(cut(images, part, crop)).softmax(dim=1)[:, label]
                for part, crop in zip(kept.split(_BLOCK), best.split(_BLOCK), strict=True)
            ]
        )
        order = sure.argsort(stable=True, descending=how.pick == "surest")
        first = (len(order) - wanted) // 2 if how.pick == "middle" else 0
        order = order[first : first + wanted]
        return cut(images, kept[order], best[order])

    def _content(self, rows: Tensor, crops: Tensor) -> Tensor:
        """The mean of C over each crop, (n, crops)."""
        critical = torch.stack(
            [
                normalised(maps.take(rows).view(-1, layer.height, layer.width), self.size)
                for maps, layer in self.maps
            ]
        ).mean(dim=0)
        return torch.stack(
            [
                apply_views(critical, Views(crop=crops[:, number])).mean(dim=(1, 2, 3))
                for number in range(self.how.crops)
            ],
            dim=1,
        )


def _part(split: Split, rows: Tensor) -> Split:
    """Some samples of a split, known by those of the whole and their numbers."""
    told = hashlib.sha256(f"{split.fingerprint} ".encode() + rows.numpy().tobytes()).hexdigest()
    return Split(split.images[rows], split.labels[rows], told)
