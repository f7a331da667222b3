"""The reverse sweep against one graph over all steps, written out plainly; float64."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from distill.augment import apply_views, draw_views
from distill.cache.trajectories import Layout
from distill.matching.gradient import Learned, Matched, match
from distill.matching.networks import FlatNetworks
from distill.matching.steps import InnerSteps
from distill.models import build, model_config
from distill.models.norm import InstanceNorm, NormReluPool
from distill.randomness import counter_permutation, derive_seed
from distill.training.config import Augment

CPU = torch.device("cpu")
CLASSES, SIZE = 3, 8


@dataclass(frozen=True)
class Problem:
    """K students, their set and where they should arrive; `reference` is the network in torch's own layers."""

    networks: FlatNetworks
    reference: nn.Module
    learned: Learned
    start: Tensor
    target: Tensor
    seeds: tuple[int, ...]
    batch: int
    augment: Augment

    def steps(self, count: int) -> InnerSteps:
        return InnerSteps(
            count,
            seeds=self.seeds,
            samples=len(self.learned.images),
            batch=self.batch,
            augment=self.augment,
            size=(SIZE, SIZE),
            device=CPU,
        )

    def match(self, count: int, **options: object) -> Matched:
        return match(
            self.networks, self.steps(count), self.learned, start=self.start, target=self.target, **options
        )


def in_torchs_layers(module: nn.Module) -> nn.Module:
    """A copy without layers whose derivatives are written by hand; parameters keep their order."""
    copy = deepcopy(module)
    for name, part in module.named_modules():
        if isinstance(part, InstanceNorm):
            norm = nn.GroupNorm(part.num_groups, part.num_channels, eps=part.eps)
            whole = (
                nn.Sequential(norm, nn.ReLU(), nn.AvgPool2d(2)) if isinstance(part, NormReluPool) else norm
            )
            copy.set_submodule(name, whole.double())
    own = {
        "Conv2d",
        "GroupNorm",
        "Linear",
        "ReLU",
        "AvgPool2d",
        "Sequential",
        "Flatten",
        "Identity",
        "Classifier",
    }
    assert {type(part).__name__ for part in copy.modules()} <= own
    return copy


MakeProblem = Callable[..., Problem]


@pytest.fixture
def make() -> MakeProblem:
    def make(
        *,
        students: int = 1,
        labels: str = "hard",
        augment: Augment = "dsa",
        model: dict | None = None,
        samples: int = 6,
        batch: int = 4,
        lr: float = 0.05,
        channels_last: bool = False,
    ) -> Problem:
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        config = model_config(model or {"name": "convnet", "width": 6})
        module = build(config, image_shape=(2, SIZE, SIZE), classes=CLASSES, seed=1).double()
        reference = in_torchs_layers(module)
        networks = FlatNetworks(module, Layout.of(module, (0,)))
        flat = torch.cat([value.detach().reshape(-1) for value in module.parameters()])
        start = flat + 0.1 * draw(students, len(flat))
        images = draw(samples, 2, SIZE, SIZE)
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        targets = {
            "hard": torch.arange(samples) % CLASSES,
            "learned": draw(samples, CLASSES),
            "own": draw(students, samples, CLASSES),
        }[labels]
        learned = Learned(
            images, targets, torch.tensor(lr, dtype=torch.float64), learns_labels=labels == "learned"
        )
        target = start + 0.05 * draw(students, len(flat))
        seeds = tuple(range(7, 7 + students))
        return Problem(networks, reference, learned, start, target, seeds, batch, augment)

    return make


def plain(problem: Problem, count: int, *, first_order: bool = False) -> Matched:
    """Student by student, all T steps in one graph; `first_order` cuts it where TESLA does."""
    images = problem.learned.images.detach().requires_grad_()
    targets, lr = problem.learned.targets, problem.learned.lr.detach().requires_grad_()
    if problem.learned.learns_labels:
        targets = targets.detach().requires_grad_()
    losses = []
    for number, seed in enumerate(problem.seeds):
        start, target = problem.start[number], problem.target[number]
        theta = start.detach().requires_grad_()
        total = torch.zeros_like(theta)
        for step in range(count):
            at = theta.detach().requires_grad_() if first_order else theta
            gradient = step_gradient(problem, images, targets, at, step, number, seed)
            total = total + gradient
            theta = start - lr * total
        losses.append((theta - target).square().sum() / (start - target).square().sum())
    loss = torch.stack(losses)
    wanted = [images, lr, *([targets] if problem.learned.learns_labels else [])]
    found = torch.autograd.grad(loss.mean(), wanted)
    return Matched(loss.detach(), found[0], found[2] if len(found) > 2 else None, found[1])


def step_gradient(
    problem: Problem, images: Tensor, targets: Tensor, theta: Tensor, step: int, number: int, seed: int
) -> Tensor:
    samples = len(images)
    batches = torch.arange(samples).split(problem.batch)
    epoch, place = divmod(step, len(batches))
    index = counter_permutation(derive_seed(seed, "order"), epoch, samples)[batches[place]]
    views = draw_views(
        problem.augment,
        seed=derive_seed(seed, "views"),
        epoch=epoch,
        index=index,
        height=SIZE,
        width=SIZE,
    )
    shapes = {name: value.shape for name, value in problem.reference.named_parameters()}
    parts = theta.split([shape.numel() for shape in shapes.values()])
    named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    logits = functional_call(problem.reference, named, (apply_views(images[index], views),))
    own = targets[number] if targets.ndim == 3 else targets
    chosen = own[index] if not own.is_floating_point() else F.softmax(own[index], dim=1)
    return torch.autograd.grad(F.cross_entropy(logits, chosen), theta, create_graph=True)[0]


def assert_same(got: Matched, expected: Matched, *, tolerance: float = 1e-10) -> None:
    for name in ("loss", "images", "labels", "lr"):
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert float((a - b).norm()) <= tolerance * float(b.norm()), name
            assert float(b.norm()) > 0, name


@pytest.mark.parametrize("count", [1, 8, 50])
@pytest.mark.parametrize("labels", ["hard", "learned"])
def test_exact_is_the_gradient_through_all_steps(make: MakeProblem, labels: str, count: int) -> None:
    problem = make(labels=labels)
    assert_same(problem.match(count), plain(problem, count))
    assert_same(problem.match(count, gradient="unroll"), plain(problem, count))


@pytest.mark.parametrize("segment", [1, 3, 4, 8, 100])
def test_segments_do_not_change_the_gradient(make: MakeProblem, segment: int) -> None:
    problem = make(labels="learned")
    assert_same(problem.match(8, segment=segment), plain(problem, 8))


@pytest.mark.parametrize("count", [1, 8, 50])
@pytest.mark.parametrize("labels", ["hard", "learned"])
def test_first_order_is_teslas_formula(make: MakeProblem, labels: str, count: int) -> None:
    problem = make(labels=labels)
    got = problem.match(count, gradient="first_order")
    assert_same(got, plain(problem, count, first_order=True))
    if count > 1:
        exact = problem.match(count)
        assert float((got.images - exact.images).norm()) > 0.01 * float(exact.images.norm())


@pytest.mark.parametrize("gradient", ["exact", "first_order"])
@pytest.mark.parametrize("labels", ["hard", "learned", "own"])
def test_several_students_are_averaged(make: MakeProblem, labels: str, gradient: str) -> None:
    problem = make(students=3, labels=labels)
    expected = plain(problem, 5, first_order=gradient == "first_order")
    assert_same(problem.match(5, gradient=gradient), expected)


@pytest.mark.parametrize("options", [{"segment": 2}, {"segment": 5}, {"gradient": "unroll"}])
@pytest.mark.parametrize("labels", ["learned", "own"])
def test_several_students_unrolled(make: MakeProblem, labels: str, options: dict) -> None:
    problem = make(students=3, labels=labels)
    assert_same(problem.match(5, **options), plain(problem, 5))


@pytest.mark.parametrize("augment", ["none", "crop_flip", "dsa_without_flip"])
def test_views(make: MakeProblem, augment: Augment) -> None:
    problem = make(augment=augment)
    assert_same(problem.match(6), plain(problem, 6))


@pytest.mark.parametrize("batch", [6, 5, 1])
def test_batches(make: MakeProblem, batch: int) -> None:
    """All of the set, a short last batch, single images."""
    problem = make(batch=batch)
    assert_same(problem.match(8), plain(problem, 8))


@pytest.mark.parametrize("norm", ["none", "instance"])
def test_networks(make: MakeProblem, norm: str) -> None:
    problem = make(model={"name": "convnet", "width": 4, "norm": norm})
    assert_same(problem.match(4), plain(problem, 4))


def test_an_mlp(make: MakeProblem) -> None:
    problem = make(model={"name": "mlp", "width": 5})
    assert_same(problem.match(4), plain(problem, 4))


def test_images_of_either_layout(make: MakeProblem) -> None:
    assert_same(make(channels_last=True).match(4), plain(make(), 4))


def test_the_gradient_against_differences(make: MakeProblem) -> None:
    """Of the loss itself, along one direction of each part of the set."""
    problem = make(labels="learned", model={"name": "mlp", "width": 5})
    found = problem.match(6)
    generator = torch.Generator().manual_seed(3)
    assert found.labels is not None
    for name, gradient in (("images", found.images), ("targets", found.labels), ("lr", found.lr)):
        way = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        losses = []
        for step in (1e-5, -1e-5):
            moved = replace(problem.learned, **{name: getattr(problem.learned, name) + step * way})
            losses.append(replace(problem, learned=moved).match(6).loss)
        slope = float((losses[0] - losses[1]) / 2e-5)
        assert slope == pytest.approx(float((gradient * way).sum()), rel=1e-4)


@pytest.mark.parametrize("gradient", ["exact", "first_order", "unroll"])
def test_at_a_rate_of_0_only_the_rate_can_help(make: MakeProblem, gradient: str) -> None:
    problem = make(lr=0.0)
    found, expected = problem.match(4, gradient=gradient), plain(problem, 4)
    assert not found.images.any()
    assert float(found.lr) == pytest.approx(float(expected.lr), rel=1e-10)
    assert float(found.loss) == 1
