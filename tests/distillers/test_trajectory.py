"""trajectory: where it begins, what it emits, that it goes on after an interruption, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distill.cache.experts import record_trajectories
from distill.cache.trajectories import Trajectories
from distill.contracts import Context, DistilledSet, Preprocessing, Selection, Source
from distill.distillers import trajectory as trajectory_module
from distill.distillers.trajectory import TrajectoryMatching
from distill.errors import InputError, NonFiniteError
from distill.labels.codecs import decode
from distill.matching.gradient import Matched
from distill.matching.learning import Rates, State
from distill.matching.students import Students
from distill.models import build
from distill.preprocessing import Transform
from distill.progress import NullProgress
from distill.registry import methods
from distill.selection import random_subset
from distill.step_checks import check_steps
from distill.store.writer import write_set
from distill.training.config import TrainConfig
from distill.training.job import Job

EXPERTS = {"model": {"name": "convnet", "width": 4}, "count": 3, "batch_size": 8, "lr": 0.1}
QUICK: dict[str, Any] = {
    "experts": EXPERTS,
    "start_epochs": {"last": 1},
    "iterations": 3,
    "inner_steps": 3,
    "lr_images": 1.0,
    "augment": "none",
}
MakeContext = Callable[..., Context]


def method(**options: Any) -> TrajectoryMatching:
    return TrajectoryMatching(TrajectoryMatching.Config.model_validate({"ipc": 2, **QUICK, **options}))


def content(made: DistilledSet, path: Path) -> bytes:
    write_set(made, path)
    return path.read_bytes()


class Told(NullProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self.records: list[dict[str, Any]] = []

    def note(self, text: str, **facts: Any) -> None:
        self.lines.append(text)

    def warn(self, text: str, **facts: Any) -> None:
        self.warnings.append(text)

    def record(self, event: str, **facts: Any) -> None:
        if event == "match":
            self.records.append(facts)


def experts_after(
    step: TrajectoryMatching, ctx: Context, source: Source, epoch: int
) -> list[torch.nn.Module]:
    found: Trajectories = record_trajectories(ctx, source, step.config.expert_config)
    modules = []
    for expert in range(found.shape[0]):
        module = build(step.config.experts.model, image_shape=source.image_shape, classes=3, seed=0)
        module.load_state_dict(found.layout.views(found.after(expert, epoch)))
        modules.append(module.eval())
    return modules


def says(module: torch.nn.Module, source: Source, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return module(Transform(Preprocessing(source.mean, source.std))(images))


# --- experts


def test_experts_train_for_the_epochs_that_are_read(
    source: Source, make_context: MakeContext, trained: list[Job]
) -> None:
    method(augment="crop").run(make_context(), source, None)
    assert {job.config.epochs for job in trained} == {3}, (
        "the last start is epoch 1, and 2 epochs are matched"
    )
    assert {(job.config.augment, job.config.lr, job.config.momentum) for job in trained} == {
        ("crop", 0.1, 0.0)
    }
    assert len(trained) == 3


def test_experts_are_trained_as_they_are_asked_for(
    source: Source, make_context: MakeContext, trained: list[Job]
) -> None:
    asked = {"momentum": 0.7, "lr": 0.03, "batch_size": 5, "gsam_rho": 0.02, "gsam_alpha": 0.4}
    method(experts={**EXPERTS, **asked}).run(make_context(), source, None)
    for job in trained:
        assert {name: getattr(job.config, name) for name in asked} == asked


def test_more_epochs_may_be_asked_for(source: Source, make_context: MakeContext) -> None:
    step = method(experts={**EXPERTS, "epochs": 5, "gsam_rho": 0.01})
    train = step.config.expert_config.train
    assert (train.epochs, train.gsam_rho) == (5, 0.01)
    step.run(make_context(), source, None)


# --- where it begins


def test_without_steps_that_move_it_the_set_is_the_real_images(
    source: Source, make_context: MakeContext
) -> None:
    """Rates of next to nothing: pixels come back through normalising, float16 and the way back."""
    ctx = make_context()
    made = method(lr_images=1e-12, lr_log_lr=0.0, student_lr=0.03).run(ctx, source, None)
    rows = random_subset(source, np.array([2, 2, 2]), seed=ctx.derive("images"))
    real = source.train.images[torch.from_numpy(rows)].float() / 255
    torch.testing.assert_close(made.images.float(), real, atol=5e-4, rtol=1e-3)
    assert made.labels.tolist() == source.train.labels[torch.from_numpy(rows)].tolist()
    assert made.train.lr == pytest.approx(0.03)


def test_it_begins_with_the_images_of_a_selection_or_a_set(source: Source, make_context: MakeContext) -> None:
    rows = np.array([1, 5, 9, 2])
    chosen = Selection(rows, np.ones(4, np.float32), np.zeros(4, np.float32))
    still = method(ipc=None, lr_images=1e-12, lr_log_lr=0.0)
    made = still.run(make_context(), source, chosen)
    real = source.train.images[torch.from_numpy(rows)].float() / 255
    torch.testing.assert_close(made.images.float(), real, atol=5e-4, rtol=1e-3)
    again = still.run(make_context(seed=1), source, made)
    torch.testing.assert_close(again.images.float(), made.images.float(), atol=1e-3, rtol=1e-3)
    assert again.labels.tolist() == made.labels.tolist()


@pytest.mark.parametrize("epochs", [3, 7])
def test_images_that_experts_classify_rightly(
    make_source: Callable[..., Source], make_context: MakeContext, epochs: int
) -> None:
    """As they are in the end, whether or not matching reads that far."""
    source, ctx = make_source((40, 40, 40)), make_context()
    asked = {**EXPERTS, "epochs": epochs}
    step = method(init="right", ipc=4, lr_images=1e-12, lr_log_lr=0.0, experts=asked)
    made = step.run(ctx, source, None)
    pixels = (made.images.float() * 255).round().to(torch.uint8)
    first = experts_after(step, ctx, source, epochs)[0]
    right = says(first, source, pixels).argmax(dim=1) == made.labels
    usual = says(first, source, source.train.images).argmax(dim=1) == source.train.labels
    assert bool(right.all()) and not bool(usual.all())
    assert len(torch.unique(pixels.flatten(1), dim=0)) == 12, "none twice"


def test_noise(source: Source, make_context: MakeContext) -> None:
    made = method(init="noise", lr_images=1e-12, lr_log_lr=0.0).run(make_context(), source, None)
    z = Transform(made.preprocessing)(made.images.float())
    assert abs(float(z.mean())) < 0.2 and float(z.std()) == pytest.approx(1, abs=0.15)


# --- labels


@pytest.mark.parametrize("epochs", [3, 7])
def test_learned_labels_begin_with_the_experts_that_are_right(
    source: Source, make_context: MakeContext, epochs: int
) -> None:
    ctx = make_context()
    asked = {**EXPERTS, "epochs": epochs}
    step = method(labels="learned", lr_images=1e-12, lr_log_lr=0.0, lr_labels=1e-12, experts=asked)
    made = step.run(ctx, source, None)
    pixels = (made.images.float() * 255).round().to(torch.uint8)
    experts = experts_after(step, ctx, source, epochs)
    logits = torch.stack([says(module, source, pixels) for module in experts])
    right = logits.argmax(dim=2) == made.labels  # (experts, N)
    assert made.soft is not None
    stored = decode(made.soft)[0]
    for image in range(len(made)):
        heard = logits[right[:, image], image] if right[:, image].any() else logits[:, image]
        torch.testing.assert_close(stored[image], heard.mean(dim=0), atol=5e-3, rtol=5e-3)


def test_learned_labels_are_learned(source: Source, make_context: MakeContext) -> None:
    still = method(labels="learned", lr_labels=1e-12).run(make_context(), source, None)
    moved = method(labels="learned", lr_labels=5.0).run(make_context(), source, None)
    assert still.soft is not None and moved.soft is not None
    assert float((decode(still.soft) - decode(moved.soft)).abs().max()) > 0.01


def test_target_labels_are_what_experts_say_of_the_images(source: Source, make_context: MakeContext) -> None:
    """At the last goal that a student may have, like those that students learned from."""
    ctx = make_context()
    step = method(labels="target", lr_images=1e-12, lr_log_lr=0.0, experts={**EXPERTS, "epochs": 6})
    made = step.run(ctx, source, None)
    pixels = (made.images.float() * 255).round().to(torch.uint8)
    experts = experts_after(step, ctx, source, 3)
    logits = torch.stack([says(module, source, pixels) for module in experts])
    assert made.soft is not None
    torch.testing.assert_close(decode(made.soft)[0], logits.mean(dim=0), atol=5e-3, rtol=5e-3)


def test_soft_labels_of_the_step_before_are_left_out_with_a_note(
    source: Source, make_context: MakeContext
) -> None:
    before = method(labels="learned").run(make_context(), source, None)
    told = Told()
    made = method(ipc=None).run(replace(make_context(), progress=told), source, before)
    assert before.soft is not None and made.soft is None
    assert any("soft labels of the step before are left out" in line for line in told.lines)


# --- the set


def test_the_set_tells_how_it_is_to_be_trained_on(source: Source, make_context: MakeContext) -> None:
    ctx = make_context(optimizer="adamw", lr=0.5, augment="crop", mix="cutmix", epochs=7, momentum=0.8)
    made = method(augment="dsa_without_flip", lr_log_lr=1.0).run(ctx, source, None)
    train = made.train
    assert (train.optimizer, train.augment, train.mix) == ("sgd", "dsa_without_flip", "none")
    assert (train.epochs, train.momentum) == (7, 0.8), "how long is the recipe's affair"
    assert train.lr == made.provenance["student_lr"] != 0.01, "it was learned"
    assert made.images.dtype == torch.float16


def test_whitened_images_are_emitted_as_pixels(source: Source, make_context: MakeContext) -> None:
    made = method(zca=True, lr_images=1e-12, lr_log_lr=0.0).run(make_context(), source, None)
    plain = method(lr_images=1e-12, lr_log_lr=0.0).run(make_context(), source, None)
    torch.testing.assert_close(made.images.float(), plain.images.float(), atol=1e-3, rtol=1e-3)
    assert made.preprocessing.zca is not None and made.preprocessing.zca_inverse is not None
    z = Transform(made.preprocessing)(made.images.float())
    x = Transform(plain.preprocessing)(plain.images.float())
    assert float((z - x).abs().max()) > 0.5, "networks see whitened images all the same"


def test_experts_of_whitened_images_are_others(source: Source, make_context: MakeContext) -> None:
    ctx = make_context()
    method().run(ctx, source, None)
    folders = ctx.cache.folder / "trajectories"
    assert len(list(folders.iterdir())) == 1
    method(zca=True).run(ctx, source, None)
    assert len(list(folders.iterdir())) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "first_order"},
        {"gradient": "unroll"},
        {"segment": 2},
        {"students": 2},
        {"inner_batch": 4},
        {"average": 0.9},
        {"start_epochs": {"last": 1, "grow_from": 0, "grow_steps": 2}},
        {"momentum": 0.0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_reach_the_set(options: dict[str, Any], source: Source, make_context: MakeContext) -> None:
    """Each gives another set, but for those that give the same gradient in another way."""
    plain = method(inner_steps=5, student_lr=0.2).run(make_context(), source, None)
    other = method(inner_steps=5, student_lr=0.2, **options).run(make_context(), source, None)
    distance = float((plain.images.float() - other.images.float()).abs().max())
    same = options in ({"gradient": "unroll"}, {"segment": 2})
    assert (distance < 1e-3) == same, distance


# --- interruptions


@pytest.mark.parametrize(
    "options",
    [{}, {"labels": "learned", "average": 0.9, "augment": "dsa"}, {"labels": "target", "zca": True}],
)
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    options: dict[str, Any],
    source: Source,
    make_context: MakeContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = method(**options, iterations=6)
    whole = content(step.run(make_context(), source, None), tmp_path / "whole.h5")
    monkeypatch.setattr(trajectory_module, "_SAVE_SECONDS", 0.0)
    learn = State.learn

    def interrupted(state: State, *arguments: Any) -> bool:
        if state.step == 4:
            raise KeyboardInterrupt
        return learn(state, *arguments)

    monkeypatch.setattr(State, "learn", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.run(make_context(folder=tmp_path / "cut"), source, None)
    steps: list[int] = []

    def counting(state: State, *arguments: Any) -> bool:
        steps.append(state.step)
        return learn(state, *arguments)

    monkeypatch.setattr(State, "learn", counting)
    ctx = make_context(folder=tmp_path / "cut")
    assert content(step.run(ctx, source, None), tmp_path / "cut.h5") == whole
    assert steps == [4, 5]
    assert content(step.run(ctx, source, None), tmp_path / "again.h5") == whole
    assert steps == [4, 5], "the result was not safe yet: a kill before it is kept costs no steps"


@pytest.mark.parametrize("how", ["another seed", "another configuration", "damaged"])
def test_a_state_that_is_not_this_runs_is_not_gone_on_with(
    how: str, source: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    wanted = content(method().run(make_context(), source, None), tmp_path / "wanted.h5")
    folder = tmp_path / "shared"
    other = method(iterations=2) if how == "another configuration" else method()
    ctx = make_context(folder=folder, seed=1 if how == "another seed" else 0)
    other.run(ctx, source, None)
    if how == "damaged":
        kept = ctx.scratch / "matching.npz"
        kept.write_bytes(kept.read_bytes()[:-100])
    told = Told()
    made = method().run(replace(make_context(folder=folder), progress=told), source, None)
    assert content(made, tmp_path / "made.h5") == wanted
    assert len(told.warnings) == 1 and "matching begins anew" in told.warnings[0]


def test_steps_that_are_left_out_are_logged_and_told_once(source: Source, make_context: MakeContext) -> None:
    """Also where nothing but such steps lie between two records."""
    told, step = Told(), method(diverged=1.0, iterations=12)
    learn = State.learn

    def stretches(state: State, matched: Matched, rates: Rates) -> bool:
        matched.loss.fill_(7.0 if 2 <= state.step <= 8 else 0.5)
        return learn(state, matched, rates)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "learn", stretches)
        patch.setattr(trajectory_module, "_TELL_STEPS", 3)
        step.run(replace(make_context(), progress=told), source, None)
    assert [(each["step"], each["loss"], each["skipped"]) for each in told.records] == [
        (3, 0.5, 1),
        (6, None, 4),
        (9, None, 7),
        (12, 0.5, 7),
    ]
    assert len([line for line in told.warnings if "step 3 is left out: its loss is 7" in line]) == 1
    assert len([line for line in told.warnings if line.startswith("7 of 12 steps were left out")]) == 1
    assert len(told.warnings) == 2


# --- refusals


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": {**EXPERTS, "epochs": 2}}, "lower start_epochs.last to 0, or raise experts.epochs to 3"),
        (
            {"experts": {**EXPERTS, "epochs": 2}, "start_epochs": {"first": 1, "last": 1}},
            "recorded: lower expert_epochs to 1, or raise experts.epochs to 3",
        ),
        (
            {"experts": {**EXPERTS, "epochs": 3}, "start_epochs": {"last": 3}, "expert_epochs": 4},
            "recorded: raise experts.epochs to 7",
        ),
        (
            {
                "experts": {**EXPERTS, "epochs": 6},
                "start_epochs": {"last": 5, "grow_from": 5, "grow_steps": 2},
            },
            "recorded: lower expert_epochs to 1, or raise experts.epochs to 7",
        ),
        ({"gradient": "unroll", "segment": 3}, "segment 3 belongs to gradient: exact"),
        ({"inner_steps": 0}, "greater than or equal to 1"),
        ({"start_epochs": {"first": 2, "last": 1}}, "first 2 is beyond last 1"),
        ({"labels": "soft"}, "hard"),
    ],
)
def test_impossible_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        method(**options)


@pytest.mark.parametrize(
    ("options", "follows", "said"),
    [
        ({"ipc": None}, None, "set ipc"),
        ({}, "selector", "remove ipc"),
        ({"ipc": None, "init": "noise"}, "selector", "remove init"),
    ],
)
def test_places_where_it_cannot_stand(options: dict[str, Any], follows: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        method(**options).check_place(follows)


def test_an_inner_batch_larger_than_the_set(source: Source, make_context: MakeContext) -> None:
    with pytest.raises(InputError, match="larger than the set") as caught:
        method(inner_batch=7).check(source, None)
    assert (caught.value.found, caught.value.allowed) == ("7, and 6 images", "1 to 6, or null for all")
    assert caught.value.where == "trajectory.inner_batch"
    chosen = Selection(np.arange(3), np.ones(3, np.float32), np.zeros(3, np.float32))
    ctx = make_context()
    with pytest.raises(InputError, match="larger than the set"):
        method(ipc=None, inner_batch=4).run(ctx, source, chosen)
    assert not (ctx.cache.folder / "trajectories").exists(), "before any work"


def test_more_images_than_a_class_has(source: Source) -> None:
    with pytest.raises(InputError, match="lower ipc"):
        method(ipc=9).check(source, None)


def test_too_few_images_that_experts_are_right_about(source: Source, make_context: MakeContext) -> None:
    step = method(init="right", ipc=8, experts={**EXPERTS, "lr": 1e-3})
    with pytest.raises(InputError, match="too few images of class") as caught:
        step.run(make_context(), source, None)
    assert "init: real" in str(caught.value)


def test_a_run_that_left_out_every_step_is_no_result(source: Source, make_context: MakeContext) -> None:
    """However few they were."""
    with pytest.raises(NonFiniteError, match="3 steps in a row had to be left out"):
        method(diverged=1e-9).run(make_context(), source, None)


def test_images_beyond_float16_are_no_result(source: Source, make_context: MakeContext) -> None:
    with pytest.raises(NonFiniteError, match="left the range of float16") as caught:
        method(lr_images=1e15, iterations=1).run(make_context(), source, None)
    assert "lower lr_images" in str(caught.value)


def test_a_run_that_diverges_says_what_to_change(source: Source, make_context: MakeContext) -> None:
    step = method(student_lr=1e6, iterations=200)
    with pytest.raises(NonFiniteError, match="had to be left out") as caught:
        step.run(make_context(), source, None)
    assert "student_lr" in str(caught.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"name": "convnet", "width": 4, "norm": "batch"}, "norm: instance"),
        ({"name": "convnet", "width": 4, "depth": 7}, "depth 1 to 3"),
    ],
)
def test_networks_that_cannot_be_matched_are_refused_before_any_work(
    source: Source, model: dict[str, Any], said: str
) -> None:
    """By `check` alone, which is given neither engine nor cache."""
    with pytest.raises(InputError, match=said) as caught:
        method(experts={**EXPERTS, "model": model}).check(source, None)
    assert caught.value.where == "trajectory.experts.model"


@pytest.mark.parametrize(
    ("options", "where", "said"),
    [
        ({"inner_batch": 11}, "steps.1.trajectory.inner_batch", "1 to 9, or null for all"),
        (
            {"experts": {**EXPERTS, "model": {"name": "convnet", "norm": "batch"}}},
            "steps.1.trajectory.experts.model",
            "norm: instance",
        ),
    ],
)
def test_behind_another_step_it_is_refused_before_that_one_runs(
    source: Source, options: dict[str, Any], where: str, said: str
) -> None:
    random = methods()["random"].load()
    for before in (random(random.Config(ipc=3)), method(ipc=3)):
        with pytest.raises(InputError, match=said) as caught:
            check_steps([before, method(ipc=None, **options)], source, TrainConfig())
        assert caught.value.where == where
    check_steps([random(random.Config(ipc=3)), method(ipc=None, inner_batch=9)], source, TrainConfig())


def test_experts_that_stand_still_are_called_that(source: Source, make_context: MakeContext) -> None:
    with pytest.raises(InputError, match="experts did not move between epochs 0 and 2") as caught:
        method(experts={**EXPERTS, "lr": 1e-12}).run(make_context(), source, None)
    assert (caught.value.where, caught.value.fix) == ("trajectory.experts.lr", "raise experts.lr")


@pytest.mark.parametrize("options", [{}, {"labels": "learned", "init": "right"}, {"labels": "target"}])
def test_one_class_teaches_nothing(
    make_source: Callable[..., Source], make_context: MakeContext, options: dict[str, Any]
) -> None:
    source, told = make_source((8,)), Told()
    made = method(iterations=60, **options).run(replace(make_context(), progress=told), source, None)
    real = source.train.images.float() / 255
    nearest = (made.images.float()[:, None] - real).abs().flatten(2).amax(2).amin(1)
    assert float(nearest.max()) < 1e-3
    assert any("one class" in line for line in told.lines) and not told.warnings


def test_replaced_images_need_their_own_trajectories(source: Source, make_context: MakeContext) -> None:
    """Experts of other data are other experts: the key holds the data."""
    ctx = make_context()
    method().run(ctx, source, None)
    other = replace(source, train=replace(source.train, fingerprint="other"))
    method().run(ctx, other, None)
    assert len(list((ctx.cache.folder / "trajectories").iterdir())) == 2


def test_a_learning_rate_that_collapsed_is_told(source: Source, make_context: MakeContext) -> None:
    """Students that go astray push it down until none moves; the run itself goes well."""
    told = Told()
    step = method(student_lr=0.05)
    for lr in (0.049, 0.0001):
        state = State.begin(torch.zeros(6, 1, 8, 8), lr=lr, labels=None, average=False)
        step._tell(replace(make_context(), progress=told), state)
    (warning,) = told.warnings
    assert "fell from 0.05 to 0.0001" in warning and "lower student_lr" in warning


def test_an_interruption_between_steps_loses_none(
    source: Source, make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, folder = method(iterations=5), tmp_path / "run"
    whole = step.run(make_context(), source, None)
    match = Students.match
    seen: list[int] = []

    def interrupted(self: Students, number: int, *args: Any, **options: Any) -> Matched:
        seen.append(number)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return match(self, number, *args, **options)

    monkeypatch.setattr(Students, "match", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step.run(make_context(folder=folder), source, None)
    again = step.run(make_context(folder=folder), source, None)
    assert seen == [0, 1, 2, 3, 3, 4]
    assert torch.equal(again.images, whole.images)


def test_students_that_go_too_far_at_once_are_told_so(source: Source, make_context: MakeContext) -> None:
    with pytest.raises(NonFiniteError) as caught:
        method(student_lr=1e6).run(make_context(), source, None)
    assert "lower student_lr or inner_steps" in str(caught.value) and "lr_images" not in str(caught.value)


def test_a_segment_beyond_the_inner_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="segment 4 is beyond inner_steps 3"):
        method(segment=4)
