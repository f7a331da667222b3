"""Views: the parameters of an augmented look at an image, and the differentiable operations that apply them.

Parameters come from the counter-based generator of `distill.randomness`: the view of image `index` in epoch
`epoch` is a function of (seed, epoch, index), so it can be drawn again on any device, in any batch and by any
worker, and is never stored. For this reason every choice is made per image. The released codes draw DSA's
operation, and the mixing ratio, once a batch; a single image sees the same distribution either way.

Sources: DSA is Zhao and Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021
(strategy color_crop_cutout_flip_scale_rotate, strengths of the released code); mixup is Zhang et al., ICLR 2018,
equations 1-2; CutMix is Yun et al., ICCV 2019, equations 1-2, with the ratio recomputed from the clipped box (as
the paper's algorithm does and several relabelling codes do not); SelfMix is CutMix of an image with another view of
itself (Shen, "FerKD: Surgical Label Adaptation for Efficient Distillation", ICCV 2023). The resized crop is that of
Szegedy et al. (CVPR 2015) as torchvision draws it; a crop is never larger than what is made of it, so that bilinear
sampling needs no filter against aliasing.

Images are normalised before they reach this file: zero, the fill value, is the mean colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import betaincinv
from torch import Tensor

from distill.randomness import counter_integers, counter_uniform
from distill.training.config import TWO_IMAGES, Augment

# Strengths of DSA's released code; pixels as a share of the image's height or width.
CROP_SHARE = 0.125
CUTOUT_SHARE = 0.5
SCALE_RATIO = 1.2
ROTATE_DEGREES = 15.0
BRIGHTNESS = 1.0
SATURATION = 2.0
CONTRAST = 0.5

_DSA_OPS = ("color", "crop", "cutout", "flip", "scale", "rotate")

# Draw numbers: which number of the counter's stream feeds which parameter.
(
    _OP,
    _SHIFT_Y,
    _SHIFT_X,
    _FLIP,
    _BRIGHTNESS,
    _SATURATION,
    _CONTRAST,
    _CUT_Y,
    _CUT_X,
    _SCALE_Y,
    _SCALE_X,
    _ANGLE,
    _PARTNER,
    _RATIO,
    _BOX_Y,
    _BOX_X,
    _CROP_Y,
    _CROP_X,
) = range(18)
_CROP_TRIES = range(18, 38, 2)  # area, and aspect in the number behind
_CROP_ASPECT = 4 / 3


@dataclass(frozen=True)
class Views:
    """How to look at each of B images; None where the policy never uses a parameter.

    Args:
        shift: int64 (B, 2), pixels to move down and right; what enters is zero.
        flip: bool (B,), mirrored left to right, after the shift.
        color: float32 (B, 3): brightness added (0 is identity), saturation and contrast factors (1 is identity).
        scale: float32 (B, 2), factors on the sampling grid's y and x (1 is identity).
        angle: float32 (B,), radians, of the sampling grid.
        cutout: int64 (B, 4), the zeroed rectangle [top, bottom) x [left, right); empty is identity.
        crop: float32 (B, 4), top, left, height and width of what is enlarged to the whole, as shares of the sides.
    """

    shift: Tensor | None = None
    flip: Tensor | None = None
    color: Tensor | None = None
    scale: Tensor | None = None
    angle: Tensor | None = None
    cutout: Tensor | None = None
    crop: Tensor | None = None

    def rows(self, which: Tensor | slice) -> Views:
        """The views of some of the images."""
        return Views(**{name: None if value is None else value[which] for name, value in vars(self).items()})


@dataclass(frozen=True)
class Mix:
    """Which image each of B images is mixed with, and how much of it remains.

    Args:
        partner: int64 (B,), a sample number like `index`, not a place in the batch.
        ratio: float32 (B,), the share of the image itself; the partner has 1 - ratio.
        box: int64 (B, 4), the rectangle taken from the partner (CutMix), or None (mixup).
    """

    partner: Tensor
    ratio: Tensor
    box: Tensor | None


def draw_views(
    policy: Augment,
    *,
    seed: int | Tensor,
    epoch: int | Tensor,
    index: Tensor,
    height: int,
    width: int,
    crop_scale: float = 0.08,
) -> Views:
    """The views of the samples `index` in epoch `epoch`.

    Args:
        policy: `none`, `crop`, `crop_flip` (shift by up to an eighth of the side; mirror half of the images),
            `resized_crop` (a part of the image, enlarged to the whole, mirrored in half of the cases), `dsa` (one of
            six operations an image) or `dsa_without_flip` (for digits and text).
        seed: names the stream; int64 (B,) where several networks' batches are drawn at once.
        epoch: epoch number.
        index: int64 (B,), the samples' numbers in their data.
        height, width: of the images, pixels.
        crop_scale: the least area of a resized crop, as a share of the image's.
    """
    if policy == "none":
        return Views()
    counter = _Counter(seed, epoch, index)
    if policy == "resized_crop":
        crop = _draw_resized_crop(counter, height, width, crop_scale)
        return Views(crop=crop, flip=counter.uniform(_FLIP) < 0.5)
    if policy in ("crop", "crop_flip"):
        flip = counter.uniform(_FLIP) < 0.5 if policy == "crop_flip" else None
        return Views(shift=_draw_shift(counter, height, width), flip=flip)
    return _draw_dsa(counter, height, width, with_flip=policy == "dsa")


@dataclass(frozen=True)
class _Counter:
    """The counters of B samples in one epoch."""

    seed: int | Tensor
    epoch: int | Tensor
    index: Tensor

    def uniform(self, draw: int) -> Tensor:
        """float32 (B,) in [0, 1)."""
        return counter_uniform(self.seed, self.epoch, self.index, draw)

    def integers(self, draw: int, *, below: int) -> Tensor:
        """int64 (B,) in [0, below)."""
        return counter_integers(self.seed, self.epoch, self.index, draw, below=below)


def _draw_shift(counter: _Counter, height: int, width: int) -> Tensor:
    reach = [round(CROP_SHARE * side) for side in (height, width)]
    draws = [
        counter.integers(draw, below=2 * most + 1) - most
        for draw, most in zip((_SHIFT_Y, _SHIFT_X), reach, strict=True)
    ]
    return torch.stack(draws, dim=1)


def _draw_resized_crop(counter: _Counter, height: int, width: int, scale: float) -> Tensor:
    """float32 (B, 4). An area in [scale, 1] and an aspect in [3/4, 4/3]; ten tries to fit, then the whole image."""
    size = torch.ones(*counter.index.shape, 2, device=counter.index.device)
    fits = torch.zeros_like(counter.index, dtype=torch.bool)
    for draw in _CROP_TRIES:
        area = scale + (1 - scale) * counter.uniform(draw)
        aspect = torch.exp((2 * counter.uniform(draw + 1) - 1) * math.log(_CROP_ASPECT)) * height / width
        tried = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=-1)
        now = ~fits & (tried <= 1).all(dim=-1)
        size = torch.where(now[..., None], tried, size)
        fits = fits | now
    place = torch.stack([counter.uniform(_CROP_Y), counter.uniform(_CROP_X)], dim=-1)
    return torch.cat([place * (1 - size), size], dim=-1)


def _draw_dsa(counter: _Counter, height: int, width: int, *, with_flip: bool) -> Views:
    ops = _DSA_OPS if with_flip else tuple(op for op in _DSA_OPS if op != "flip")
    op = counter.integers(_OP, below=len(ops))
    chosen = {name: op == number for number, name in enumerate(ops)}
    none = torch.zeros_like(op)
    one = torch.ones_like(op, dtype=torch.float32)

    color = torch.stack(
        [
            torch.where(chosen["color"], (counter.uniform(_BRIGHTNESS) - 0.5) * BRIGHTNESS, one - 1),
            torch.where(chosen["color"], counter.uniform(_SATURATION) * SATURATION, one),
            torch.where(chosen["color"], counter.uniform(_CONTRAST) + CONTRAST, one),
        ],
        dim=1,
    )
    low, high = 1 / SCALE_RATIO, SCALE_RATIO
    scale = torch.stack(
        [
            torch.where(chosen["scale"], low + (high - low) * counter.uniform(draw), one)
            for draw in (_SCALE_Y, _SCALE_X)
        ],
        dim=1,
    )
    angle = (counter.uniform(_ANGLE) * 2 - 1) * math.radians(ROTATE_DEGREES)
    return Views(
        shift=torch.where(chosen["crop"][:, None], _draw_shift(counter, height, width), none[:, None]),
        flip=chosen["flip"] & (counter.uniform(_FLIP) < 0.5) if with_flip else None,
        color=color,
        scale=scale,
        angle=torch.where(chosen["rotate"], angle, one - 1),
        cutout=_draw_cutout(counter, chosen["cutout"], height, width),
    )


def _draw_cutout(counter: _Counter, chosen: Tensor, height: int, width: int) -> Tensor:
    edges = []
    for draw, side in ((_CUT_Y, height), (_CUT_X, width)):
        size = round(CUTOUT_SHARE * side)
        start = counter.integers(draw, below=side + 1 - size % 2) - size // 2
        edges += [start.clamp(min=0), (start + size).clamp(max=side)]
    return torch.stack(edges, dim=1) * chosen[:, None]


def apply_views(images: Tensor, views: Views) -> Tensor:
    """Look at each image as `views` says.

    Args:
        images: float (B, Ch, H, W), normalised, so that 0 is the mean colour.
        views: parameters of B views.

    Returns:
        Tensor like `images`, differentiable with respect to them.
    """
    if views.shift is not None:
        images = _shift_and_flip(images, views.shift, views.flip)
    if views.crop is not None:
        images = _resized_crop(images, views.crop, views.flip)
    if views.scale is not None and views.angle is not None:
        scale, angle = views.scale, views.angle
        warped = (scale != 1).any(dim=1) | (angle != 0)
        images = _on_rows(images, warped, lambda x, rows: _warp(x, scale[rows], angle[rows]))
    if views.color is not None:
        color = views.color
        colored = (color != color.new_tensor([0.0, 1.0, 1.0])).any(dim=1)
        images = _on_rows(images, colored, lambda x, rows: _recolor(x, color[rows]))
    if views.cutout is not None:
        images = images * ~_inside(views.cutout, images)
    return images


def _on_rows(images: Tensor, rows: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`images` with `op(images[rows], rows)` in the rows that `rows` (bool (B,)) marks.

    On a CPU the operation runs on those rows alone. On an accelerator, where asking for their number would make the
    host wait, it runs on all of them and the result is chosen.
    """
    if images.device.type == "cpu":
        numbers = rows.nonzero().squeeze(1)
        if len(numbers) == 0:
            return images
        return images.index_copy(0, numbers, op(images.index_select(0, numbers), numbers))
    return torch.where(
        rows[:, None, None, None], op(images, torch.arange(len(rows), device=rows.device)), images
    )


def _shift_and_flip(images: Tensor, shift: Tensor, flip: Tensor | None) -> Tensor:
    """Move each image by whole pixels, fill with zero, then mirror: exact, no interpolation."""
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device) - shift[:, :1]  # (B, H) row each output row comes from
    x = torch.arange(width, device=images.device).expand(len(images), -1)
    if flip is not None:
        x = torch.where(flip[:, None], width - 1 - x, x)
    x = x - shift[:, 1:]  # (B, W)
    known = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]  # (B, H, W)
    flat = y.clamp(0, height - 1)[:, :, None] * width + x.clamp(0, width - 1)[:, None, :]
    flat = flat + torch.arange(len(images), device=images.device)[:, None, None] * (height * width)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, images.shape[1])  # (B*H*W, Ch), free in channels_last
    moved = pixels.index_select(0, flat.reshape(-1)).view(*known.shape, -1)
    return (moved * known[..., None]).permute(0, 3, 1, 2)


def _resized_crop(images: Tensor, crop: Tensor, flip: Tensor | None) -> Tensor:
    """Enlarge the crop (B, 4) of each image to the whole, bilinear, then mirror."""
    sides = zip(crop[:, :2].T, crop[:, 2:].T, images.shape[2:], strict=True)
    y, x = (
        # Centres of output pixels, in grid_sample's coordinates, where the image is [-1, 1].
        2 * (start[:, None] + length[:, None] * (torch.arange(side, device=images.device) + 0.5) / side) - 1
        for start, length, side in sides
    )
    if flip is not None:
        x = torch.where(flip[:, None], x.flip(1), x)
    shape = (len(images), *images.shape[2:])
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    return F.grid_sample(
        images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )


def _warp(images: Tensor, scale: Tensor, angle: Tensor) -> Tensor:
    """Sample output pixel p (centred) at R(angle) diag(scale) p, bilinear, zeros outside, corners aligned."""
    from kornia.geometry.transform import warp_affine  # a second to import, and only DSA needs it

    batch, _, height, width = images.shape
    cos, sin = torch.cos(angle), torch.sin(angle)
    # In normalised coordinates the two sides count 1 each, as in DSA's affine_grid; in pixels, sides differ.
    aspect = (width - 1) / max(height - 1, 1)
    to_input = torch.zeros(batch, 3, 3, device=images.device)
    to_input[:, 0, 0], to_input[:, 0, 1] = cos * scale[:, 1], -sin * scale[:, 0] * aspect
    to_input[:, 1, 0], to_input[:, 1, 1] = sin * scale[:, 1] / aspect, cos * scale[:, 0]
    center = to_input.new_tensor([(width - 1) / 2, (height - 1) / 2, 1.0])
    to_input[:, 2, 2] = 1
    to_input[:, :2, 2] = center[:2] - (to_input[:, :2, :2] @ center[:2])
    to_output = torch.linalg.inv(to_input)[:, :2].to(images.dtype)
    return warp_affine(
        images, to_output, (height, width), mode="bilinear", padding_mode="zeros", align_corners=True
    )


def _recolor(images: Tensor, color: Tensor) -> Tensor:
    """Brightness, then saturation about each pixel's grey, then contrast about the image's mean."""
    brightness, saturation, contrast = color.to(images.dtype).T[:, :, None, None, None]
    images = images + brightness
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * saturation + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def _inside(box: Tensor, images: Tensor) -> Tensor:
    """bool (B, 1, H, W): the pixels of each image's rectangle [top, bottom) x [left, right)."""
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device)
    x = torch.arange(width, device=images.device)
    rows = (y >= box[:, 0:1]) & (y < box[:, 1:2])  # (B, H)
    columns = (x >= box[:, 2:3]) & (x < box[:, 3:4])  # (B, W)
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def draw_mix(
    kind: str,
    *,
    alpha: float,
    seed: int | Tensor,
    epoch: int | Tensor,
    index: Tensor,
    count: int,
    height: int,
    width: int,
) -> Mix:
    """With which sample, and how, the samples `index` are mixed in epoch `epoch`.

    Args:
        kind: `mixup`, `cutmix`, or `selfmix`: the partner is the sample itself, of which `Mix` wants another view.
        alpha: of the Beta(alpha, alpha) that the ratio is drawn from.
        seed, epoch, index: as in `draw_views`.
        count: samples in the data; the partner is any of them, uniformly.
        height, width: of the images, pixels.
    """
    counter = _Counter(seed, epoch, index)
    partner = _draw_partners(kind, counter, count=count)
    ratio = _beta(counter.uniform(_RATIO), alpha)
    if kind == "mixup":
        return Mix(partner, ratio, None)
    edges = []
    share = torch.sqrt(1 - ratio)
    for draw, side in ((_BOX_Y, height), (_BOX_X, width)):
        half = (share * side).to(torch.int64) // 2
        center = counter.integers(draw, below=side)
        edges += [(center - half).clamp(min=0), (center + half).clamp(max=side)]
    box = torch.stack(edges, dim=1)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    return Mix(partner, 1 - area / (height * width), box)


def class_pairs(kind: str, classes: Tensor, *, seed: int, epoch: int, index: Tensor) -> Tensor:
    """The classes of the images `index` in epoch `epoch` and of those that are mixed in: int64 (B, 2).

    Args:
        kind: as in `draw_mix`, or `none`.
        classes: of all images, int64 (N,).
        seed, epoch, index: as in `draw_views`.
    """
    partner = _draw_partners(kind, _Counter(seed, epoch, index), count=len(classes))
    return torch.stack([classes[index], classes[partner]], dim=1)


def _draw_partners(kind: str, counter: _Counter, *, count: int) -> Tensor:
    """Which samples are mixed in, int64 (B,); the samples themselves for kinds of one image."""
    return counter.integers(_PARTNER, below=count) if kind in TWO_IMAGES else counter.index


def _beta(uniform: Tensor, alpha: float) -> Tensor:
    """Beta(alpha, alpha) by inversion of its distribution function; float32 (B,)."""
    if alpha == 1.0:
        return uniform
    values = betaincinv(alpha, alpha, uniform.cpu().numpy().astype(np.float64))
    return torch.from_numpy(values.astype(np.float32)).to(uniform.device)


def apply_mix(images: Tensor, partners: Tensor, mix: Mix) -> Tensor:
    """Mix B images with their B partners (both float (B, Ch, H, W)), by pixel value or by rectangle."""
    if mix.box is not None:
        return torch.where(_inside(mix.box, images), partners, images)
    ratio = mix.ratio.to(images.dtype)[:, None, None, None]
    return images * ratio + partners * (1 - ratio)
