"""Views: each operation against a slow obvious form, replay, and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.augment import (
    _DSA_OPS,
    Mix,
    Views,
    apply_mix,
    apply_views,
    draw_mix,
    draw_views,
)

H, W = 12, 10
POLICIES = ["none", "crop", "crop_flip", "resized_crop", "dsa", "dsa_without_flip"]


def images(batch: int = 6, dtype: torch.dtype = torch.float64, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, H, W, generator=torch.Generator().manual_seed(0), dtype=dtype)


def views(policy: str, n: int = 60, epoch: int = 0, seed: int = 5) -> Views:
    return draw_views(policy, seed=seed, epoch=epoch, index=torch.arange(n), height=H, width=W)  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
def test_views_do_not_depend_on_the_batch(policy: str) -> None:
    x = images(60)
    whole = apply_views(x, views(policy))
    rows = torch.tensor([40, 3, 17])
    some = draw_views(policy, seed=5, epoch=0, index=rows, height=H, width=W)  # type: ignore[arg-type]
    torch.testing.assert_close(apply_views(x[rows], some), whole[rows], rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_views_change_with_epoch_and_seed(policy: str) -> None:
    x = images(60)
    base = apply_views(x, views(policy))
    assert not torch.equal(base, apply_views(x, views(policy, epoch=1)))
    assert not torch.equal(base, apply_views(x, views(policy, seed=6)))
    assert torch.equal(base, apply_views(x, views(policy)))


def test_shift_and_flip_equal_pad_and_slice() -> None:
    x = images()
    shift = torch.tensor([[0, 0], [2, -3], [-1, 1], [3, 3], [H, 0], [0, -W]])
    flip = torch.tensor([False, True, True, False, False, True])
    got = apply_views(x, Views(shift=shift, flip=flip))
    for image, (down, right), mirrored, result in zip(x, shift.tolist(), flip.tolist(), got, strict=True):
        padded = F.pad(image, (W, W, H, H))
        want = padded[:, H - down : 2 * H - down, W - right : 2 * W - right]
        torch.testing.assert_close(result, want.flip(-1) if mirrored else want, rtol=0, atol=0)


def test_warp_equals_affine_grid() -> None:
    """DSA's released form: affine_grid and grid_sample, corners aligned."""
    x = images()
    scale = 0.8 + 0.4 * torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    angle = torch.linspace(-0.26, 0.26, 6)
    got = apply_views(x, Views(scale=scale, angle=angle))
    theta = torch.zeros(6, 2, 3, dtype=torch.float64)
    cos, sin = torch.cos(angle.double()), torch.sin(angle.double())
    # Columns act on (x, y); rows give the input's (x, y): rotation after scaling.
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale[:, 1], -sin * scale[:, 0]
    theta[:, 1, 0], theta[:, 1, 1] = sin * scale[:, 1], cos * scale[:, 0]
    grid = F.affine_grid(theta, list(x.shape), align_corners=True)
    want = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_identity_parameters_change_nothing() -> None:
    x = images()
    identity = Views(
        shift=torch.zeros(6, 2, dtype=torch.int64),
        flip=torch.zeros(6, dtype=torch.bool),
        color=torch.tensor([[0.0, 1.0, 1.0]]).expand(6, 3),
        scale=torch.ones(6, 2),
        angle=torch.zeros(6),
        cutout=torch.zeros(6, 4, dtype=torch.int64),
    )
    assert torch.equal(apply_views(x, identity), x)


def test_color_equals_three_loops() -> None:
    x = images()
    color = torch.tensor([[0.2, 1.5, 0.7]] * 6)
    got = apply_views(x, Views(color=color))
    for image, result in zip(x, got, strict=True):
        want = image + 0.2
        grey = want.mean(0)
        want = torch.stack([(channel - grey) * 1.5 + grey for channel in want])
        want = (want - want.mean()) * 0.7 + want.mean()
        torch.testing.assert_close(result, want, rtol=0, atol=1e-6)


def test_cutout_zeroes_the_rectangle_and_nothing_else() -> None:
    x = images()
    box = torch.tensor([[0, 3, 2, 5]] * 6)
    got = apply_views(x, Views(cutout=box))
    want = x.clone()
    want[:, :, 0:3, 2:5] = 0
    assert torch.equal(got, want)


def test_dsa_changes_one_thing_an_image_and_uses_every_operation() -> None:
    v = views("dsa", n=3000)
    assert v.shift is not None and v.color is not None and v.scale is not None and v.angle is not None
    assert v.cutout is not None and v.flip is not None
    identity = torch.tensor([0.0, 1.0, 1.0])
    used = torch.stack(
        [
            (v.color != identity).any(1),
            (v.shift != 0).any(1),
            (v.cutout != 0).any(1),
            v.flip,
            (v.scale != 1).any(1),
            v.angle != 0,
        ]
    )
    assert used.sum(0).max() == 1
    shares = used.double().mean(1)
    expected = torch.tensor([1 / 6, 1 / 6 * 8 / 9, 1 / 6, 1 / 12, 1 / 6, 1 / 6], dtype=torch.float64)
    assert len(_DSA_OPS) == 6
    torch.testing.assert_close(shares, expected, rtol=0.2, atol=0.0)
    assert float(v.angle.abs().max()) <= math.radians(15)
    assert float(v.scale.min()) >= 1 / 1.2 and float(v.scale.max()) <= 1.2
    assert views("dsa_without_flip").flip is None


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients(policy: str) -> None:
    x = images(4).requires_grad_()
    v = views(policy, n=4)
    assert torch.autograd.gradcheck(lambda t: apply_views(t, v), (x,), eps=1e-6, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_dtype_is_kept(policy: str, dtype: torch.dtype) -> None:
    assert apply_views(images(60).to(dtype), views(policy)).dtype == dtype


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", POLICIES)
def test_channels_last_gives_the_same(policy: str, channels: int) -> None:
    x = images(60, torch.float32, channels)
    v = views(policy)
    got = apply_views(x.contiguous(memory_format=torch.channels_last), v)
    torch.testing.assert_close(got, apply_views(x, v), rtol=0, atol=1e-5)


def mixes(kind: str, alpha: float = 1.0, n: int = 4000) -> Mix:
    return draw_mix(kind, alpha=alpha, seed=3, epoch=1, index=torch.arange(n), count=n, height=H, width=W)


def test_mixup_blends_pixels() -> None:
    x, partners = images(), images().flip(0)
    mix = Mix(torch.arange(6), torch.linspace(0, 1, 6), None)
    got = apply_mix(x, partners, mix)
    for k, ratio in enumerate(torch.linspace(0, 1, 6).tolist()):
        torch.testing.assert_close(got[k], x[k] * ratio + partners[k] * (1 - ratio), rtol=0, atol=1e-6)


def test_cutmix_ratio_is_the_area_left() -> None:
    mix = mixes("cutmix")
    assert mix.box is not None
    ones, zeros = torch.ones(4000, 1, H, W), torch.zeros(4000, 1, H, W)
    left = apply_mix(ones, zeros, mix).mean(dim=(1, 2, 3))
    torch.testing.assert_close(left, mix.ratio, rtol=0, atol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_ratio_follows_the_beta_distribution(alpha: float) -> None:
    from scipy import stats

    ratio = mixes("mixup", alpha).ratio.numpy()
    assert stats.kstest(ratio, stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_partners_are_any_sample() -> None:
    counts = np.bincount(mixes("mixup").partner.numpy(), minlength=4000)
    assert counts.max() < 12
    assert counts.sum() == 4000


def test_selfmix_takes_another_view_of_the_sample_itself() -> None:
    index = torch.arange(7)
    mix = draw_mix("selfmix", alpha=1.0, seed=5, epoch=0, index=index, count=7, height=H, width=W)
    assert torch.equal(mix.partner, index)
    assert mix.box is not None


def test_a_resized_crop_is_bilinear_sampling_at_the_centres_of_pixels() -> None:
    x = images(2, channels=1)
    crop = torch.tensor([[0.1, 0.3, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]])
    flip = torch.tensor([True, False])
    got = apply_views(x, Views(crop=crop, flip=flip))
    torch.testing.assert_close(got[1], x[1], rtol=0, atol=1e-5)
    top, left, height, width = crop[0].tolist()
    for row in range(H):
        for column in range(W):
            y = (top + height * (row + 0.5) / H) * H - 0.5
            at = (left + width * (column + 0.5) / W) * W - 0.5
            y, at = min(max(y, 0), H - 1), min(max(at, 0), W - 1)
            y0, x0 = math.floor(y), math.floor(at)
            y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
            upper = x[0, 0, y0, x0] * (1 - at + x0) + x[0, 0, y0, x1] * (at - x0)
            lower = x[0, 0, y1, x0] * (1 - at + x0) + x[0, 0, y1, x1] * (at - x0)
            want = upper * (1 - y + y0) + lower * (y - y0)
            assert got[0, 0, row, W - 1 - column].item() == pytest.approx(want.item(), abs=1e-5)


@pytest.mark.parametrize("scale", [0.08, 0.5, 1.0])
def test_resized_crops_keep_to_area_and_aspect(scale: float) -> None:
    drawn = draw_views(
        "resized_crop", seed=1, epoch=0, index=torch.arange(4000), height=H, width=W, crop_scale=scale
    )
    crop = drawn.crop
    assert crop is not None and drawn.flip is not None
    assert 0.4 < drawn.flip.double().mean() < 0.6
    start, size = crop[:, :2], crop[:, 2:]
    assert (start >= 0).all() and (start + size <= 1 + 1e-6).all()
    area, aspect = size.prod(dim=1), (size[:, 1] * W) / (size[:, 0] * H)
    fitted = (size < 1).any(dim=1)  # the others found no place and are whole
    assert (area[fitted] >= scale - 1e-6).all()
    assert (aspect[fitted] >= 0.75 - 1e-5).all() and (aspect[fitted] <= 4 / 3 + 1e-5).all()
    if scale < 1:
        assert fitted.double().mean() > 0.9
        assert area.mean() == pytest.approx((1 + scale) / 2, abs=0.1)
