"""GLISTER: gains against finite differences of the true loss, greedy with a fresh gradient, and quotas of classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataselect.glister import Glister, Head, glister, rank_in_group
from dataselect.gradients import FactoredGradients
from distill.cache.teachers import train_teacher
from distill.contracts import Context, Source
from distill.errors import InputError, RecipeErrors
from distill.recipe import make_recipe

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 2, "batch_size": 16}}


class Problem:
    """A last layer, N training samples and M validation samples, in float64."""

    def __init__(
        self, seed: int = 0, *, count: int = 40, valid: int = 25, classes: int = 3, width: int = 5
    ) -> None:
        rng = np.random.default_rng(seed)
        self.layer = torch.from_numpy(rng.normal(size=(classes, width + 1)))
        self.inputs, self.valid_inputs = (
            torch.cat(
                [torch.from_numpy(rng.normal(size=(n, width))), torch.ones(n, 1, dtype=torch.float64)], dim=1
            )
            for n in (count, valid)
        )
        self.labels, self.valid_labels = (
            torch.from_numpy(rng.integers(0, classes, n)) for n in (count, valid)
        )
        self.left = F.softmax(self.inputs @ self.layer.T, dim=1) - F.one_hot(self.labels, classes)

    @property
    def gradients(self) -> FactoredGradients:
        return FactoredGradients(self.left.float(), self.inputs.float())

    @property
    def head(self) -> Head:
        logits = self.valid_inputs @ self.layer.T
        return Head(self.valid_inputs.float(), logits.float(), self.valid_labels)

    def step(self, rows: list[int]) -> Tensor:
        """The sum of the gradients of rows, (C, D + 1)."""
        return self.left[rows].T @ self.inputs[rows]

    def loss(self, step: Tensor) -> float:
        """The mean validation loss of the layer minus a step."""
        return float(F.cross_entropy(self.valid_inputs @ (self.layer - step).T, self.valid_labels))

    def gain(self, row: int, done: Tensor) -> float:
        """The slope of the loss along -g_row after a step, by central differences."""
        small = 1e-5
        ahead, behind = (self.loss(done + sign * small * self.step([row])) for sign in (1, -1))
        return (behind - ahead) / (2 * small)


def slow_glister(problem: Problem, count: int, *, lr: float, every: int) -> tuple[list[int], list[float]]:
    """The definition, without classes: the finite differences of the loss itself, refreshed after `every` picks."""
    picks: list[int] = []
    gains: list[float] = []
    rate = lr / count
    while len(picks) < count:
        done = rate * problem.step(picks)
        found = np.array([rate * problem.gain(row, done) for row in range(len(problem.labels))])
        found[picks] = -np.inf
        best = np.argsort(-found, kind="stable")[: min(every, count - len(picks))].tolist()
        picks += best
        gains += found[best].tolist()
    return picks, gains


def run(problem: Problem, count: int, *, lr: float, every: int) -> tuple[list[int], list[float]]:
    groups = np.zeros(len(problem.labels), np.int64)
    rows, gains = glister(problem.gradients, problem.head, groups, np.array([count]), lr=lr, every=every)
    return rows.tolist(), gains.tolist()


@pytest.mark.parametrize("every", [1, 4, 12])
@pytest.mark.parametrize("lr", [0.1, 20.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_greedy_on_finite_differences_of_the_loss(seed: int, lr: float, every: int) -> None:
    problem = Problem(seed)
    rows, gains = run(problem, 12, lr=lr, every=every)
    wanted, wanted_gains = slow_glister(problem, 12, lr=lr, every=every)
    assert rows == wanted
    np.testing.assert_allclose(gains, wanted_gains, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_slope_after_a_step_is_that_of_the_moved_layer(seed: int) -> None:
    """The last layer is linear: nothing is approximated. Against autograd, in float64."""
    problem = Problem(seed, valid=5000)  # more than a block
    step = 0.3 * problem.step([1, 5, 7])
    layer = (problem.layer - step).requires_grad_()
    F.cross_entropy(problem.valid_inputs @ layer.T, problem.valid_labels).backward()
    assert layer.grad is not None
    torch.testing.assert_close(problem.head.slope(step), layer.grad, rtol=1e-4, atol=1e-6)


def test_refreshing_changes_the_picks_and_lowers_the_loss_further() -> None:
    """The fault of the release: the first gradient for ever, which is the ranking by one product."""
    better = 0
    for seed in range(6):
        problem = Problem(seed, count=200, valid=60)
        fresh, stale = (run(problem, 40, lr=10.0, every=every)[0] for every in (1, 40))
        first = problem.gradients.products(problem.head.slope(torch.zeros_like(problem.layer)))
        assert stale == torch.argsort(first, descending=True, stable=True)[:40].tolist()
        assert set(fresh) != set(stale)
        better += problem.loss(10.0 / 40 * problem.step(fresh)) < problem.loss(
            10.0 / 40 * problem.step(stale)
        )
    assert better == 6


def test_the_picks_lower_the_loss_and_random_ones_less() -> None:
    problem = Problem(3, count=200, valid=60)
    rows, _ = run(problem, 20, lr=2.0, every=1)
    rng = np.random.default_rng(0)
    drawn = [problem.loss(0.1 * problem.step(rng.permutation(200)[:20].tolist())) for _ in range(20)]
    assert problem.loss(0.1 * problem.step(rows)) < min(drawn)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_every_class_gets_its_share_and_no_class_goes_first(every: int) -> None:
    problem = Problem(1, count=60)
    quotas = np.array([2, 7, 4])
    groups = problem.labels.numpy()
    rows, gains = glister(problem.gradients, problem.head, groups, quotas, lr=1.0, every=every)
    assert np.bincount(groups[rows.numpy()], minlength=3).tolist() == [2, 7, 4]
    assert len(set(rows.tolist())) == 13
    if every == 100:  # one gradient: classes mixed, by gain alone
        assert (np.diff(gains.numpy()) <= 1e-7).all()
        assert sorted(groups[rows.numpy()].tolist()) != groups[rows.numpy()].tolist()


def test_golden_picks() -> None:
    """One feature, two classes, by hand: the validation sample is of class 0; class 0's strongest input goes first."""
    left = torch.tensor([[-0.5, 0.5], [-0.5, 0.5], [0.5, -0.5], [-0.5, 0.5]])
    right = torch.tensor([[1.0, 1.0], [3.0, 1.0], [3.0, 1.0], [3.0, 1.0]])
    head = Head(torch.tensor([[1.0, 1.0]]), torch.zeros(1, 2), torch.tensor([0]))
    rows, gains = glister(
        FactoredGradients(left, right), head, np.zeros(4, np.int64), np.array([4]), lr=0.4, every=4
    )
    assert rows.tolist() == [1, 3, 0, 2], "of equals the lowest"
    assert gains.tolist() == pytest.approx([0.2, 0.2, 0.1, -0.2])


def test_alike_samples_are_picked_in_order_and_samples_that_are_not_finite_have_no_say() -> None:
    left, right = torch.full((7, 2), 0.5), torch.ones(7, 3)
    head = Head(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64))
    rows, gains = glister(
        FactoredGradients(left, right), head, np.zeros(7, np.int64), np.array([7]), lr=1.0, every=2
    )
    assert rows.tolist() == list(range(7))
    assert gains.tolist() == [0] * 7
    inputs = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    with_hole = Head(inputs, torch.zeros(2, 2), torch.tensor([0, 1]))
    alone = Head(inputs[:1], torch.zeros(1, 2), torch.tensor([0]))
    step = torch.zeros(2, 2, dtype=torch.float64)
    assert torch.equal(with_hole.slope(step), alone.slope(step))


@pytest.mark.parametrize("block", [1, 7])
def test_ties_and_picks_do_not_depend_on_blocks(block: int) -> None:
    problem = Problem(2)
    left, right = problem.left.float().repeat(3, 1), problem.inputs.float().repeat(3, 1)
    groups = np.zeros(120, np.int64)
    wanted, _ = glister(FactoredGradients(left, right), problem.head, groups, np.array([50]), lr=5.0, every=3)
    parts = FactoredGradients(left, right, block=block)
    found, _ = glister(parts, problem.head, groups, np.array([50]), lr=5.0, every=3)
    assert found.tolist() == wanted.tolist()
    whole, _ = glister(
        FactoredGradients(left, right), problem.head, groups, np.array([120]), lr=5.0, every=120
    )
    place = {row: number for number, row in enumerate(whole.tolist())}
    assert all(place[row] < place[row + 40] < place[row + 80] for row in range(40))


def test_ranks_in_groups() -> None:
    groups = torch.tensor([2, 0, 2, 2, 0, 5])
    assert rank_in_group(groups).tolist() == [0, 0, 1, 2, 1, 0]


# --- in a run


def test_gains_of_a_run_are_those_of_the_network(
    source: Source, make_context: Callable[..., Context]
) -> None:
    """By autograd through the network's own last layer: no step yet, so the first gradient of all."""
    context = make_context()
    config = Glister.Config.model_validate(
        {"count": 6, "per_class": False, "network": NETWORK, "refresh": 1.0}
    )
    found = Glister(config).run(context, source, None)
    network = train_teacher(context, source, config.network, name="again")
    features, logits = (
        {
            split: read(getattr(source, split), network).take(np.arange(len(getattr(source, split))))
            for split in ("train", "valid")
        }
        for read in (context.cache.features, context.cache.logits)
    )

    def slopes(split: str) -> Tensor:
        labels = getattr(source, split).labels
        wrong = F.softmax(logits[split], dim=1) - F.one_hot(labels, 3)
        inputs = torch.cat([features[split], torch.ones(len(labels), 1)], dim=1)
        return wrong[:, :, None] * inputs[:, None]

    gains = config.lr / 6 * (slopes("train") * slopes("valid").mean(dim=0)).sum(dim=(1, 2))
    np.testing.assert_allclose(found.scores, gains[torch.from_numpy(found.indices)], rtol=1e-3, atol=1e-7)
    assert found.indices.tolist() == torch.argsort(gains, descending=True)[:6].tolist()
    assert "valid" in found.meta["score"]


def test_without_validation_images_it_is_refused_before_any_work(make_source: Callable[..., Source]) -> None:
    source = make_source(valid=0)
    with pytest.raises(InputError, match="needs validation images") as caught:
        Glister(Glister.Config(ipc=2)).check(source, None)
    assert "against: train" in str(caught.value.fix)
    Glister(Glister.Config(ipc=2, against="train")).check(source, None)


@pytest.mark.parametrize(
    "options", [{"features": "gradients"}, {"checkpoints": 2}, {"refresh": 0}, {"lr": 0.0}]
)
def test_what_has_no_closed_form_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeErrors):
        make_recipe({"data": {"name": "digits"}, "steps": [{"glister": {"ipc": 2, **options}}]})


@pytest.mark.gpu
def test_gpu_picks_what_the_cpu_picks() -> None:
    problem = Problem(0, count=500, valid=100, classes=10, width=32)
    on_gpu = FactoredGradients(problem.left.float().cuda(), problem.inputs.float().cuda())
    head = Head(*(part.cuda() for part in problem.head))
    groups, quotas = problem.labels.numpy(), np.full(10, 5)
    a, gains = glister(problem.gradients, problem.head, groups, quotas, lr=1.0, every=5)
    b, others = glister(on_gpu, head, groups, quotas, lr=1.0, every=5)
    assert a.tolist() == b.cpu().tolist()
    torch.testing.assert_close(gains, others.cpu(), rtol=1e-5, atol=1e-9)
