"""Ensembles against their formulas; batch statistics against a network that takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.cache.networks import Network
from distill.cache.teachers import train_teacher
from distill.contracts import Context, Preprocessing, Source
from distill.errors import InputError, NonFiniteError
from distill.labels.codecs import decode
from distill.labels.ensemble import Ensemble, refuse_without_batch_norm
from distill.labels.labelling import with_labels
from distill.labels.pool import PoolTeacher, open_pool
from distill.labels.relabel import Relabelling
from distill.labels.set_teachers import set_teachers
from distill.labels.view_labels import plan_of
from distill.models import build, model_config
from distill.models.base import Classifier, ModelConfig
from distill.selection import materialise
from distill.training.batches import DeviceImages, PlannedViews
from distill.training.job import Pool
from tests.distillers.test_soft_label import selection, soft_label

MakeContext = Callable[..., Context]
CPU = torch.device("cpu")
PLAIN = Preprocessing(mean=(0.4,), std=(0.3,))


def teacher(seed: int, *, norm: str = "batch", preprocessing: Preprocessing = PLAIN) -> Network:
    model = model_config({"name": "convnet", "width": 4, "norm": norm})
    module = build(model, image_shape=(1, 8, 8), classes=3, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            part.running_mean += 0.2 * torch.randn(part.running_mean.shape, generator=generator)
    return Network(model, (1, 8, 8), 3, preprocessing, module.state_dict(), {})


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(9))


def ensemble(*networks: Network, weights: tuple[float, ...] | None = None, **options: Any) -> Ensemble:
    shares = weights or (1 / len(networks),) * len(networks)
    return Ensemble(networks, shares, options.pop("temperature", 4.0), PLAIN, **options)


def alone(network: Network, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.module(CPU)(x)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)  # rounded to float16


def test_logits_are_weighed() -> None:
    one, other, x = teacher(0), teacher(1), images()
    got = ensemble(one, other, weights=(0.3, 0.7)).on(CPU).logits(x)
    close(got, 0.3 * alone(one, x) + 0.7 * alone(other, x))
    assert torch.equal(got, got.half().float())


def test_probabilities_are_weighed() -> None:
    one, other, x = teacher(0), teacher(1), images()
    got = ensemble(one, other, weights=(0.3, 0.7), combine="probabilities").on(CPU).logits(x)
    wanted = 0.3 * (alone(one, x) / 4).softmax(1) + 0.7 * (alone(other, x) / 4).softmax(1)
    close((got / 4).softmax(dim=1), wanted)


def test_batch_statistics_are_those_of_the_micro_batch() -> None:
    """As a network in training mode has them, part by part, and nothing of it stays."""
    network, x = teacher(0), images(7)
    labellers = ensemble(network, batch_norm="batch", micro_batches=2).on(CPU)
    got = labellers.logits(x)
    training = network.module(CPU).train()
    with torch.no_grad():
        close(got, torch.cat([training(part) for part in (x[:4], x[4:])]))
    assert not torch.allclose(got, alone(network, x), atol=1e-2)
    assert torch.equal(labellers.logits(x), got)
    for name, value in labellers.modules[0].state_dict().items():
        if "running" in name:
            assert torch.equal(value, network.state[name])


class Dropping(ModelConfig):
    """A network that forgets nearly everything in training mode."""

    name: Literal["dropping"] = "dropping"

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9))
        return Classifier(body, nn.Linear(36, classes))

    def describe(self) -> str:
        return "dropping"


def test_dropout_is_off_with_batch_statistics() -> None:
    module, x = build(Dropping(), image_shape=(1, 8, 8), classes=3, seed=0), images()
    network = Network(Dropping(), (1, 8, 8), 3, PLAIN, module.state_dict(), {})
    got = ensemble(network, batch_norm="batch").on(CPU).logits(x)
    module.eval().body[1].train()
    with torch.no_grad():
        close(got, module(x))
    assert not torch.allclose(got, alone(network, x), atol=1e-2)


def test_a_teacher_sees_images_as_it_was_trained() -> None:
    theirs = Preprocessing(mean=(0.1,), std=(0.9,))
    network, x = teacher(0, preprocessing=theirs), images()
    pixels = x * 0.3 + 0.4
    close(ensemble(network).on(CPU).logits(x), alone(network, (pixels - 0.1) / 0.9))


def test_a_teacher_of_nan_is_named() -> None:
    network = teacher(0)
    network.state["classifier.bias"].fill_(float("nan"))
    labellers = ensemble(teacher(1), network).on(CPU)
    with pytest.raises(NonFiniteError, match=r"the teacher convnet-w4-batch \(1\) gave NaN"):
        labellers.logits(images())


def test_names_tell_teachers_apart() -> None:
    assert ensemble(teacher(0), teacher(1)).names == ("convnet-w4-batch (0)", "convnet-w4-batch (1)")
    assert ensemble(teacher(0), teacher(1, norm="instance")).names == ("convnet-w4-batch", "convnet-w4")


def test_no_batch_norm_is_refused() -> None:
    networks = {"a": teacher(0).outline, "b": teacher(1, norm="instance").outline}
    with pytest.raises(InputError, match="no batch norm") as caught:
        refuse_without_batch_norm(networks, where="recover.statistics", fix="set it to 0")
    assert "found: b" in str(caught.value) and "recover.statistics" in str(caught.value)


def test_whitened_images_are_refused() -> None:
    zca = Preprocessing(mean=(0.4,), std=(0.3,), zca=torch.eye(64).numpy())
    with pytest.raises(InputError, match="whitened"):
        Ensemble((teacher(0),), (1.0,), 4.0, zca).on(CPU)


def test_one_teacher_is_itself() -> None:
    network, x = teacher(0), images()
    got = ensemble(network, combine="probabilities", temperature=1.0).on(CPU).logits(x)
    close(F.log_softmax(got, dim=1), F.log_softmax(alone(network, x), dim=1))


# --- labels of sets


def test_labels_of_a_set_are_those_of_each_micro_batch_alone(
    source: Source, make_context: MakeContext
) -> None:
    """Batches of five and four views, each normalised in two parts."""
    ctx = make_context(epochs=2, batch_size=5, micro_batches=2, augment="crop")
    pooled = PoolTeacher.model_validate(
        {"model": {"name": "convnet", "width": 4, "norm": "batch"}, "train": {"epochs": 1}}
    )
    (network,) = open_pool(ctx, source, [pooled])
    plain = materialise(selection(list(range(9))), source, ctx.train)
    how = Relabelling(batch_norm="batch")
    made = with_labels(ctx, source, plain, [pooled], [network], [1.0], how, temperature=4.0)
    assert made.soft is not None and made.soft.attributes["micro_batches"] == 2
    labels, plan, training = decode(made.soft), plan_of(made.soft), network.module(CPU).train()
    assert plan is not None and plan.epochs == 2
    views = PlannedViews(plan, DeviceImages(Pool(plain.images, plain.labels, plain.preprocessing), CPU))
    for epoch in range(2):
        for start in views.starts:
            seen, _ = views.batch(epoch, start)
            with torch.no_grad():
                alone, whole = torch.cat([training(part) for part in seen.chunk(2)]), training(seen)
            close(labels[epoch, start : start + len(seen)], alone)
            assert not torch.allclose(alone, whole, atol=1e-2)


def test_one_teacher_labels_views_as_it_is(source: Source, make_context: MakeContext) -> None:
    ctx, step = make_context(epochs=2, batch_size=4, augment="crop"), soft_label(ipc=2, views={})
    made = step.run(ctx, source, None)
    teacher = train_teacher(ctx, source, step.config.teacher, name="teacher")
    assert made.soft is not None and made.soft.attributes["weights"] == [1.0]
    plan = plan_of(made.soft)
    assert plan is not None
    views = PlannedViews(plan, DeviceImages(Pool(made.images, made.labels, made.preprocessing), CPU))
    seen, _ = views.batch(1, 4)
    close(decode(made.soft)[1, 4:6], alone(teacher, seen))


def test_one_teacher_labels_other_images_as_it_labelled_the_sets(
    source: Source, make_context: MakeContext
) -> None:
    ctx = make_context()
    made = soft_label(ipc=2, temperature=3.0).run(ctx, source, None)
    assert made.soft is not None
    again = set_teachers(ctx, source, made).label(Pool(made.images, made.labels, made.preprocessing))
    close(again.targets, decode(made.soft)[0])
