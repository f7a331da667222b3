"""soft_label: the teacher's own logits, on the images as they are, whatever the cache holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cache.quantities import Logits
from distill.cache.teachers import train_teacher
from distill.contracts import Context, DistilledSet, Selection, Source
from distill.distillers.soft_label import SoftLabel
from distill.errors import InputError
from distill.labels.codecs import decode
from distill.selection import class_counts
from distill.store.writer import write_set

TEACHER = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 2, "batch_size": 16}}


def soft_label(**options: object) -> SoftLabel:
    return SoftLabel(SoftLabel.Config.model_validate({"teacher": TEACHER, **options}))


def selection(indices: list[int]) -> Selection:
    n = len(indices)
    return Selection(np.array(indices), np.ones(n, np.float32), np.zeros(n, np.float32), {"score": "none"})


def written(distilled: DistilledSet, path: Path) -> bytes:
    write_set(distilled, path)
    return path.read_bytes()


def normalised(source: Source, images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (source.mean, source.std))
    return (images.float() / 255 - mean) / std


def test_labels_are_the_teachers_logits_on_the_plain_images(
    source: Source, make_context: Callable[..., Context]
) -> None:
    context, step = make_context(), soft_label(ipc=3)
    made = step.run(context, source, None)
    teacher = train_teacher(context, source, step.config.teacher, name="teacher")
    with torch.no_grad():
        wanted = teacher.module(torch.device("cpu"))(normalised(source, made.images))
    assert made.soft is not None
    torch.testing.assert_close(decode(made.soft)[0], wanted, rtol=2e-3, atol=2e-3)  # stored as float16


def test_images_and_hard_labels_are_real_and_balanced(
    source: Source, make_context: Callable[..., Context]
) -> None:
    made = soft_label(ipc=3).run(make_context(), source, None)
    assert made.selection is not None
    rows = torch.from_numpy(made.selection.indices)
    assert torch.equal(made.images, source.train.images[rows])
    assert torch.equal(made.labels, source.train.labels[rows])
    assert class_counts(made.labels.numpy(), 3).tolist() == [3, 3, 3]


def test_labels_the_images_of_a_selection_before_in_their_order(
    source: Source, make_context: Callable[..., Context]
) -> None:
    before = selection([7, 1, 20])
    made = soft_label().run(make_context(), source, before)
    assert made.selection is not None
    assert made.selection.indices is before.indices and made.selection.scores is before.scores
    assert torch.equal(made.images, source.train.images[[7, 1, 20]])


def test_relabels_a_set_and_leaves_the_rest_of_it(
    source: Source, make_context: Callable[..., Context]
) -> None:
    context = make_context()
    first = soft_label(ipc=2).run(context, source, None)
    before = replace(first, images=first.images.half() / 255)  # as a method that synthesises leaves them
    again = soft_label(temperature=3.0).run(context, source, before)
    assert again.images is before.images and again.selection is before.selection
    assert first.soft is not None and again.soft is not None
    torch.testing.assert_close(decode(again.soft), decode(first.soft), rtol=1e-2, atol=1e-2)


def test_temperature_reaches_the_labels_and_the_training_of_students(
    source: Source, make_context: Callable[..., Context]
) -> None:
    made = soft_label(ipc=2, temperature=4.0).run(make_context(lr=0.2), source, None)
    assert made.soft is not None
    assert made.soft.attributes["temperature"] == 4.0
    assert (made.train.temperature, made.train.lr) == (4.0, 0.2)


def test_the_set_says_who_labelled_it(source: Source, make_context: Callable[..., Context]) -> None:
    made = soft_label(ipc=2).run(make_context(), source, None)
    assert made.soft is not None
    facts = made.soft.attributes
    assert (facts["teacher"], facts["teacher_epochs"]) == ("convnet-w4", 2)
    assert 0 <= facts["teacher_valid_accuracy"] <= 1


def test_without_a_validation_split_its_accuracy_is_left_open(
    make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    made = soft_label(ipc=2).run(make_context(), make_source(valid=0), None)
    assert made.soft is not None and made.soft.attributes["teacher_valid_accuracy"] is None


def test_bytes_do_not_depend_on_what_the_cache_holds(
    source: Source, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    """A fresh cache; one that holds the teacher; one that holds its logits of the whole source too."""
    shared, step = tmp_path / "shared", soft_label(ipc=3)
    fresh = written(step.run(make_context(folder=shared), source, None), tmp_path / "fresh.h5")
    warm = make_context(folder=shared)
    teacher = train_teacher(warm, source, step.config.teacher, name="teacher")
    warm.cache.request(source.train, teacher, [Logits()])
    warmed = written(step.run(warm, source, None), tmp_path / "warm.h5")
    elsewhere = written(step.run(make_context(), source, None), tmp_path / "elsewhere.h5")
    assert fresh == warmed == elsewhere


def test_a_teacher_in_the_cache_is_not_trained_again(
    source: Source, make_context: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft_label(ipc=1).run(make_context(folder=tmp_path), source, None)
    context = make_context(folder=tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was trained")

    monkeypatch.setattr(context.engine, "train", refuse)
    soft_label(ipc=2).run(context, source, None)


def test_other_seed_other_teacher_and_other_images(
    source: Source, make_context: Callable[..., Context]
) -> None:
    a, b = (soft_label(ipc=2).run(make_context(seed=seed), source, None) for seed in (0, 1))
    assert a.soft is not None and b.soft is not None
    assert not torch.equal(a.images, b.images)
    assert not torch.equal(decode(a.soft), decode(b.soft))
    before = selection([0, 1, 2])
    c, d = (soft_label().run(make_context(seed=seed), source, before) for seed in (0, 1))
    assert c.soft is not None and d.soft is not None
    assert not torch.equal(decode(c.soft), decode(d.soft))


# --- what is refused before anything runs


@pytest.mark.parametrize("follows", ["selector", "distiller"])
def test_ipc_behind_another_step_is_refused(source: Source, follows: str) -> None:
    with pytest.raises(InputError, match="labels the images of the step before") as caught:
        soft_label(ipc=2).check(source, follows)  # type: ignore[arg-type]
    assert caught.value.found == "ipc 2"


def test_no_ipc_and_no_step_before_is_refused(source: Source) -> None:
    with pytest.raises(InputError, match="no images to label"):
        soft_label().check(source, None)


@pytest.mark.parametrize(("options", "follows"), [({"ipc": 8}, None), ({}, "selector"), ({}, "distiller")])
def test_what_can_be_done_passes(source: Source, options: dict[str, int], follows: str | None) -> None:
    soft_label(**options).check(source, follows)  # type: ignore[arg-type]


def test_a_class_smaller_than_ipc_is_refused(make_source: Callable[..., Source]) -> None:
    with pytest.raises(InputError) as caught:
        soft_label(ipc=6).check(make_source((8, 5, 8)), None)
    assert caught.value.found == "one (5)"


@pytest.mark.parametrize(("options", "before", "images"), [({"ipc": 4}, None, 12), ({}, 7, 7)])
def test_estimate(options: dict[str, int], before: int | None, images: int) -> None:
    found = soft_label(**options).estimate(train=24, classes=3, before=before)
    assert (found.images, len(found.trainings), found.features) == (images, 1, 0)
    assert (found.trainings[0].samples, found.trainings[0].train.epochs) == (24, 2)
