"""Where recovery begins: noise, real images, or mosaics of crops that teachers find easy or middling.

Crops are those of Sun et al., "On the Diversity and Realism of Distilled Dataset: An Efficient Dataset Distillation
Paradigm" (RDED), CVPR 2024: of every candidate image several random square crops, of which the one that teachers take
for the class most surely is kept; of these, the surest of the class (`easiest`), or those in the middle of the ranking
(`middle`: Shen et al., DELT, CVPR 2025); factor^2 of them make one image. The released code pads a small crop to the
image's size before teachers see it; here it is enlarged to it, which is what teachers were trained on, and made small
for the mosaic only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.augment import Views, apply_views
from distill.contracts import Context, Passes, Preprocessing, Source
from distill.errors import InputError
from distill.labels.ensemble import Labellers
from distill.labels.pool import PoolTeacher
from distill.randomness import counter_uniform, derive_seed
from distill.selection import by_class, random_pick, source_counts
from distill.training.batches import DeviceImages
from distill.training.job import Pool

_BLOCK = 256  # crops a forward pass


@dataclass(frozen=True)
class Initial:
    """Where the images of a set begin.

    Args:
        shape: of an image, (Ch, H, W).
        rows: int64 (n,) -> these images as networks take them, float32 (n, Ch, H, W), on the device.
    """

    shape: tuple[int, int, int]
    rows: Callable[[Tensor], Tensor]


def given(images: Tensor, preprocessing: Preprocessing, device: torch.device) -> Initial:
    """Images uint8 or float16 (N, Ch, H, W) as a set has them."""
    pool = Pool(images, torch.zeros(len(images), dtype=torch.int64), preprocessing)

    def rows(asked: Tensor) -> Tensor:
        part = DeviceImages(pool, device, chosen=asked)
        return part.gather(torch.arange(len(asked), device=device))

    return Initial(pool.image_shape, rows)


def noise(shape: tuple[int, int, int], *, seed: int, device: torch.device) -> Initial:
    """Normal noise, as networks take images; every number follows from (seed, image, its place)."""

    def rows(asked: Tensor) -> Tensor:
        places = torch.arange(math.prod(shape))
        uniform = counter_uniform(seed, asked[:, None], places.expand(len(asked), -1), 0).double() + 2.0**-25
        return (math.sqrt(2) * torch.erfinv(2 * uniform - 1)).float().view(-1, *shape).to(device)

    return Initial(shape, rows)


@dataclass(frozen=True)
class Crops:
    """Which crops are looked at.

    Args:
        factor: crops along a side of a mosaic.
        candidates: images a class that are looked at; all where a class has fewer.
        crops: of each.
        crop_scale: the least area of a crop, as a share of the image's.
    """

    factor: int
    candidates: int
    crops: int
    crop_scale: float


@dataclass(frozen=True)
class CropSearch(Crops):
    """How crops are chosen by the teachers' certainty.

    Args:
        middle: whether those of middle difficulty are wanted, and not the easiest.
    """

    middle: bool


def mosaics(ctx: Context, source: Source, teachers: Labellers, budget: np.ndarray, how: CropSearch) -> Tensor:
    """Images uint8 (N, Ch, H, W), class by class, on the host.

    Args:
        ctx: its device, seed and progress.
        source: whose train split crops come from.
        teachers: who judge.
        budget: images of each class, (C,).
        how: which crops.

    `refuse_mosaics` has been asked before.
    """
    labels = source.train.labels.numpy()
    preprocessing = Preprocessing(source.mean, source.std)
    made = []
    with ctx.progress.task("look for crops", total=len(budget), unit="class") as task:
        classes = by_class(np.arange(len(labels)), labels, len(source.classes))
        for number, (samples, count) in enumerate(zip(classes, budget, strict=True)):
            wanted = int(count) * how.factor**2
            looked_at = max(how.candidates, wanted)
            chosen = random_pick(samples, looked_at, seed=ctx.derive("crops"), name=number)
            crops = _best_crops(ctx, source, teachers, chosen, number, wanted, how)
            made.append(pixels(tiled(crops, how.factor), preprocessing))
            task.advance(1)
    return torch.cat(made)


def refuse_mosaics(source: Source, ipc: int, factor: int) -> None:
    """Raise InputError where a class has too few images for so many crops, or crops do not divide the image."""
    _, height, width = source.image_shape
    if height % factor or width % factor:
        raise InputError(
            f"images of {height} x {width} px cannot be made of {factor} x {factor} crops",
            where="factor",
            found=str(factor),
            fix="set factor: 1, or data.resize to a multiple of factor",
        )
    wanted = ipc * factor**2
    for number, count in enumerate(source_counts(source)):
        if count < wanted:
            raise InputError(
                f"class {source.classes[number]} has too few images to make {ipc} of",
                where="factor",
                found=f"{count} images",
                allowed=f"{wanted} or more, ipc times factor^2",
                fix="lower ipc or factor, or begin with real images (init: real)",
            )


def crop_passes(teachers: Sequence[PoolTeacher], crops: int) -> list[Passes]:
    """What looking at so many crops takes, for a dry run."""
    return [Passes(teacher.model, batch=_BLOCK, count=-(-crops // _BLOCK), kept=1) for teacher in teachers]


def pixels(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, Ch, H, W) on the host of normalised images, rounded."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).contiguous()


def _best_crops(
    ctx: Context,
    source: Source,
    teachers: Labellers,
    samples: np.ndarray,
    label: int,
    wanted: int,
    how: CropSearch,
) -> Tensor:
    """The wanted crops of one class, enlarged to whole images (wanted, Ch, H, W); the surest first."""
    pool = Pool(source.train.images, source.train.labels, Preprocessing(source.mean, source.std))
    chosen = torch.from_numpy(samples)
    images = DeviceImages(pool, ctx.device, chosen=chosen)
    seed = ctx.derive("crops", "places")
    crops = draw_crops(chosen.to(ctx.device), how.crops, least=how.crop_scale, seed=seed)  # (n, crops, 4)
    places = torch.arange(len(samples) * how.crops, device=ctx.device)
    losses = torch.cat(
        [
            _losses(
                teachers, cut(images, part // how.crops, crops[part // how.crops, part % how.crops]), label
            )
            for part in places.split(_BLOCK)
        ]
    ).view(len(samples), how.crops)
    best, which = losses.min(dim=1)
    order = best.argsort(stable=True)
    if how.middle:
        start = (len(order) - wanted) // 2
        order = order[start : start + wanted]
    order = order[:wanted]
    return cut(images, order, crops[order, which[order]])


def draw_crops(samples: Tensor, count: int, *, least: float, seed: int) -> Tensor:
    """Square crops (n, count, 4) of the samples, as shares of the sides; of each sample always the same.

    Args:
        samples: int64 (n,), their numbers.
        count: crops of each.
        least: area of a crop, as a share of the image's.
        seed: of the draws.
    """
    found = []
    for number in range(count):
        stream = derive_seed(seed, number)
        area, top, left = (counter_uniform(stream, 0, samples, draw) for draw in range(3))
        side = (least + (1 - least) * area).sqrt()
        found.append(torch.stack([top * (1 - side), left * (1 - side), side, side], dim=1))
    return torch.stack(found, dim=1)


def cut(images: DeviceImages, rows: Tensor, crops: Tensor) -> Tensor:
    """Crops (B, 4) of the images of these rows, enlarged to whole images (B, Ch, H, W)."""
    return apply_views(images.gather(rows), Views(crop=crops))


def _losses(teachers: Labellers, images: Tensor, label: int) -> Tensor:
    """Cross-entropy of each image (B,)."""
    logits = teachers.logits(images)
    return F.cross_entropy(logits, torch.full((len(images),), label, device=images.device), reduction="none")


def tiled(crops: Tensor, factor: int) -> Tensor:
    """(n * factor^2, Ch, H, W) -> (n, Ch, H, W): crop q * n + k is quadrant q of image k."""
    if factor == 1:
        return crops
    side = (crops.shape[2] // factor, crops.shape[3] // factor)
    small = F.interpolate(crops, size=side, mode="area")
    parts: Sequence[Tensor] = small.chunk(factor**2)
    rows = [torch.cat(list(parts[q * factor : (q + 1) * factor]), dim=3) for q in range(factor)]
    return torch.cat(rows, dim=2)
