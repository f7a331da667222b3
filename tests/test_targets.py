"""A recipe's target: read beside the data, kept from methods' reach like them, asked for exactly where it is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import pipeline
from distill.contracts import Source
from distill.data import with_target
from distill.data.valid import ValidConfig, ValidTarget
from distill.errors import InputError, RecipeErrors
from distill.recipe import make_recipe
from distill.selection import evaluated_on_target, labelled_target

TINY: dict[str, Any] = {
    "data": {"name": "digits", "cap": 30},
    "target": {"name": "digits", "cap": 10, "classes": [3, 1]},
    "train": {"epochs": 1},
    "steps": [{"random": {"ipc": 2}}],
    "evaluate": {"students": ["mlp"], "seeds": 2, "against": ["random"], "on": "target"},
}


@pytest.fixture
def targeted(make_source: Callable[..., Source]) -> Source:
    """Three classes, and a target with two of them in another order."""
    source, other = make_source(), make_source((5, 4))
    swapped = replace(other, classes=("one", "zero"))
    return with_target(source, swapped)


def test_labels_of_the_target_are_those_of_the_source_by_name(targeted: Source) -> None:
    assert targeted.target is not None
    own = targeted.target.train
    split = labelled_target(targeted)
    assert torch.equal(split.labels, 1 - own.labels)
    assert split.fingerprint != own.fingerprint
    tested = evaluated_on_target(targeted)
    assert torch.equal(tested.test.labels, 1 - targeted.target.test.labels)
    assert torch.equal(tested.test.images, targeted.target.test.images)


def test_equal_classes_leave_the_split_as_it_is(make_source: Callable[..., Source]) -> None:
    source = with_target(make_source(), make_source((3, 3, 3)))
    assert source.target is not None
    assert labelled_target(source) is source.target.train


def test_a_class_that_the_data_lack_is_named(make_source: Callable[..., Source]) -> None:
    source = with_target(make_source((5, 5)), make_source((5, 5, 5)))
    with pytest.raises(InputError, match="lack 1 of the 3 classes of the target") as caught:
        labelled_target(source)
    assert (caught.value.where, caught.value.found) == ("target", "two")


def test_images_of_another_shape_are_refused(make_source: Callable[..., Source]) -> None:
    with pytest.raises(InputError, match="another shape"):
        with_target(make_source(), make_source(channels=3))


def test_without_test_takes_both_test_splits_away(targeted: Source) -> None:
    bare = targeted.without_test()
    assert bare.target is not None
    assert bare.held_out is None and bare.target.held_out is None


def test_a_target_that_nothing_reads_is_refused() -> None:
    with pytest.raises(InputError, match="neither a step nor the evaluation reads the target"):
        pipeline.dry_run(TINY, ["evaluate.on=data"])


def test_a_target_that_is_wanted_and_absent_is_refused() -> None:
    with pytest.raises(InputError, match="the recipe names none") as caught:
        pipeline.dry_run(TINY, ["target=null"])
    assert caught.value.where == "evaluate.on"
    with pytest.raises(InputError, match="the recipe names none") as caught:
        pipeline.dry_run(
            TINY, ["target=null", "evaluate.on=data", "steps.0={kcenter: {ipc: 2, trained_on: target}}"]
        )
    assert caught.value.where == "steps.0.kcenter"


def test_mistakes_in_the_target_are_told_with_those_of_the_data() -> None:
    wrong = {**TINY, "data": {"name": "digits", "cap": 0}, "target": {"name": "digits", "cop": 10}}
    with pytest.raises(RecipeErrors) as caught:
        make_recipe(wrong)
    told = str(caught.value)
    assert "data.cap" in told and "target.cop" in told and "did you mean 'cap'" in told


def test_a_run_is_tested_on_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    done = pipeline.run(TINY, out=tmp_path / "a", device="cpu", quiet=True)
    other = pipeline.run(
        TINY, ["evaluate.on=data", "target=null"], out=tmp_path / "b", device="cpu", quiet=True
    )
    assert done.folder.set.read_bytes() != other.folder.set.read_bytes(), "their recipes differ"
    mine, theirs = (each.evaluation.results[0].accuracies for each in (done, other))
    assert mine != theirs, "two digits are tested, and not ten"
    again = pipeline.evaluate(done.folder.set, device="cpu", quiet=True)
    assert again.results[0].accuracies == mine


def test_a_set_alone_is_evaluated_without_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a target stays out of the set; where nobody reads the target, nobody asks for it."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    numbers = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    file = tmp_path / "target.npz"
    names = {"x_train": numbers, "y_train": np.arange(40) % 2, "x_test": numbers, "y_test": np.arange(40) % 2}
    np.savez(file, **names)
    simcore = {"simcore": {"count": 12, "features": "pixels", "centroids": 4}}
    recipe = {**TINY, "steps": [simcore], "target": {"name": "arrays", "path": str(file)}}
    done = pipeline.run(recipe, ["evaluate.on=nothing"], out=tmp_path / "a", device="cpu", quiet=True)
    alone = tmp_path / "alone" / "set.h5"
    alone.parent.mkdir()
    alone.write_bytes(done.folder.set.read_bytes())
    assert str(tmp_path).encode() not in alone.read_bytes()
    assert pipeline.evaluate(alone, ["evaluate.on=data"], device="cpu", quiet=True).results
    with pytest.raises(InputError, match="path"):
        pipeline.evaluate(alone, ["evaluate.on=target"], device="cpu", quiet=True)
    named = ["evaluate.on=target", f"target.path={file}"]
    assert pipeline.evaluate(alone, named, device="cpu", quiet=True).results


def test_a_run_without_students_leaves_a_set_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    done = pipeline.run(
        TINY, ["evaluate.on=nothing", "target=null"], out=tmp_path / "a", device="cpu", quiet=True
    )
    assert done.evaluation.results == ()
    assert "not evaluated" in done.folder.report_html.read_text(encoding="utf-8")
    assert done.table
    with pytest.raises(InputError, match="trains no students"):
        pipeline.evaluate(done.folder.set, device="cpu", quiet=True)
    assert pipeline.evaluate(done.folder.set, ["evaluate.on=data"], device="cpu", quiet=True).results
    text = pipeline.dry_run(TINY, ["evaluate.on=nothing", "target=null"], out=tmp_path / "c", device="cpu")
    assert "no student is trained" in text


def test_errors_in_the_target_name_the_target(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        pipeline.run(
            TINY, [f"target={{name: folder, folder: {tmp_path}/none}}"], out=tmp_path / "a", device="cpu"
        )
    assert caught.value.where == "target.folder"


# --- the validation split as a target


def test_the_validation_split_may_be_the_target(make_source: Callable[..., Source]) -> None:
    source = make_source(valid=5)
    target = ValidTarget(ValidConfig(classes=["two", 0], cap=3)).of(source, seed=0)
    assert target.classes == ("two", "zero")
    assert torch.bincount(target.train.labels).tolist() == [3, 3]
    known = {bytes(image.numpy()) for image in source.valid.images}
    assert all(bytes(image.numpy()) in known for image in target.train.images)
    wanted = source.test.images[source.test.labels != 1]
    assert torch.equal(target.test.images, wanted)
    assert not len(target.valid)
    labelled = labelled_target(with_target(source, target))
    assert sorted(labelled.labels.tolist()) == [0, 0, 0, 2, 2, 2]
    whole = ValidTarget(ValidConfig()).of(source, seed=0)
    assert torch.equal(whole.train.images, source.valid.images)


def test_a_target_without_a_validation_split_is_refused(make_source: Callable[..., Source]) -> None:
    with pytest.raises(InputError, match="the data have none"):
        ValidTarget(ValidConfig()).of(make_source(valid=0), seed=0)
    with pytest.raises(InputError, match="unknown class") as caught:
        ValidTarget(ValidConfig(classes=["ten"])).of(make_source(), seed=0)
    assert caught.value.where == "target.classes"


def test_valid_is_a_target_and_no_source() -> None:
    with pytest.raises(RecipeErrors, match=r"unknown data 'valid'"):
        make_recipe({**TINY, "data": {"name": "valid"}})
    made = make_recipe(TINY, ["target={name: valid, classes: [1, 3]}"])
    assert made.target == ValidConfig(classes=[1, 3])
    text = pipeline.dry_run(TINY, ["target={name: valid, classes: [1, 3]}"], device="cpu")
    assert "target   valid: 2 classes; 6 train, 0 valid" in text
