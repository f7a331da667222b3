"""Batches: what each job sees does not depend on the jobs beside it, and can be replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.augment import apply_views, draw_views
from distill.contracts import Preprocessing
from distill.errors import MemoryExhaustedError
from distill.randomness import counter_permutation, derive_seed
from distill.training import batches as batches_module
from distill.training import looks
from distill.training.batches import Batch, Batches, DeviceImages
from distill.training.engine import stackable
from distill.training.job import Job, Pool
from distill.training.loop import network_losses

CPU = torch.device("cpu")
MakeJob = Callable[..., Job]


def all_batches(jobs: list[Job], epochs: int = 2) -> list[Batch]:
    batches = Batches(jobs, CPU)
    return [batch for epoch in range(epochs) for batch in batches.epoch(epoch)]


def plain(pool: Pool) -> Tensor:
    """Normalised float32 images, the slow way."""
    pre = pool.preprocessing
    full = 255.0 if pool.images.dtype == torch.uint8 else 1.0
    mean, std = (np.array(values)[:, None, None] for values in (pre.mean, pre.std))
    return torch.from_numpy(((pool.images.double().numpy() / full - mean) / std).astype(np.float32))


@pytest.mark.parametrize(
    "train",
    [
        {"augment": "none"},
        {"augment": "crop_flip"},
        {"augment": "dsa"},
        {"augment": "crop", "mix": "mixup"},
        {"augment": "none", "mix": "cutmix", "mix_alpha": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("soft", [False, True])
def test_several_jobs_see_what_each_sees_alone(
    train: dict[str, Any], soft: bool, make_job: MakeJob, digits: Pool, soft_digits: Pool
) -> None:
    pool = soft_digits if soft else digits
    jobs = [make_job(seed=seed, pool=pool, **train) for seed in range(3)]
    jobs[2] = replace(jobs[2], pool=replace(pool, images=pool.images.flip(0)))
    alone = [all_batches([job]) for job in jobs]
    for number, together in enumerate(all_batches(jobs)):
        for k in range(3):
            torch.testing.assert_close(together.images[k], alone[k][number].images[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(together.targets[k], alone[k][number].targets[0], rtol=0, atol=0)


def test_an_epoch_visits_each_sample_once_in_its_own_order(make_job: MakeJob, digits: Pool) -> None:
    job = make_job(samples=24, batch_size=10, augment="none", seed=1)
    batches = Batches([job], CPU)
    epochs = [list(batches.epoch(number)) for number in range(2)]
    assert [batch.images.shape[1] for batch in epochs[0]] == [10, 10, 4]
    seen = [torch.cat([batch.images[0] for batch in epoch]) for epoch in epochs]
    assert job.indices is not None
    for number, images in enumerate(seen):
        order = counter_permutation(derive_seed(job.seed, "order"), number, 24)
        torch.testing.assert_close(images, plain(digits)[job.indices[order]])
    assert not torch.equal(seen[0], seen[1])


def test_views_can_be_replayed(make_job: MakeJob, digits: Pool) -> None:
    job = make_job(seed=3, augment="dsa")
    assert job.indices is not None
    batches = Batches([job], CPU)
    for epoch in range(2):
        order = counter_permutation(derive_seed(3, "order"), epoch, 24)
        seed = derive_seed(3, "views")
        views = draw_views("dsa", seed=seed, epoch=epoch, index=order, height=8, width=8)
        expected = apply_views(plain(digits)[job.indices[order]], views)
        got = torch.cat([batch.images[0] for batch in batches.epoch(epoch)])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_views_do_not_depend_on_how_many_are_drawn_at_once(
    make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [make_job(seed=seed, epochs=5, augment="dsa") for seed in range(2)]
    many = all_batches(jobs, epochs=5)
    monkeypatch.setattr(looks, "_VIEWS_AT_ONCE", 1)
    few = all_batches(jobs, epochs=5)
    assert all(torch.equal(a.images, b.images) for a, b in zip(many, few, strict=True))


def test_an_epoch_can_be_had_out_of_turn(make_job: MakeJob) -> None:
    job = make_job(epochs=4, augment="dsa", samples=40)
    in_turn = [next(iter(Batches([job], CPU).epoch(number))).images for number in (0, 3)]
    batches = Batches([job], CPU)
    assert torch.equal(next(iter(batches.epoch(3))).images, in_turn[1])
    assert torch.equal(next(iter(batches.epoch(0))).images, in_turn[0])


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize("soft", [False, True])
def test_mixed_targets_are_probabilities(
    mix: str, soft: bool, make_job: MakeJob, digits: Pool, soft_digits: Pool
) -> None:
    job = make_job(mix=mix, pool=soft_digits if soft else digits, label_smoothing=0.1, temperature=2.0)
    seen = torch.cat([batch.targets for batch in all_batches([job])], dim=1)
    assert seen.shape == (1, 48, 10)
    assert float(seen.min()) >= 0
    torch.testing.assert_close(seen.sum(dim=2), torch.ones(1, 48))
    assert int((seen > 0.2).sum(dim=2).max()) >= 2, "some image is mixed of two classes"


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_images_and_targets_are_mixed_alike(mix: str, make_job: MakeJob) -> None:
    """Images that are constant and equal to their class show in their mean how they were mixed."""
    labels = torch.arange(2).repeat(12)
    images = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    pool = Pool(images, labels, Preprocessing(mean=(0.0,), std=(1.0,)))
    job = replace(make_job(mix=mix, augment="none", pool=pool), classes=2)
    for batch in all_batches([job]):
        torch.testing.assert_close(batch.images.mean(dim=(2, 3, 4)), batch.targets[..., 1])


def test_smoothing_enters_mixed_targets(make_job: MakeJob) -> None:
    """The least share of any class is what smoothing gives to all."""
    job = make_job(mix="mixup", label_smoothing=0.3)
    least = min(float(batch.targets.min()) for batch in all_batches([job]))
    assert least == pytest.approx(0.03, abs=1e-6)


def test_soft_targets_are_softened_by_the_temperature(make_job: MakeJob, soft_digits: Pool) -> None:
    job = make_job(pool=soft_digits, temperature=3.0, samples=5, batch_size=5)
    batches = Batches([job], CPU)
    order = counter_permutation(derive_seed(0, "order"), 0, 5)
    expected = (soft_digits.targets[order] / 3.0).softmax(dim=1)
    torch.testing.assert_close(next(iter(batches.epoch(0))).targets[0], expected)
    assert batches.temperature == 3.0


def test_classes_are_never_softened(make_job: MakeJob) -> None:
    assert Batches([make_job(temperature=3.0)], CPU).temperature == 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_uint8_and_float16_images_are_normalised(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, channels, 5, 6), generator=generator, dtype=torch.uint8)
    pre = Preprocessing(mean=(0.5, 0.4, 0.3)[:channels], std=(0.2, 0.25, 0.3)[:channels])
    stored = Pool(images, torch.zeros(7, dtype=torch.int64), pre)
    halves = replace(stored, images=(images.double() / 255).to(torch.float16))
    rows = torch.tensor([6, 0, 0, 3])
    for pool in (stored, halves):
        got = DeviceImages(pool, CPU).gather(rows)
        assert got.dtype == torch.float32
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, plain(pool)[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain(stored), plain(halves), rtol=0, atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_whitening_equals_numpy(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (9, 2, 3, 4), dtype=np.uint8))
    pixels = images if dtype == torch.uint8 else (images.double() / 255).to(dtype)
    pre = Preprocessing(
        mean=(0.5, 0.4),
        std=(0.2, 0.3),
        zca=rng.normal(size=(24, 24)).astype(np.float32),
        zca_mean=rng.normal(size=24).astype(np.float32),
    )
    pool = Pool(pixels, torch.zeros(9, dtype=torch.int64), pre)
    assert pre.zca is not None and pre.zca_mean is not None
    flat = plain(pool).numpy().astype(np.float64).reshape(9, -1)
    expected = ((flat - pre.zca_mean) @ pre.zca).reshape(9, 2, 3, 4).astype(np.float32)
    got = DeviceImages(pool, CPU).gather(torch.arange(9))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_blocks_cover_the_pool_in_order(digits: Pool) -> None:
    images = DeviceImages(digits, CPU)
    blocks = list(images.blocks(1000))
    assert [len(block) for block in blocks] == [1000, 797]
    assert torch.equal(torch.cat(blocks), images.gather(torch.arange(len(digits))))


def test_a_pool_shared_by_jobs_is_on_the_device_once(make_job: MakeJob, digits: Pool) -> None:
    jobs = [make_job(seed=seed) for seed in range(3)]
    assert list(Batches(jobs, CPU).pools) == [digits]


@pytest.mark.parametrize("soft", [False, True])
def test_only_the_samples_that_jobs_use_are_on_the_device(
    soft: bool, make_job: MakeJob, digits: Pool, soft_digits: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And every batch is, bit for bit, what it would be if all were."""
    pool = soft_digits if soft else digits
    jobs = [make_job(seed=seed, pool=pool, samples=24, mix="mixup") for seed in range(2)]
    jobs[1] = replace(jobs[1], indices=torch.tensor([1700, 3, 3, *range(40, 19, -1)]))
    few = Batches(jobs, CPU)
    assert len(few.pools[pool].images) == len(few.pools[pool].targets) == 24 + 17 + 1
    monkeypatch.setattr(batches_module, "used_rows", lambda jobs: None)
    whole = Batches(jobs, CPU)
    assert len(whole.pools[pool].images) == len(pool)
    for epoch in range(2):
        for a, b in zip(few.epoch(epoch), whole.epoch(epoch), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.targets, b.targets)
            assert torch.equal(a.index, b.index)


def test_a_whitened_image_does_not_depend_on_those_beside_it() -> None:
    """Bit for bit; 1024 numbers an image are enough for products to be rounded by their size."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1500, 1, 32, 32), generator=generator, dtype=torch.uint8)
    zca = torch.randn(1024, 1024, generator=generator).numpy()
    pre = Preprocessing((0.5,), (0.2,), zca=zca, zca_mean=np.zeros(1024, dtype=np.float32))
    pool = Pool(images, torch.zeros(1500, dtype=torch.int64), pre)
    whole = DeviceImages(pool, CPU)
    for chosen in (torch.tensor([1499]), torch.tensor([3, 1, 1030]), torch.arange(0, 1500, 2)):
        few = DeviceImages(pool, CPU, chosen=chosen)
        assert torch.equal(few.gather(torch.arange(len(chosen))), whole.gather(chosen))


def test_memory_does_not_grow_with_the_samples_that_nobody_uses(make_job: MakeJob) -> None:
    """Seventy terabytes of images, of which one is stored, cannot be copied."""
    image = torch.full((1, 1, 8, 8), 7, dtype=torch.uint8)
    pool = Pool(
        image.expand(2**40, 1, 8, 8), torch.zeros(1).long().expand(2**40), Preprocessing((0.0,), (1.0,))
    )
    job = replace(make_job(pool=pool, augment="none"), indices=torch.arange(2**40 - 24, 2**40))
    for batch in all_batches([job]):
        torch.testing.assert_close(batch.images, torch.full_like(batch.images, 7 / 255))


def test_images_that_do_not_fit_are_told_as_such() -> None:
    """Smaller batches, which other lacks of memory call for, would not help."""
    image = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    pool = Pool(image.expand(2**40, 3, 8, 8), torch.zeros(1).long(), Preprocessing((0.0,) * 3, (1.0,) * 3))
    with pytest.raises(MemoryExhaustedError, match="1099511627776 images of 3 x 8 x 8") as caught:
        DeviceImages(pool, CPU)
    assert "data.cap" in str(caught.value)
    assert "batch_size" not in str(caught.value)


# --- weights of samples


@pytest.mark.parametrize(
    "train",
    [{"augment": "none"}, {"augment": "crop", "mix": "mixup"}, {"augment": "none", "mix": "cutmix"}],
    ids=str,
)
@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_one_change_nothing_but_the_weights(
    train: dict[str, Any], soft: bool, make_job: MakeJob, digits: Pool, soft_digits: Pool
) -> None:
    pool = soft_digits if soft else digits
    job = make_job(pool=pool, **train)
    weighted = replace(job, pool=replace(pool, weights=torch.ones(len(pool))))
    for plain_batch, batch in zip(all_batches([job]), all_batches([weighted]), strict=True):
        torch.testing.assert_close(batch.targets, plain_batch.targets)
        torch.testing.assert_close(batch.images, plain_batch.images)
        assert plain_batch.counts is None
        assert batch.counts is not None
        torch.testing.assert_close(batch.counts, torch.ones_like(batch.counts))


def test_each_sample_brings_its_own_weight(make_job: MakeJob, digits: Pool) -> None:
    weights = torch.arange(len(digits), dtype=torch.float32)
    job = make_job(pool=replace(digits, weights=weights), samples=24, augment="none")
    assert job.indices is not None
    for batch in all_batches([job]):
        assert batch.counts is not None
        torch.testing.assert_close(batch.counts[0], weights[job.indices[batch.index[0]]])


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_the_loss_of_a_mixed_sample_is_the_weighted_sum_of_its_two(
    mix: str, make_job: MakeJob, digits: Pool
) -> None:
    """By the definition: r w CE(z, y) + (1 - r) v CE(z, y'), in float64; a weight of 0 takes its sample away."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(len(digits), generator=generator) * (
        torch.rand(len(digits), generator=generator) > 0.3
    )
    job = make_job(
        pool=replace(digits, weights=weights), samples=24, augment="none", mix=mix, label_smoothing=0.0
    )
    batches = Batches([job], CPU)
    assert job.indices is not None
    labels, own = digits.targets[job.indices], weights[job.indices].double()
    for batch in batches.epoch(0):
        mixing = batches.looks.mix(0, batch.index)
        ratio, first, second = mixing.ratio.double(), batch.index[0], mixing.partner
        scores = torch.randn(len(first), 10, generator=generator, dtype=torch.float64).log_softmax(dim=1)
        wanted = -ratio * own[first] * scores.gather(1, labels[first, None])[:, 0]
        wanted -= (1 - ratio) * own[second] * scores.gather(1, labels[second, None])[:, 0]
        assert batch.counts is not None
        found = -(batch.targets[0] * scores).sum(dim=1) * batch.counts[0]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_weighted_and_plain_pools_are_not_stacked(make_job: MakeJob, digits: Pool) -> None:
    job = make_job()
    weighted = replace(job, pool=replace(digits, weights=torch.ones(len(digits))))
    assert stackable([job, weighted, job]) == [[0, 2], [1]]


@pytest.mark.parametrize("batch_size", [1, 7, 24])
def test_batches_of_any_size_together_give_the_weighted_loss_of_all(
    batch_size: int, make_job: MakeJob, digits: Pool
) -> None:
    """A mean by weights inside each batch would not: alone in its batch, a sample would count as any other."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(len(digits), generator=generator) ** 4
    pool = replace(digits, weights=weights / weights.mean())
    job = make_job(pool=pool, samples=24, augment="none", batch_size=batch_size, label_smoothing=0.0)
    assert job.indices is not None and pool.weights is not None
    scores = torch.randn(24, 10, generator=generator)
    own, labels = pool.weights[job.indices], digits.targets[job.indices]
    wanted = (own * torch.nn.functional.cross_entropy(scores, labels, reduction="none")).sum() / 24
    found = torch.tensor(0.0)
    for batch in Batches([job], CPU).epoch(0):
        logits = scores[batch.index[0]][None]
        loss = network_losses(logits, batch.targets, job.config, temperature=1.0, counts=batch.counts)
        found += loss[0] * batch.index.shape[1] / 24
    torch.testing.assert_close(found, wanted)
