"""Critical crops and masks against plain loops; protected pixels stay where they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from distill.augment import Views, apply_views
from distill.cache import Network
from distill.cache.critical_maps import MapPass, map_layer
from distill.contracts import Context, DistilledSet, Preprocessing, Source
from distill.distillers.nrr import NonCriticalRefinement
from distill.errors import InputError
from distill.labels.pool import PoolTeacher, open_pool
from distill.preprocessing import Transform
from distill.randomness import counter_uniform, derive_seed
from distill.recovery.critical import CriticalMasks, CriticalSearch, critical_mosaics, normalised
from distill.recovery.initial import given
from distill.recovery.objective import Judge
from distill.recovery.recover import Recovery, groups_of, recover
from distill.selection import materialise, random_pick
from tests.distillers.test_soft_label import selection

MakeContext = Callable[..., Context]
CPU = torch.device("cpu")
TEACHERS = [
    PoolTeacher.model_validate(
        {
            "model": {"name": "convnet", "width": width, "norm": "batch"},
            "train": {"epochs": 2, "batch_size": 8},
        }
    )
    for width in (4, 6)
]


def teachers(ctx: Context, source: Source, count: int = 1) -> list[Network]:
    return open_pool(ctx, source, TEACHERS[:count])


def plain_map(network: Network, image: Tensor, label: int) -> Tensor:
    """C of one normalised image (Ch, H, W), by hand: (H, W)."""
    module = network.module(CPU)
    layer = map_layer(module, network.image_shape, name="it")
    _, maps = MapPass(module, layer).run(image[None], torch.tensor([label]))
    large = F.interpolate(maps[None], size=image.shape[1:], mode="bilinear")[0, 0]
    if float(large.max()) == float(large.min()):
        return torch.zeros_like(large)
    return (large - large.min()) / (large.max() - large.min())


# --- masks


def test_maps_are_brought_to_0_and_1_one_by_one() -> None:
    maps = (
        torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 6)[:, None, None]
    )
    maps[3] = 0.7  # singles nothing out
    found = normalised(maps, (9, 12))
    assert found.shape == (5, 1, 9, 12)
    assert float(found[3].abs().max()) == 0
    for number in (0, 1, 2, 4):
        assert float(found[number].min()) == 0 and float(found[number].max()) == 1


def test_a_mask_is_what_is_left_of_epsilon(source: Source, make_context: MakeContext) -> None:
    """The mean of two teachers' maps, in blocks or not."""
    networks = teachers(make_context(), source, 2)
    preprocessing = Preprocessing(source.mean, source.std)
    images, labels = Transform(preprocessing)(source.train.images[:9]), source.train.labels[:9]
    masks = CriticalMasks(networks, epsilon=0.4, preprocessing=preprocessing, device=CPU)(images, labels)
    assert masks.shape == (9, 1, *source.image_shape[1:])
    for mask, image, label in zip(masks, images, labels.tolist(), strict=True):
        critical = sum(plain_map(network, image, label) for network in networks) / 2
        torch.testing.assert_close(mask[0], (0.4 - critical).clamp(min=0), rtol=1e-4, atol=1e-5)


def test_teachers_behind_other_statistics_see_what_they_know(
    source: Source, make_context: MakeContext
) -> None:
    (network,) = teachers(make_context(), source)
    images, labels = source.train.images[:6], source.train.labels[:6]
    found = []
    for preprocessing in (Preprocessing(source.mean, source.std), Preprocessing((0.1,), (0.9,))):
        shown = Transform(preprocessing)(images)
        masks = CriticalMasks([network], epsilon=0.5, preprocessing=preprocessing, device=CPU)
        found.append(masks.critical(shown, labels))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    other = replace(network, preprocessing=Preprocessing((0.1,), (0.9,)))
    masks = CriticalMasks([other], epsilon=0.5, preprocessing=preprocessing, device=CPU)
    assert (masks.critical(shown, labels) - found[0]).abs().max() > 1e-3


def test_a_mask_that_protects_everything_is_refused(source: Source, make_context: MakeContext) -> None:
    """Where two teachers' maps have their least values at other places, their mean is nowhere 0."""
    ctx = make_context()
    preprocessing = Preprocessing(source.mean, source.std)
    masks = CriticalMasks(teachers(ctx, source, 2), epsilon=0.1, preprocessing=preprocessing, device=CPU)
    initial, labels = given(source.train.images[:9], preprocessing, CPU), source.train.labels[:9]
    masks.check(ctx, initial, labels)
    critical = torch.full((9, 1, 8, 8), 0.2)
    masks.critical = lambda images, labels: critical  # type: ignore[method-assign]
    with pytest.raises(InputError, match="protect everything") as caught:
        masks.check(ctx, initial, labels)
    assert caught.value.where == "epsilon" and "0.00% of the pixels" in str(caught.value)


def test_images_that_cannot_move_are_told_of(source: Source, make_context: MakeContext) -> None:
    from tests.cache.conftest import Told

    ctx, told = make_context(), Told()
    preprocessing = Preprocessing(source.mean, source.std)
    masks = CriticalMasks(teachers(ctx, source), epsilon=0.1, preprocessing=preprocessing, device=CPU)
    critical = torch.zeros(9, 1, 8, 8)
    critical[:3] = 1
    masks.critical = lambda images, labels: critical  # type: ignore[method-assign]
    initial = given(source.train.images[:9], preprocessing, CPU)
    masks.check(replace(ctx, progress=told), initial, source.train.labels[:9])
    assert told.notes == ["66.7% of the pixels are not critical and may move"]
    assert told.warnings == ["3 of 9 images are critical everywhere and stay as they are"]


def test_protection_is_refused_before_priors_are_measured(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.distillers import recovering

    monkeypatch.setattr(recovering, "measure_priors", lambda *a, **k: pytest.fail("measured"))
    monkeypatch.setattr(
        CriticalMasks, "critical", lambda self, images, labels: torch.ones(len(images), 1, 8, 8)
    )
    with pytest.raises(InputError, match="protect everything"):
        nrr(priors="measured", init="real").run(make_context(), source.without_test(), None)


def refined(
    ctx: Context, source: Source, mask: Any, images: Tensor, labels: Tensor, **options: Any
) -> Tensor:
    preprocessing = Preprocessing(source.mean, source.std)
    (network,) = teachers(ctx, source)
    judge = Judge(network, "teacher", preprocessing=preprocessing, device=CPU, statistics=0.1)
    groups = groups_of(labels.tolist(), lambda _: ((0, 1.0),), classwise=False)
    config = Recovery.model_validate({"iterations": 20, "lr": 0.25, "augment": "crop", **options})
    beginning = given(images, preprocessing, CPU)
    return recover(ctx, beginning, labels, groups, [judge], config, preprocessing=preprocessing, mask=mask)


def test_protected_pixels_stay_and_others_move(source: Source, make_context: MakeContext) -> None:
    """By less than 1e-6 where the mask is 0: the learned images, before they are rounded, are bit-equal there."""
    from distill.recovery import recover as room

    images, labels = source.train.images[:9], source.train.labels[:9]
    half = torch.zeros(1, 1, 8, 8)
    half[..., :4] = 1
    learned: list[tuple[Tensor, Tensor]] = []
    whole = room._Shard.learn

    def noting(self: Any, *arguments: Any) -> Tensor:
        learned.append((self.initial, whole(self, *arguments)))
        return learned[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room._Shard, "learn", noting)
        refined(make_context(), source, lambda x, y: half.expand(len(x), -1, -1, -1), images, labels)
    for before, after in learned:
        moved = (after - before).abs()
        assert float(moved[..., 4:].max()) < 1e-6
        assert torch.equal(after[..., 4:], before[..., 4:])  # and that is to the bit
        assert float(moved[..., :4].mean()) > 0.05


def test_a_mask_scales_the_step_and_not_the_gradient(source: Source, make_context: MakeContext) -> None:
    """Adam's first step is as long as the learning rate, whatever the gradient's size; a tenth of it is a tenth."""
    images, labels = torch.full((9, 1, 8, 8), 128, dtype=torch.uint8), source.train.labels[:9]
    moved = []
    for factor in (1.0, 0.1):
        mask = torch.full((1, 1, 8, 8), factor)
        found = refined(
            make_context(),
            source,
            lambda x, y, mask=mask: mask.expand(len(x), -1, -1, -1),
            images,
            labels,
            iterations=1,
            augment="none",
            lr=0.5,
        )
        moved.append((found.int() - 128).abs().double())
    touched = moved[0] > 10
    assert touched.double().mean() > 0.3
    ratio = moved[1][touched] / moved[0][touched]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.1), rtol=0, atol=0.05)


# --- initial images


def how(**options: Any) -> CriticalSearch:
    asked = {
        "factor": 1,
        "candidates": 6,
        "crops": 4,
        "crop_scale": 0.2,
        "critical": 0.5,
        "pick": "least_sure",
    }
    return CriticalSearch(**{**asked, **options})


def plain_crops(
    ctx: Context, source: Source, networks: list[Network], label: int, wanted: int, asked: CriticalSearch
) -> list[Tensor]:
    """The wanted crops of a class, normalised (Ch, H, W), in their order; every image and crop by itself."""
    own = np.array([row for row, given in enumerate(source.train.labels.tolist()) if given == label])
    transform = Transform(Preprocessing(source.mean, source.std))
    best = []
    for sample in random_pick(own, max(asked.candidates, wanted), seed=ctx.derive("crops"), name=label):
        image = transform(source.train.images[sample : sample + 1])
        critical = sum(plain_map(network, image[0], label) for network in networks) / len(networks)
        crops = []
        for number in range(asked.crops):
            stream = derive_seed(ctx.derive("crops", "places"), number)
            at = torch.tensor([int(sample)])
            area, top, left = (float(counter_uniform(stream, 0, at, draw)) for draw in range(3))
            side = (asked.crop_scale + (1 - asked.crop_scale) * area) ** 0.5
            views = Views(crop=torch.tensor([[top * (1 - side), left * (1 - side), side, side]]))
            content = float(apply_views(critical[None, None], views).mean())
            crops.append((content, apply_views(image, views)[0]))
        best.append(max(crops, key=lambda each: each[0]))
    best.sort(key=lambda each: -each[0])
    rated = []
    for _, crop in best[: max(wanted, round(asked.critical * len(best)))]:
        logits = sum(network.module(CPU)(crop[None]) for network in networks) / len(networks)
        rated.append((float(logits.softmax(dim=1)[0, label]), crop))
    rated.sort(key=lambda each: -each[0] if asked.pick == "surest" else each[0])
    first = (len(rated) - wanted) // 2 if asked.pick == "middle" else 0
    return [crop for _, crop in rated[first : first + wanted]]


@pytest.mark.parametrize(
    "options",
    [{}, {"pick": "surest"}, {"pick": "middle", "critical": 0.8}, {"critical": 0.01}, {"crops": 1}],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 2])
def test_the_crops_are_those_of_a_plain_search(
    source: Source, make_context: MakeContext, options: dict[str, Any], count: int
) -> None:
    ctx, asked = make_context(), how(**options)
    networks = teachers(ctx, source, count)
    found = critical_mosaics(ctx, source, networks, np.full(3, 2), asked).int()
    for label in range(3):
        wanted = plain_crops(ctx, source, networks, label, 2, asked)
        for image, crop in zip(found[2 * label : 2 * label + 2], wanted, strict=True):
            pixels = (crop * source.std[0] + source.mean[0]).mul(255).round().clamp(0, 255).int()
            assert (image - pixels).abs().max() <= 1


def test_mosaics_are_made_of_crops(source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    networks = teachers(ctx, source)
    crops = critical_mosaics(ctx, source, networks, np.full(3, 4), how())
    tiled = critical_mosaics(ctx, source, networks, np.full(3, 1), how(factor=2))
    small = F.avg_pool2d(crops.float(), 2).round().int()
    for label in range(3):
        own = small[4 * label : 4 * label + 4]
        rows = [torch.cat(list(own[2 * row : 2 * row + 2]), dim=2) for row in range(2)]
        assert (tiled[label].int() - torch.cat(rows, dim=1)).abs().max() <= 1


def test_maps_of_candidates_come_from_the_cache(source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    networks = teachers(ctx, source)
    first = critical_mosaics(ctx, source, networks, np.full(3, 2), how())
    before = ctx.cache.images_forwarded
    assert before >= 18  # six candidates of each class
    assert torch.equal(critical_mosaics(ctx, source, networks, np.full(3, 2), how()), first)
    assert ctx.cache.images_forwarded == before


# --- the distiller


def nrr(**options: Any) -> NonCriticalRefinement:
    asked = {
        "ipc": 2,
        "teachers": [teacher.model_dump(mode="json") for teacher in TEACHERS],
        "priors": [60.0, 50.0],
        "recover": {"iterations": 3, "augment": "crop"},
        **options,
    }
    asked = {key: value for key, value in asked.items() if value is not None}
    return NonCriticalRefinement(NonCriticalRefinement.Config.model_validate_json(json.dumps(asked)))


def test_refined_images_keep_their_critical_pixels(source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    plain = materialise(selection([0, 1, 2, 3, 4, 5]), source, ctx.train)
    made = nrr(ipc=None, init="real", epsilon=0.3).run(ctx, source.without_test(), plain)
    assert isinstance(made, DistilledSet) and made.soft is not None
    networks, preprocessing = teachers(ctx, source, 2), Preprocessing(source.mean, source.std)
    masks = CriticalMasks(networks, epsilon=0.3, preprocessing=preprocessing, device=CPU)
    mask = masks(Transform(preprocessing)(plain.images), plain.labels)
    moved = (made.images.int() - plain.images.int()).abs()
    assert float(mask.eq(0).float().mean()) > 0.1
    assert int(moved[mask.eq(0)].max()) == 0 < int(moved.max())
    free = nrr(ipc=None, init="real", mask="none").run(make_context(), source.without_test(), plain)
    assert int((free.images.int() - plain.images.int()).abs()[mask.eq(0)].max()) > 0


@pytest.mark.parametrize(
    "options", [{"sizes": [4, 8], "segments": 2}, {"segments": 2, "residual": 0.5}], ids=str
)
def test_what_moves_protected_pixels_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="the mask protects"):
        nrr(recover={"iterations": 4, **options})
    nrr(recover={"iterations": 4, **options}, mask="none")


def test_networks_without_a_map_are_refused_before_work(source: Source) -> None:
    mlp = [{"model": {"name": "mlp"}, "train": {"epochs": 1}}]
    alone = {"teachers": mlp, "priors": None, "recover": {"statistics": 0.0}}
    with pytest.raises(InputError, match="no map of features"):
        nrr(**alone).check(source.without_test(), None)
    nrr(**alone, mask="none", init="real").check(source.without_test(), None)


def test_an_initial_image_beside_a_step_before_is_refused() -> None:
    with pytest.raises(InputError, match="begins with the images of the step before"):
        nrr(ipc=None, init="critical").check_place("selector")
    nrr(ipc=None).check_place("selector")


@pytest.mark.gpu
def test_a_gpu_masks_alike(source: Source, make_context: MakeContext) -> None:
    preprocessing = Preprocessing(source.mean, source.std)
    networks = teachers(make_context(), source, 2)
    images, labels = Transform(preprocessing)(source.train.images[:9]), source.train.labels[:9]
    found = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        masks = CriticalMasks(networks, epsilon=0.4, preprocessing=preprocessing, device=device)
        found.append(masks(images.to(device), labels.to(device)).cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)
