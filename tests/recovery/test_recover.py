"""Recovery against a plain loop of one group at a time, and what must not change its result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.augment import apply_views, draw_views
from distill.cache.networks import Network
from distill.contracts import Context, Preprocessing
from distill.errors import InputError, NonFiniteError
from distill.models import build, model_config
from distill.recovery import recover as module
from distill.recovery.initial import Initial, noise
from distill.recovery.objective import Judge
from distill.recovery.recover import Group, Recovery, groups_of, recover, refuse_sizes
from distill.recovery.statistics import FIRST_LAYER

MakeContext = Callable[..., Context]
PLAIN = Preprocessing(mean=(0.4,), std=(0.3,))
CPU = torch.device("cpu")
LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2])
VOICES = ((0, 0.7), (1, 0.3))


def network(seed: int, name: str = "convnet") -> Network:
    options: dict[str, Any] = {"width": 4, "norm": "batch"} if name == "convnet" else {}
    model = model_config({"name": name, **options})
    net = build(model, image_shape=(1, 8, 8), classes=3, seed=seed)
    return Network(model, (1, 8, 8), 3, PLAIN, net.state_dict(), {})


def judge(seed: int, **options: Any) -> Judge:
    options = {"statistics": 0.1, **options}
    return Judge(network(seed), f"teacher {seed}", preprocessing=PLAIN, device=CPU, **options)


def begin() -> Tensor:
    return torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def run(ctx: Context, config: Recovery, groups: list[Group] | None = None, **options: Any) -> Tensor:
    groups = groups or groups_of(LABELS.tolist(), lambda _: VOICES, classwise=config.classwise)
    judges = options["judges"] if "judges" in options else [judge(0), judge(1)]
    return recover(
        ctx,
        Initial((1, 8, 8), lambda rows: begin()[rows]),
        LABELS,
        groups,
        judges,
        config,
        preprocessing=PLAIN,
    )


def plain_loss(seed: int, x: Tensor, y: Tensor) -> Tensor:
    net, terms = network(seed).module(CPU), []
    parts = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]

    def hook(part: nn.BatchNorm2d, given: tuple[Tensor], _: Tensor) -> None:
        flat = given[0].transpose(0, 1).flatten(1)
        mean, var = flat.mean(1), flat.var(1, unbiased=False)
        terms.append((mean - part.running_mean).norm() + (var - part.running_var).norm())

    for part in parts:
        part.register_forward_hook(hook)
    entropy = F.cross_entropy(net(x), y)
    return entropy + 0.1 * (sum(terms) + (FIRST_LAYER - 1) * terms[0])


def plain(ctx: Context, config: Recovery) -> Tensor:
    """One group after the other, two teachers each step, Adam written as torch has it."""
    low, high = (0 - 0.4) / 0.3, (1 - 0.4) / 0.3
    out = torch.empty(9, 1, 8, 8)
    for number in range(3):
        rows = torch.tensor([number, 3 + number, 6 + number])
        x = begin()[rows].clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=config.lr, betas=(0.5, 0.9))
        for step in range(config.iterations):
            adam.param_groups[0]["lr"] = config.lr * (1 + math.cos(math.pi * step / config.iterations)) / 2
            views = draw_views(
                config.augment, seed=ctx.derive("recovery views"), epoch=step, index=rows, height=8, width=8
            )
            seen = apply_views(x, views)
            loss = sum(weight * plain_loss(seed, seen, LABELS[rows]) for seed, weight in VOICES)
            adam.zero_grad()
            loss.backward()
            adam.step()
            x.data.clamp_(low, high)
        out[rows] = x.detach()
    return ((out * 0.3 + 0.4) * 255).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("batch", [1, 6, 500])
def test_groups_together_are_groups_alone(make_context: MakeContext, batch: int) -> None:
    config = Recovery(iterations=12, augment="crop", batch=batch, lr=0.1)
    ctx = make_context()
    got, want = run(ctx, config).int(), plain(ctx, config).int()
    assert (got - want).abs().max() <= 2
    assert ((got - want) != 0).double().mean() < 0.01
    assert (got - (begin() * 0.3 + 0.4).mul(255).round().clamp(0, 255).int()).abs().max() > 20


@pytest.mark.parametrize("voters", ["all", "turns"])
def test_groups_of_different_voters_are_learned_together(make_context: MakeContext, voters: Any) -> None:
    config = Recovery(iterations=6, augment="crop", lr=0.1, voters=voters)
    pairs = [((0, 0.7), (1, 0.3)), ((1, 0.6), (2, 0.4)), ((0, 0.2), (2, 0.8))]
    judges = [judge(number) for number in range(3)]
    groups = groups_of(LABELS.tolist(), lambda number: pairs[number], classwise=False)
    assert len(module._shards(groups, 500)) == 1 and len(module._shards(groups, 3)) == 3
    together = run(make_context(), config, groups, judges=judges).int()
    alone = run(make_context(), config.model_copy(update={"batch": 3}), groups, judges=judges).int()
    assert (together - alone).abs().max() <= 2
    others = groups_of(LABELS.tolist(), lambda number: pairs[0], classwise=False)
    assert (run(make_context(), config, others, judges=judges).int() - together).abs().max() > 2


def test_the_teacher_that_broke_first_is_named(make_context: MakeContext) -> None:
    """Also where it judges in steps of its own, and poisons what the others see."""
    broken = network(2)
    broken.state["classifier.bias"].fill_(float("nan"))
    odd = Judge(broken, "the odd", preprocessing=PLAIN, device=CPU, statistics=0.1)
    config = Recovery(iterations=9, augment="none", voters="turns")
    groups = groups_of(LABELS.tolist(), lambda _: ((0, 0.4), (1, 0.3), (2, 0.3)), classwise=False)
    with pytest.raises(NonFiniteError, match="the teacher the odd gave NaN"):
        run(make_context(), config, groups, judges=[judge(0), judge(1), odd])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"iterations": 2, "segments": 3}, "above iterations"),
        ({"iterations": 2, "sizes": (8, 12)}, "would never be used"),
        ({"iterations": 2, "residual": 0.5}, "belongs to the second segment"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Recovery(**options)


def test_noise_of_an_image_depends_on_nothing_but_its_number() -> None:
    begins = noise((3, 8, 8), seed=5, device=CPU)
    all_of_them = begins.rows(torch.arange(50))
    assert torch.equal(begins.rows(torch.tensor([7, 31])), all_of_them[[7, 31]])
    assert abs(float(all_of_them.mean())) < 0.05 and abs(float(all_of_them.std()) - 1) < 0.05
    assert torch.isfinite(noise((1, 64, 64), seed=0, device=CPU).rows(torch.arange(200))).all()
    assert not torch.equal(noise((3, 8, 8), seed=6, device=CPU).rows(torch.arange(50)), all_of_them)


def test_groups_are_numbers_or_classes() -> None:
    numbers = groups_of(LABELS.tolist(), lambda number: ((number, 1.0),), classwise=False)
    assert [group.images for group in numbers] == [(0, 3, 6), (1, 4, 7), (2, 5, 8)]
    assert [group.voters for group in numbers] == [((0, 1.0),), ((1, 1.0),), ((2, 1.0),)]
    classes = groups_of(LABELS.tolist(), lambda _: VOICES, classwise=True)
    assert [group.images for group in classes] == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    many = groups_of(list(range(250)), lambda _: VOICES, classwise=False)
    assert [len(group.images) for group in many] == [100, 100, 50]


def test_classes_of_unequal_size() -> None:
    groups = groups_of([0, 0, 1], lambda _: VOICES, classwise=False)
    assert [group.images for group in groups] == [(0, 2), (1,)]


def test_finished_shards_are_not_learned_again(make_context: MakeContext, monkeypatch: Any) -> None:
    config = Recovery(iterations=4, augment="none", batch=3)
    whole = run(make_context(), config)
    ctx, seen = make_context(), []
    learn = module._Shard.learn

    def dying(self: Any, *args: Any) -> Tensor:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(self.rows)
        return learn(self, *args)

    monkeypatch.setattr(module._Shard, "learn", dying)
    with pytest.raises(KeyboardInterrupt):
        run(ctx, config)
    again = []
    monkeypatch.setattr(module._Shard, "learn", lambda self, *a: (again.append(1), learn(self, *a))[1])
    assert torch.equal(run(ctx, config), whole)
    assert len(again) == 1


def test_no_steps_keep_the_images(make_context: MakeContext) -> None:
    got = run(make_context(), Recovery(iterations=0), judges=[])
    assert torch.equal(got, ((begin() * 0.3 + 0.4) * 255).round().clamp(0, 255).to(torch.uint8))


def test_teachers_take_turns(make_context: MakeContext) -> None:
    """With two steps and two teachers, each judges one; the weights do not matter then."""
    config = Recovery(iterations=2, augment="none", voters="turns", lr=0.1)
    heavy = groups_of(LABELS.tolist(), lambda _: ((0, 0.9), (1, 0.1)), classwise=False)
    light = groups_of(LABELS.tolist(), lambda _: ((0, 0.1), (1, 0.9)), classwise=False)
    assert torch.equal(run(make_context(), config, heavy), run(make_context(), config, light))
    alone = groups_of(LABELS.tolist(), lambda _: ((0, 1.0),), classwise=False)
    assert not torch.equal(run(make_context(), config, alone), run(make_context(), config, light))


def test_segments_take_back_what_they_began_with(make_context: MakeContext) -> None:
    """Nothing is learned at a tiny rate: the images stay, whatever is mixed back."""
    config = Recovery(iterations=4, segments=2, residual=0.5, lr=1e-7, augment="none")
    kept = run(make_context(), Recovery(iterations=0), judges=[])
    assert (run(make_context(), config).int() - kept.int()).abs().max() <= 1
    moved = Recovery(iterations=8, segments=2, residual=0.0, lr=0.2, augment="none")
    other = Recovery(iterations=8, segments=2, residual=1.0, lr=0.2, augment="none")
    assert not torch.equal(run(make_context(), moved), run(make_context(), other))


def test_sizes_that_a_teacher_cannot_take_are_refused(make_context: MakeContext) -> None:
    config = Recovery(iterations=4, segments=2, sizes=(8, 12))
    with pytest.raises(InputError, match="cannot take images of 12 x 12 px"):
        refuse_sizes({"a": network(0).module(CPU).to("meta")}, config, 1)


def test_sizes_change_and_come_back(make_context: MakeContext) -> None:
    judges = [
        Judge(network(k, "resnet18"), "r", preprocessing=PLAIN, device=CPU, statistics=0.1) for k in (0, 1)
    ]
    config = Recovery(iterations=2, segments=2, sizes=(8, 12), residual=0.5)
    refuse_sizes({"r": network(0, "resnet18").module(CPU).to("meta")}, config, 1)
    assert run(make_context(), config, judges=judges).shape == (9, 1, 8, 8)


def test_class_statistics_are_the_targets(make_context: MakeContext) -> None:
    """Images whose statistics are told to be the targets have nothing to change but the cross-entropy."""
    plain_judge = judge(0)
    wanted = {
        name: (mean.expand(3, -1).clone(), var.expand(3, -1).clone())
        for name, (mean, var) in plain_judge.targets.items()
    }
    x = begin()
    same = judge(0, classwise=wanted).loss(x, LABELS, groups=3)
    torch.testing.assert_close(same, plain_judge.loss(x, LABELS, groups=3))
    name = next(iter(wanted))
    wanted[name][0][1] += 5
    changed = judge(0, classwise=wanted).loss(x, LABELS, groups=3)
    assert torch.equal(changed[[0, 2]], same[[0, 2]]) and changed[1] > same[1]


def test_a_teacher_of_nan_is_named(make_context: MakeContext) -> None:
    broken = network(0)
    broken.state["classifier.bias"].fill_(float("nan"))
    judges = [judge(1), Judge(broken, "the broken", preprocessing=PLAIN, device=CPU, statistics=0.1)]
    with pytest.raises(NonFiniteError, match="the teacher the broken gave NaN"):
        run(make_context(), Recovery(iterations=2), judges=judges)


def test_seeds_change_views(make_context: MakeContext) -> None:
    config = Recovery(iterations=3, augment="crop")
    first = run(make_context(seed=0), config)
    assert torch.equal(first, run(make_context(seed=0), config))
    assert not torch.equal(first, run(make_context(seed=1), config))


def test_more_segments_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="segments 3 is above iterations 2"):
        Recovery(iterations=2, segments=3)


def test_shards_lie_in_the_steps_folder(make_context: MakeContext, tmp_path: Path) -> None:
    ctx = replace(make_context(), scratch=tmp_path / "there")
    run(ctx, Recovery(iterations=1, batch=3))
    files = sorted((tmp_path / "there" / "recovered").iterdir())
    assert len(files) == 3 and all(np.load(file).shape == (3, 1, 8, 8) for file in files)
