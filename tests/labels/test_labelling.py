"""Labels of views: online and stored ones are the same numbers; killed labelling goes on; sets that lie are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import distill
from distill.contracts import Context, DistilledSet, Preprocessing, SoftLabels, Source
from distill.errors import DamagedDataError, DistillError, InputError, NonFiniteError
from distill.evaluation.controls import build_arms, check_labels
from distill.labels import relabel as relabel_module
from distill.labels.codecs import KEPT, VIEWS, CodecConfig, encode, probabilities
from distill.labels.ensemble import Ensemble
from distill.labels.labelling import view_labels, with_labels
from distill.labels.pool import PoolTeacher, moved_classes, open_pool, refuse_other_order
from distill.labels.relabel import Relabelling
from distill.labels.set_teachers import set_teachers
from distill.labels.view_labels import StoredLabels, plan_of
from distill.selection import materialise
from distill.store.reader import read_set
from distill.store.writer import write_set
from distill.training.batches import Batches, DeviceImages, PlannedViews
from distill.training.job import Job, Pool
from tests.distillers.test_soft_label import selection

MakeContext = Callable[..., Context]
CPU = torch.device("cpu")
TRAIN = {"epochs": 3, "batch_size": 4, "augment": "crop", "mix": "cutmix", "micro_batches": 2}
TEACHERS = [
    PoolTeacher.model_validate(
        {"model": {"name": "convnet", "width": width, "norm": "batch"}, "train": {"epochs": 2}}
    )
    for width in (4, 6)
]


def labelled(ctx: Context, source: Source, **options: Any) -> DistilledSet:
    plain = materialise(selection(list(range(12))), source, ctx.train)
    networks = open_pool(ctx, source, TEACHERS)
    return with_labels(
        ctx,
        source,
        plain,
        TEACHERS,
        networks,
        (0.4, 0.6),
        Relabelling.model_validate(options),
        temperature=4.0,
    )


def all_labels(ctx: Context, source: Source, made: DistilledSet) -> list[tuple[Any, Any]]:
    labels = view_labels(ctx, source, made)
    assert labels is not None
    images = DeviceImages(Pool(made.images, made.labels, made.preprocessing), CPU)
    views, ready = PlannedViews(labels.plan, images), labels.on(CPU)
    return [
        ready.batch(epoch, start, *views.batch(epoch, start))
        for epoch in range(labels.plan.epochs)
        for start in views.starts
    ]


@pytest.mark.parametrize(
    "options", [{"labels": "stored"}, {"labels": "online"}, {"codec": CodecConfig(name="topk", k=1)}], ids=str
)
def test_the_sets_teachers_label_other_images_as_they_labelled_its_own(
    options: dict[str, Any], source: Source, make_context: MakeContext
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, source, batch_norm="batch", **options)
    pool = Pool(made.images, made.labels, made.preprocessing)
    again = set_teachers(ctx, source, made).label(pool)
    ours = view_labels(ctx, source, made)
    assert again.views is not None and ours is not None and again.views.plan == ours.plan
    views = PlannedViews(ours.plan, DeviceImages(pool, CPU))
    images, index = views.batch(1, 4)
    theirs, own = (each.on(CPU).batch(1, 4, images, index)[0] for each in (again.views, ours))
    assert torch.equal(theirs, own)


@pytest.mark.parametrize("passes", [None, 2])
def test_a_users_own_loop_sees_what_students_see(
    passes: int | None, source: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    made = labelled(make_context(**TRAIN), source, passes=passes)
    write_set(made, tmp_path / "set.h5")
    dataset = distill.load(tmp_path / "set.h5")
    job = Job(
        model=TEACHERS[0].model,
        classes=len(made.classes),
        config=made.train,
        pool=Pool(made.images, made.labels, made.preprocessing, StoredLabels(made.soft, made.labels)),
        seed=0,
    )
    students = Batches([job], CPU)
    for epoch in range(made.train.epochs):
        pairs = zip(distill.views(dataset, epoch), students.epoch(epoch), strict=True)
        for (images, targets), theirs in pairs:
            assert torch.equal(images, theirs.images[0]) and torch.equal(targets, theirs.targets[0])
            assert targets.sum(dim=1).allclose(torch.ones(len(targets)))
    with pytest.raises(InputError, match="no such epoch"):
        next(distill.views(dataset.set, made.train.epochs))


def test_online_labels_have_no_views_to_read(
    source: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    write_set(labelled(make_context(**TRAIN), source, labels="online"), tmp_path / "set.h5")
    dataset = distill.load(tmp_path / "set.h5")
    with pytest.raises(InputError, match="stores no labels of views"):
        next(distill.views(dataset.set, 0))


def test_a_set_that_no_teacher_labelled_has_none_to_ask(source: Source, make_context: MakeContext) -> None:
    ctx = make_context(**TRAIN)
    plain = materialise(selection(list(range(12))), source, ctx.train)
    with pytest.raises(InputError, match="no teacher of its own labels the set"):
        set_teachers(ctx, source, plain)


@pytest.mark.parametrize("batch_norm", ["running", "batch"])
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_online_labels_are_the_stored_ones(
    source: Source, make_context: MakeContext, batch_norm: str, combine: str
) -> None:
    ctx = make_context(**TRAIN)
    options = {"batch_norm": batch_norm, "combine": combine}
    stored = labelled(ctx, source, **options)
    online = labelled(ctx, source, labels="online", **options)
    assert online.soft is not None and online.soft.arrays == {}
    for (a, _), (b, _) in zip(all_labels(ctx, source, stored), all_labels(ctx, source, online), strict=True):
        assert torch.equal(a, b)


def test_calibrated_labels_are_the_same_online(source: Source, make_context: MakeContext) -> None:
    ctx = make_context(**{**TRAIN, "mix": "selfmix"})
    options = {"calibration": {"hopeless": 0.36, "uncertain": 0.38, "trivial": 0.99}}
    stored, online = (labelled(ctx, source, labels=labels, **options) for labels in ("stored", "online"))
    assert stored.soft is not None and KEPT in stored.soft.arrays
    dropped = 0
    for (a, kept), (b, again) in zip(
        all_labels(ctx, source, stored), all_labels(ctx, source, online), strict=True
    ):
        assert torch.equal(a, b) and torch.equal(kept, again)
        dropped += int((kept == 0).sum())
    assert 0 < dropped < 27


def test_a_set_with_labels_of_views_is_read_back(
    source: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    ctx = make_context(**TRAIN)
    for options in ({"labels": "online"}, {"codec": {"name": "topk", "k": 2}}):
        made = labelled(ctx, source, **options)
        write_set(made, tmp_path / "set.h5")
        again = read_set(tmp_path / "set.h5")
        assert again.train == made.train and again.train.temperature == 4.0
        for (a, _), (b, _) in zip(all_labels(ctx, source, made), all_labels(ctx, source, again), strict=True):
            assert torch.equal(a, b)


def test_killed_labelling_goes_on(source: Source, make_context: MakeContext, monkeypatch: Any) -> None:
    whole = labelled(make_context(**TRAIN), source)
    ctx = make_context(**TRAIN)
    monkeypatch.setattr(relabel_module, "_SAVE_SECONDS", -1)
    one_pass, seen = relabel_module._pass, []

    def dying(*args: Any) -> Any:
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return one_pass(*args)

    monkeypatch.setattr(relabel_module, "_pass", dying)
    with pytest.raises(KeyboardInterrupt):
        labelled(ctx, source)
    again = labelled(ctx, source)
    assert len(seen) == 4
    assert again.soft is not None and whole.soft is not None
    np.testing.assert_array_equal(again.soft.arrays["logits"], whole.soft.arrays["logits"])
    assert again.soft.attributes == whole.soft.attributes


def test_fewer_passes_are_stored(source: Source, make_context: MakeContext) -> None:
    made = labelled(make_context(**TRAIN), source, passes=2)
    assert made.soft is not None
    assert made.soft.arrays["logits"].shape == (2, 12, 3)
    plan = plan_of(made.soft)
    assert plan is not None and plan.epochs == 2


def test_an_images_probabilities_are_the_mean_of_its_views(source: Source, make_context: MakeContext) -> None:
    ctx = make_context(**{**TRAIN, "mix": "none"})
    made = labelled(ctx, source)
    assert made.soft is not None
    labels = StoredLabels(made.soft, made.labels)
    views = PlannedViews(labels.plan, DeviceImages(Pool(made.images, made.labels, made.preprocessing), CPU))
    total = torch.zeros(12, 3)
    for epoch in range(3):
        for start in views.starts:
            images, index = views.batch(epoch, start)
            total[index] += (labels.batch(epoch, start, images, index)[0] / 4).softmax(dim=1) / 3
    torch.testing.assert_close(probabilities(made.soft, classes=made.labels), total)


@pytest.mark.parametrize(
    ("train", "options", "said"),
    [
        ({}, {"codec": {"name": "topk", "k": 4}}, "keeps more classes than there are"),
        ({"loss": "mse"}, {"codec": {"name": "marginal_smoothing", "k": 2}}, "compares logits"),
        ({"mix": "mixup"}, {"calibration": {}}, "no class of their own"),
        ({}, {"labels": "online", "codec": {"name": "quantised"}}, "not stored"),
    ],
)
def test_what_does_not_fit_is_refused(
    make_context: MakeContext, train: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        Relabelling.model_validate(options).check(make_context(**train).train, classes=3)


def test_a_pool_of_no_passes_is_refused() -> None:
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Relabelling(passes=0)


def test_other_teachers_are_refused(source: Source, make_context: MakeContext) -> None:
    made = labelled(make_context(**TRAIN), source, labels="online")
    with pytest.raises(InputError, match="is not the one that labels this set"):
        view_labels(make_context(seed=1, **TRAIN), source, made)


@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        (VIEWS, {"seed": -1}),
        (VIEWS, {"epochs": 3}),
        ("teachers", "somebody"),
        ("weights", ["a"]),
        ("micro_batches", None),
    ],
)
def test_attributes_of_strangers_are_checked(
    source: Source, make_context: MakeContext, attribute: str, value: Any
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, source, labels="online")
    assert made.soft is not None
    wrong = SoftLabels("online", {}, {**made.soft.attributes, attribute: value})
    with pytest.raises(DamagedDataError):
        view_labels(ctx, source, replace(made, soft=wrong))


def test_labels_that_are_fewer_than_their_passes_are_damage(
    source: Source, make_context: MakeContext, tmp_path: Path
) -> None:
    made = labelled(make_context(**TRAIN), source)
    assert made.soft is not None
    short = replace(
        made, soft=replace(made.soft, arrays={name: a[:2] for name, a in made.soft.arrays.items()})
    )
    with pytest.raises(DistillError, match="do not match the plan"):
        write_set(short, tmp_path / "set.h5")


def test_weights_whose_classes_stand_in_another_order(
    make_source: Callable[..., Source], make_context: MakeContext
) -> None:
    source, ctx = make_source(train=(40, 40, 40), valid=20), make_context()
    good = PoolTeacher.model_validate(
        {"model": {"name": "convnet", "width": 8, "norm": "batch"}, "train": {"epochs": 8, "batch_size": 16}}
    )
    (network,) = open_pool(ctx, source, [good])
    refuse_other_order(ctx, source, network)
    turned = dict(network.state)
    for name in ("classifier.weight", "classifier.bias"):
        turned[name] = network.state[name][[1, 2, 0]].clone()
    with pytest.raises(InputError, match="stand in another order") as caught:
        refuse_other_order(ctx, source, replace(network, state=turned))
    assert "means 'one', class 1" in str(caught.value)


def test_mean_and_std_belong_to_files() -> None:
    with pytest.raises(ValueError, match="give mean and std together"):
        PoolTeacher(train=None, mean=(0.5,))
    with pytest.raises(ValueError, match="belong to weights from a file"):
        PoolTeacher(mean=(0.5,), std=(0.5,))


def confusion(right: float, order: list[int], *, images: int = 20, seed: int = 0) -> np.ndarray:
    """What a network that is right so often, and else says anything, takes images of C classes for."""
    rng, classes = np.random.default_rng(seed), len(order)
    counts = np.zeros((classes, classes), dtype=np.int64)
    for row, output in enumerate(order):
        said = np.where(rng.random(images) < right, output, rng.integers(classes, size=images))
        np.add.at(counts[row], said, 1)
    return counts


@pytest.mark.parametrize(
    ("classes", "right", "images"), [(10, 0.92, 200), (10, 0.4, 200), (200, 0.4, 20), (1000, 0.5, 12)]
)
@pytest.mark.parametrize("seed", range(3))
def test_classes_that_moved_are_found_and_others_are_not(
    classes: int, right: float, images: int, seed: int
) -> None:
    own = list(range(classes))
    assert moved_classes(confusion(right, own, images=images, seed=seed)) == []
    swapped = [1, 0, *own[2:]]
    if images >= 200:  # else two classes may hide among a thousand
        assert moved_classes(confusion(right, swapped, images=images, seed=seed)) == [(0, 1), (1, 0)]
    turned = np.roll(own, 1).tolist()
    assert len(moved_classes(confusion(right, turned, images=images, seed=seed))) > classes / 2


@pytest.mark.parametrize("seed", range(5))
def test_networks_that_know_nothing_have_no_order(seed: int) -> None:
    assert moved_classes(confusion(0.0, list(range(10)), images=200, seed=seed)) == []
    assert moved_classes(confusion(0.0, list(range(300)), images=12, seed=seed)) == []
    collapsed = np.zeros((10, 10), dtype=np.int64)
    collapsed[:, 3] = 50
    assert moved_classes(collapsed) == []


@pytest.mark.parametrize("images", range(1, 12))
def test_a_complete_swap_shows_in_any_number_of_images(images: int) -> None:
    assert moved_classes(np.array([[0, images], [images, 0]])) == [(0, 1), (1, 0)]


def test_two_classes_that_are_hard_to_tell_are_not_moved() -> None:
    counts = np.diag([90, 90, 35, 60])
    counts[2, 3], counts[3, 2], counts[0, 1], counts[1, 0] = 55, 30, 10, 10
    assert moved_classes(counts) == []


@pytest.mark.parametrize(
    ("options", "change", "where"),
    [
        ({}, {"batch_size": 6}, "train.batch_size"),
        ({}, {"augment": "none"}, "train.augment"),
        ({}, {"mix": "none"}, "train.mix"),
        ({}, {"mix_alpha": 0.5}, "train.mix_alpha"),
        ({}, {"crop_scale": 0.9}, "train.crop_scale"),
        ({"batch_norm": "batch"}, {"micro_batches": 1}, "train.micro_batches"),
        ({"codec": CodecConfig(name="topk", k=2)}, {"temperature": 1.0}, "train.temperature"),
        ({"codec": CodecConfig(name="marginal_renormalised", k=2)}, {"loss": "mse"}, "train.loss"),
    ],
)
@pytest.mark.parametrize("arm", ["set", "random_soft"])
def test_students_that_would_see_something_else_are_refused(
    arm: str,
    options: dict[str, Any],
    change: dict[str, Any],
    where: str,
    source: Source,
    make_context: MakeContext,
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, source, **options)
    asked: dict[str, Any] = {"regimes": ("soft",), "against": (), "full_epochs": None, "seed": 0, "seeds": 2}
    if arm == "random_soft":
        asked = {**asked, "regimes": ("hard",), "against": ("random_soft",)}
    views, label = view_labels(ctx, source, made), set_teachers(ctx, source, made).label
    found = build_arms(made, source, views=views, labelled=label, **asked)
    assert [each.name for each in found][-1] == arm.split("_")[0]
    changed = replace(made, train=made.train.model_copy(update=change))
    with pytest.raises(InputError) as caught:
        build_arms(changed, source, views=views, labelled=label, **asked)
    assert caught.value.where == where and caught.value.fix


def test_a_full_codecs_labels_serve_other_temperatures_and_parts(
    source: Source, make_context: MakeContext
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, source)
    changed = replace(
        made, train=made.train.model_copy(update={"temperature": 1.0, "micro_batches": 1, "loss": "mse"})
    )
    views = view_labels(ctx, source, made)
    asked: dict[str, Any] = {"regimes": ("soft",), "against": (), "full_epochs": None, "seed": 0, "seeds": 2}
    assert len(build_arms(changed, source, views=views, **asked)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"identities": []},
        {"teachers": []},
        {"weights": [0.5]},
        {"weights": [5.0, -4.0]},
        {"weights": [0.5, 0.6]},
        {"micro_batches": 0},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_teachers_that_strangers_tell_of_are_checked(
    change: dict[str, Any], source: Source, make_context: MakeContext
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, source, labels="online")
    assert made.soft is not None
    told = replace(made, soft=replace(made.soft, attributes={**made.soft.attributes, **change}))
    with pytest.raises(DamagedDataError, match="does not say who labels it"):
        set_teachers(ctx, source, told)


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_logits_that_no_codec_holds_name_the_teacher(
    value: float, source: Source, make_context: MakeContext
) -> None:
    networks = open_pool(make_context(**TRAIN), source, TEACHERS)
    networks[1].state["classifier.bias"][0] = value
    behind = Preprocessing(source.mean, source.std)
    ensemble = Ensemble(tuple(networks), (0.5, 0.5), 4.0, behind)
    with pytest.raises(NonFiniteError, match="the teacher convnet-w6-batch gave"):
        ensemble.on(CPU).logits(torch.zeros(2, *source.image_shape))


@pytest.mark.parametrize("labels", ["stored", "online"])
def test_calibration_tells_what_it_keeps(labels: str, source: Source, make_context: MakeContext) -> None:
    train = {**TRAIN, "mix": "none"}
    nothing = {"calibration": {"hopeless": 1.0, "uncertain": 1.0, "trivial": 1.0}}
    with pytest.raises(InputError, match="calibration drops every view"):
        labelled(make_context(**train), source, labels=labels, **nothing)
    told: list[str] = []
    ctx = make_context(**train)
    ctx = replace(ctx, progress=SimpleNamespace(
        task=ctx.progress.task, record=ctx.progress.record, warn=ctx.progress.warn,
        note=lambda text, **facts: told.append(text),
    ))  # fmt: skip
    labelled(ctx, source, labels=labels, calibration={"hopeless": 0.1, "uncertain": 0.38, "trivial": 1.0})
    assert "calibration keeps 100.0% of the views" in told


def test_dropped_views_do_not_count_in_an_images_label() -> None:
    logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0]], [[0.0, 4.0], [4.0, 0.0]]])
    soft = encode(logits, codec="full", temperature=1.0, teacher="t")
    kept = np.array([[1, 0], [0, 0]], dtype=np.uint8)
    found = probabilities(
        replace(soft, arrays={**soft.arrays, KEPT: kept}), classes=torch.zeros(2, dtype=torch.int64)
    )
    torch.testing.assert_close(found[0], logits[0, 0].softmax(dim=0))
    torch.testing.assert_close(found[1], torch.tensor([0.5, 0.5]))  # it has no other


def test_teachers_of_other_data_are_refused_before_they_are_trained(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = make_context(**TRAIN)
    made = labelled(ctx, source, labels="online")
    other = replace(made, provenance={"source": {"train_fingerprint": "f" * 64}})
    monkeypatch.setattr("distill.labels.set_teachers.open_pool", lambda *a: pytest.fail("trained"))
    with pytest.raises(InputError, match="not the training data that the set was made from"):
        set_teachers(ctx, source, other)


def test_labels_that_do_not_fit_are_refused_without_teachers(
    source: Source, make_context: MakeContext
) -> None:
    made = labelled(make_context(**TRAIN), source, labels="online")
    changed = replace(made, train=made.train.model_copy(update={"augment": "none"}))
    check_labels(made, None, ("random_soft",))
    check_labels(changed, ("hard",), ("random",))
    for regimes, against in ((None, ()), (("hard",), ("random_soft",))):
        with pytest.raises(InputError) as caught:
            check_labels(changed, regimes, against)
        assert caught.value.where == "train.augment"
