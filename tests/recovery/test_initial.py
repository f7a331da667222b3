"""Crops and mosaics against a plain loop over images and crops, with judges whose losses are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.augment import Views, apply_views
from distill.contracts import Context, Preprocessing, Source
from distill.preprocessing import Transform
from distill.randomness import counter_uniform, derive_seed
from distill.recovery import initial
from distill.recovery.initial import CropSearch, mosaics
from distill.selection import random_pick

MakeContext = Callable[..., Context]
CPU = torch.device("cpu")


class Brightness:
    """A judge to whom bright images are of class 0, and dark ones of the others."""

    def logits(self, images: Tensor) -> Tensor:
        light = images.mean(dim=(1, 2, 3))
        return torch.stack([light, torch.zeros_like(light), torch.zeros_like(light)], dim=1)


def how(**options: Any) -> CropSearch:
    return CropSearch(
        **{"middle": False, "factor": 1, "candidates": 6, "crops": 4, "crop_scale": 0.08, **options}
    )


def preprocessing(source: Source) -> Preprocessing:
    return Preprocessing(source.mean, source.std)


def found(ctx: Context, source: Source, count: int, asked: CropSearch, judge: Any = None) -> Tensor:
    """uint8 (N, Ch, H, W), as numbers that can be subtracted."""
    budget = np.full(len(source.classes), count)
    images = mosaics(ctx, source, judge or Brightness(), budget, asked)  # type: ignore[arg-type]
    assert images.dtype == torch.uint8 and images.device.type == "cpu"
    return images.int()


def crops_of(ctx: Context, source: Source, sample: int, asked: CropSearch) -> list[Tensor]:
    """The crops (Ch, H, W) of one image, normalised, each cut by itself."""
    image = Transform(preprocessing(source))(source.train.images[sample : sample + 1])
    cut = []
    for number in range(asked.crops):
        stream = derive_seed(ctx.derive("crops", "places"), number)
        area, top, left = (
            float(counter_uniform(stream, 0, torch.tensor([sample]), draw)) for draw in range(3)
        )
        side = (asked.crop_scale + (1 - asked.crop_scale) * area) ** 0.5
        crop = torch.tensor([[top * (1 - side), left * (1 - side), side, side]])
        cut.append(apply_views(image, Views(crop=crop))[0])
    return cut


def ranking(ctx: Context, source: Source, label: int, wanted: int, asked: CropSearch) -> list[Tensor]:
    """The best crop of each image that is looked at, the easiest first."""
    own = np.array([sample for sample, given in enumerate(source.train.labels.tolist()) if given == label])
    looked_at = random_pick(own, max(asked.candidates, wanted), seed=ctx.derive("crops"), name=label)
    ranked = []
    for sample in looked_at.tolist():
        judged = []
        for crop in crops_of(ctx, source, sample, asked):
            logits = Brightness().logits(crop[None])
            judged.append((float(F.cross_entropy(logits, torch.tensor([label]))), crop))
        ranked.append(min(judged, key=lambda each: each[0]))
    return [crop for _, crop in sorted(ranked, key=lambda each: each[0])]


def plain(ctx: Context, source: Source, count: int, asked: CropSearch) -> Tensor:
    """Image by image and quadrant by quadrant: quadrant q of image k is crop q * n + k."""
    factor, (channels, height, width) = asked.factor, source.image_shape
    tall, wide = height // factor, width // factor
    made = []
    for label in range(len(source.classes)):
        wanted = count * factor**2
        crops = ranking(ctx, source, label, wanted, asked)
        first = (len(crops) - wanted) // 2 if asked.middle else 0
        for k in range(count):
            image = torch.empty(channels, height, width)
            for q in range(factor**2):
                small = crops[first + q * count + k].view(channels, tall, factor, wide, factor).mean((2, 4))
                row, column = divmod(q, factor)
                image[:, row * tall : (row + 1) * tall, column * wide : (column + 1) * wide] = small
            made.append(image)
    pixels = Transform(preprocessing(source)).pixels(torch.stack(made))
    return (255 * pixels).round().int()


@pytest.mark.parametrize("middle", [False, True], ids=["easiest", "middle"])
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {}),
        (1, {"candidates": 300}),
        (1, {"factor": 2}),
        (2, {"factor": 2, "candidates": 1}),
        (2, {"crops": 1}),
    ],
)
def test_crops_are_those_of_a_plain_loop(
    source: Source, make_context: MakeContext, middle: bool, count: int, options: dict[str, Any]
) -> None:
    ctx, asked = make_context(), how(middle=middle, **options)
    got, want = found(ctx, source, count, asked), plain(ctx, source, count, asked)
    assert got.shape == want.shape == (3 * count, 1, 8, 8)
    assert (got - want).abs().max() <= 1


def test_blocks_of_crops_change_nothing(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, asked = make_context(), how(factor=2)
    whole = found(ctx, source, 1, asked)
    monkeypatch.setattr(initial, "_BLOCK", 5)
    assert (found(ctx, source, 1, asked) - whole).abs().max() <= 1


def test_easy_crops_are_what_the_judge_is_sure_of(source: Source, make_context: MakeContext) -> None:
    """Bright for class 0 and dark for class 1; the more is looked at, the surer."""
    ctx = make_context()

    def light(asked: CropSearch) -> list[float]:
        return found(ctx, source, 2, asked).double().view(3, -1).mean(dim=1).tolist()

    easy, middle = light(how()), light(how(middle=True))
    fewer_images, fewer_crops = light(how(candidates=2)), light(how(crops=1))
    for other in (middle, fewer_images, fewer_crops):
        assert easy[0] >= other[0] and easy[1] <= other[1]
        assert easy[0] - easy[1] > other[0] - other[1] + 5


def test_quadrants_are_different_crops(source: Source, make_context: MakeContext) -> None:
    image = found(make_context(), source, 1, how(factor=2))[0, 0]
    parts = [image[top : top + 4, left : left + 4] for top in (0, 4) for left in (0, 4)]
    assert all((a - b).abs().max() > 8 for place, a in enumerate(parts) for b in parts[:place])


def test_colours_keep_their_channels(make_source: Callable[..., Source], make_context: MakeContext) -> None:
    """Channels of their own mean and std come back as pixels of the same image: r, 255 - r and r / 2."""
    coloured = make_source(channels=3)
    red, green, blue = found(make_context(), coloured, 1, how(factor=2)).unbind(dim=1)
    assert (red + green - 255).abs().max() <= 1
    assert (red // 2 - blue).abs().max() <= 2
