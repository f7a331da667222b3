"""Students that learn from labelled views: which views, which labels, in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.augment import apply_mix, apply_views, draw_mix, draw_views
from distill.randomness import counter_permutation, derive_seed
from distill.training.batches import Batch, Batches, DeviceImages, PlannedViews
from distill.training.config import TrainConfig
from distill.training.job import Job, Pool, ViewLabels, ViewPlan

MakeJob = Callable[..., Job]
CPU = torch.device("cpu")
SAMPLES, CLASSES = 30, 10
PLAN = ViewPlan(
    seed=3, epochs=4, batch_size=8, augment="crop_flip", crop_scale=0.5, mix="none", mix_alpha=1.0
)


class Table(ViewLabels):
    """Labels that say where they come from: logits (epochs, N, C), in the order of the plan."""

    def __init__(self, plan: ViewPlan, logits: Tensor) -> None:
        self.plan, self.logits = plan, logits

    def on(self, device: torch.device) -> Table:
        return self

    def batch(self, epoch: int, start: int, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.logits[epoch, start : start + len(images)], None


def table(plan: ViewPlan) -> Table:
    logits = torch.randn(plan.epochs, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(1))
    return Table(plan, logits)


def planned_job(make_job: MakeJob, digits: Pool, plan: ViewPlan, **train: Any) -> Job:
    pool = Pool(digits.images[:SAMPLES], digits.targets[:SAMPLES], digits.preprocessing, table(plan))
    job = make_job(pool=pool, **train)
    return replace(job, indices=None, test=None)


@pytest.mark.parametrize("mix", ["none", "mixup", "cutmix", "selfmix"])
@pytest.mark.parametrize("augment", ["crop_flip", "resized_crop"])
def test_views_follow_from_counters(digits: Pool, augment: Any, mix: Any) -> None:
    """Computed by hand from the documented counters, as another program would."""
    plan = replace(PLAN, augment=augment, mix=mix)
    pool = Pool(digits.images[:SAMPLES], digits.targets[:SAMPLES], digits.preprocessing)
    images = DeviceImages(pool, CPU)
    plain = images.gather(torch.arange(SAMPLES))
    views = PlannedViews(plan, images)
    for epoch in (2, 0):
        order = counter_permutation(derive_seed(plan.seed, "order"), epoch, SAMPLES)
        for start in views.starts:
            got, index = views.batch(epoch, start)
            assert torch.equal(index, order[start : start + plan.batch_size])

            def look(index: Tensor, seed: int, epoch: int = epoch) -> Tensor:
                drawn = draw_views(
                    plan.augment, seed=seed, epoch=epoch, index=index, height=8, width=8, crop_scale=0.5
                )
                return apply_views(plain[index], drawn)

            want = look(index, plan.seed)
            if mix != "none":
                how = draw_mix(
                    mix, alpha=1.0, seed=plan.seed, epoch=epoch, index=index, count=SAMPLES, height=8, width=8
                )
                other = derive_seed(plan.seed, "other view") if mix == "selfmix" else plan.seed
                want = apply_mix(want, look(how.partner, other), how)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_epochs_come_in_turn_with_their_labels(make_job: MakeJob, digits: Pool) -> None:
    job = planned_job(make_job, digits, PLAN, epochs=4, batch_size=8, loss="mse")
    batches = Batches([job, job], CPU)
    labels = job.pool.views
    assert isinstance(labels, Table)
    for epoch in (1, 3):
        found = list(batches.epoch(epoch))
        assert [batch.images.shape[:2] for batch in found] == [(2, 8), (2, 8), (2, 8), (2, 6)]
        for k in range(2):
            assert torch.equal(torch.cat([batch.targets[k] for batch in found]), labels.logits[epoch])
            seen = torch.cat([batch.index[k] for batch in found])
            assert torch.equal(seen.sort().values, torch.arange(SAMPLES))


def test_probabilities_are_softened_by_the_temperature(make_job: MakeJob, digits: Pool) -> None:
    job = planned_job(make_job, digits, PLAN, epochs=4, batch_size=8, temperature=4.0)
    batches = Batches([job], CPU)
    labels = job.pool.views
    assert isinstance(labels, Table) and batches.temperature == 4.0
    first = next(iter(batches.epoch(0)))
    torch.testing.assert_close(first.targets[0], (labels.logits[0, :8] / 4).softmax(dim=1))


def test_fewer_passes_are_drawn_from(make_job: MakeJob, digits: Pool) -> None:
    """With replacement, from all of them, and the same again."""
    job = planned_job(make_job, digits, PLAN, epochs=100, batch_size=8, loss="mse")
    labels = job.pool.views
    assert isinstance(labels, Table)
    known = {
        labels.logits[epoch, start].numpy().tobytes(): (epoch, start)
        for epoch in range(4)
        for start in range(0, SAMPLES, 8)
    }
    drawn = [
        [known[batch.targets[0, 0].numpy().tobytes()] for batch in Batches([job], CPU).epoch(epoch)]
        for epoch in range(100)
    ]
    assert all(len(epoch) == 4 for epoch in drawn)
    counts = {place: sum(epoch.count(place) for epoch in drawn) for place in known.values()}
    assert min(counts.values()) > 5 and max(counts.values()) < 60  # 25 each, expected
    assert [known[b.targets[0, 0].numpy().tobytes()] for b in Batches([job], CPU).epoch(7)] == drawn[7]


def test_micro_batches_add_up_to_the_batch(make_job: MakeJob, digits: Pool) -> None:
    """Without batch norm, parts change a training by rounding alone."""
    from distill.training.loop import train

    whole = planned_job(make_job, digits, PLAN, epochs=3, batch_size=8)
    parts = planned_job(make_job, digits, PLAN, epochs=3, batch_size=8, micro_batches=3)
    results = [
        train([replace(job, keep_state=True)], device=CPU, dtype=torch.float32)[0] for job in (whole, parts)
    ]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-4)
    for one, other in zip(*(result.state.values() for result in results), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_more_parts_than_a_batch_has_images_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batches 9 is above batch_size 8"):
        TrainConfig(batch_size=8, micro_batches=9)


def test_batches_in_any_order_are_those_in_order(digits: Pool) -> None:
    plan = replace(PLAN, augment="resized_crop", mix="selfmix")
    pool = Pool(digits.images[:SAMPLES], digits.targets[:SAMPLES], digits.preprocessing)
    one, other = (PlannedViews(plan, DeviceImages(pool, CPU), scattered=each) for each in (False, True))
    for epoch, start in ((3, 8), (0, 24), (3, 8), (1, 0)):
        for ours, theirs in zip(one.batch(epoch, start), other.batch(epoch, start), strict=True):
            assert torch.equal(ours, theirs)


def test_parts_of_a_batch_add_up_to_it() -> None:
    """Also where samples have weights, and where there are fewer samples than parts."""
    generator = torch.Generator().manual_seed(0)
    for count, size in ((4, 10), (3, 7), (5, 3)):
        losses = torch.rand(1, size, generator=generator)
        for weights in (None, (torch.rand(1, size, generator=generator) > 0.4).float()):
            batch = Batch(torch.zeros(1, size, 1), losses, torch.arange(size)[None], weights)
            parts = batch.parts(count)
            sizes = [part.index.shape[1] for part in parts]
            assert sum(sizes) == size and max(sizes) - min(sizes) <= 1 and len(parts) == min(count, size)
            total = 0.0
            for part in parts:
                w = torch.ones_like(part.targets) if part.weights is None else part.weights
                mean = (part.targets * w).sum() / w.sum().clamp(min=1e-12)
                total = total + mean * part.share(batch)
            w = torch.ones_like(losses) if weights is None else weights
            torch.testing.assert_close(torch.as_tensor(total).view(()), (losses * w).sum() / w.sum())
