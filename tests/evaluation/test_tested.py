"""On whose images students are tested, and the controls of a target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill import pipeline
from distill.contracts import DistilledSet, Selection, Source
from distill.data import with_target
from distill.errors import InputError
from distill.evaluation.controls import build_arms
from distill.evaluation.tested import check_tested, reads_target, without_learned
from distill.selection import class_counts, materialise
from distill.training.config import TrainConfig

RECIPE: dict[str, Any] = {
    "data": {"name": "digits", "cap": 30},
    "target": {"name": "valid", "classes": [3, 1]},
    "train": {"epochs": 1},
    "steps": [{"simcore": {"count": 12, "features": "pixels", "centroids": 2}}],
    "evaluate": {"students": ["mlp"], "seeds": 2, "against": ["random", "random_target"], "on": "target"},
}


@pytest.fixture
def targeted(make_source: Callable[..., Source]) -> Source:
    """Three classes; a target of two of them, the second three times as frequent."""
    return with_target(make_source((8, 8, 8)), replace(make_source((2, 6)), classes=("two", "zero")))


def picked(source: Source, count: int) -> DistilledSet:
    ones = np.ones(count, np.float32)
    chosen = Selection(np.arange(count), ones, ones, {"score": "none", "per_class": False})
    return materialise(chosen, source, TrainConfig(epochs=2))


def controls(source: Source, count: int) -> tuple[torch.Tensor, ...]:
    arms = build_arms(
        picked(source, count),
        source,
        against=("random_target",),
        regimes=None,
        full_epochs=None,
        seed=0,
        seeds=3,
    )
    (arm,) = (each for each in arms if each.name == "random_target")
    assert arm.indices is not None
    return arm.indices


def test_a_control_of_the_targets_classes_has_its_proportions(targeted: Source) -> None:
    """Two of class two to six of class zero: of 8 images 2 and 6, none of class one."""
    found = controls(targeted, 8)
    labels = targeted.train.labels.numpy()
    for indices in found:
        assert class_counts(labels[indices.numpy()], 3).tolist() == [6, 0, 2]
        assert len(indices.unique()) == 8
    assert len({tuple(each.tolist()) for each in found}) == 3


def test_a_control_beyond_the_data_is_refused(targeted: Source) -> None:
    with pytest.raises(InputError, match="too few images of the target's classes") as caught:
        controls(targeted, 16)
    assert "zero: 8, of which 12" in str(caught.value.found)


@pytest.mark.parametrize(
    ("on", "against", "wanted"),
    [
        ("data", ("random",), False),
        ("data", ("random_target",), True),
        ("target", (), True),
        ("transfer", (), True),
        ("nothing", ("random_target",), False),
    ],
)
def test_what_reads_the_target(on: Any, against: tuple[str, ...], wanted: bool) -> None:
    assert reads_target(on, against) is wanted


def test_classes_that_the_data_lack_are_refused_where_they_are_needed(
    make_source: Callable[..., Source],
) -> None:
    source = with_target(make_source((5, 5)), replace(make_source((5, 5)), classes=("cat", "dog")))
    check_tested(source, "transfer", ("random",))
    for on, against in (("target", ()), ("transfer", ("random_target",))):
        with pytest.raises(InputError, match="lack 2 of the 2 classes"):
            check_tested(source, on, against)  # type: ignore[arg-type]
    check_tested(source, "nothing", ("random_target",))


# --- test images that students would have learned


def test_test_images_of_the_target_that_the_data_hold_are_left_out(targeted: Source) -> None:
    assert targeted.target is not None
    test = targeted.target.test
    known = replace(test, images=torch.cat([targeted.train.images[[3, 9]], test.images[2:]]))
    source = replace(targeted, target=replace(targeted.target, held_out=known))
    left, note = without_learned(source, "target")
    assert left.target is not None
    assert torch.equal(left.target.test.images, test.images[2:])
    assert torch.equal(left.target.test.labels, test.labels[2:])
    assert left.target.test.fingerprint != test.fingerprint
    assert note is not None and note.startswith(f"2 of {len(test)} test images of the target")
    assert without_learned(source, "data") == (source, None)
    assert without_learned(targeted, "target") == (targeted, None)
    every = replace(test, images=targeted.train.images[: len(test)])
    with pytest.raises(InputError, match="every test image of the target"):
        without_learned(replace(targeted, target=replace(targeted.target, held_out=every)), "transfer")


# --- through the pipeline


def test_a_run_with_both_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    done = pipeline.run(RECIPE, out=tmp_path / "a", device="cpu", quiet=True)
    assert [each.arm for each in done.evaluation.results] == ["set", "random_target", "random"]
    assert "Test accuracy on the target" in done.table
    page = done.folder.report_html.read_text(encoding="utf-8")
    assert "of the target&#x27;s classes" in page or "of the target's classes" in page
    again = pipeline.evaluate(done.folder.set, device="cpu", quiet=True)
    assert again.results == done.evaluation.results


def test_an_evaluation_that_needs_a_target_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    plain = {**RECIPE, "target": None, "steps": [{"random": {"count": 12}}]}
    plain["evaluate"] = {**RECIPE["evaluate"], "on": "nothing"}
    done = pipeline.run(plain, out=tmp_path / "a", device="cpu", quiet=True)
    for asked in (["evaluate.on=target"], ["evaluate={on: target}"], ["evaluate.on=data"]):
        with pytest.raises(InputError, match="names none") as caught:
            pipeline.evaluate(done.folder.set, asked, device="cpu", quiet=True)
        assert "target.name=folder" in str(caught.value.fix)
    named = ["evaluate.on=target", "target={name: valid, classes: [3]}"]
    assert pipeline.evaluate(done.folder.set, named, device="cpu", quiet=True).results


def test_what_a_run_refuses_of_the_target_its_dry_run_refuses() -> None:
    with pytest.raises(InputError, match="tell classes apart"):
        pipeline.dry_run(RECIPE, ["target.classes=[3]", "evaluate.on=transfer"], device="cpu")
