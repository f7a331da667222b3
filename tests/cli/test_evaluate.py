"""`distill evaluate`: what may be changed, sets from strangers, and reports of others that stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from distill.run_folder import RunFolder
from distill.store.reader import read_set
from distill.store.writer import write_set

Call = Callable[..., Result]
QUICK = ("--against", "random", "--regime", "hard")


def changed(made: Path, path: Path, **fields: Any) -> Path:
    """A set like the one made, with other fields."""
    write_set(replace(read_set(made), **fields), path)
    return path


def with_recipe(made: Path, path: Path, **sections: Mapping[str, Any]) -> Path:
    provenance = dict(read_set(made).provenance)
    recipe = {**provenance["recipe"], **sections}
    return changed(made, path, provenance={**provenance, "recipe": recipe})


# --- overrides


@pytest.mark.parametrize("argument", ["train.epochs=3", "train={epochs: 3}", "train={epochs: 3, lr: 0.01}"])
def test_the_training_that_is_named_is_done_and_told(call: Call, made: Path, argument: str) -> None:
    result = call("evaluate", made, argument, *QUICK, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert {row["epochs"] for row in report["results"]} == {3}
    assert report["train"]["epochs"] == report["recipe"]["train"]["epochs"] == 3


def test_a_training_given_whole_goes_back_to_defaults_but_for_what_the_method_set(
    call: Call, recipe: Path, tmp_path: Path
) -> None:
    assert call("run", recipe, "steps.1.temperature=4", "--out", "warm", "--quiet").exit_code == 0
    result = call("evaluate", tmp_path / "warm" / "set.h5", "train={epochs: 1}", *QUICK, "--json")
    report = json.loads(result.stdout)
    assert report["recipe"]["train"]["batch_size"] == report["train"]["batch_size"] == 256
    assert (report["train"]["temperature"], report["recipe"]["train"]["temperature"]) == (4.0, 1.0)


@pytest.mark.parametrize(
    "argument", ["train.temperature=1.0", "train.temperature=null", "train.temperature="]
)
def test_what_is_named_counts_also_where_the_recipe_says_the_same(
    call: Call, recipe: Path, tmp_path: Path, argument: str
) -> None:
    assert call("run", recipe, "steps.1.temperature=4", "--out", "warm", "--quiet").exit_code == 0
    result = call("evaluate", tmp_path / "warm" / "set.h5", argument, *QUICK, "--json")
    assert json.loads(result.stdout)["train"]["temperature"] == 1.0


@pytest.mark.parametrize("argument", ["steps.0.ipc=2", "steps=[{random: {ipc: 1}}]", "cache.folder=here"])
def test_what_an_evaluation_does_not_read_is_refused(call: Call, made: Path, argument: str) -> None:
    result = call("evaluate", made, argument)
    assert result.exit_code == 2
    assert argument in result.stderr and "distill run" in result.stderr


def test_the_report_of_a_run_tells_the_training_of_the_set(call: Call, recipe: Path, tmp_path: Path) -> None:
    """soft_label gives the set a temperature that the recipe's `train` does not know."""
    assert call("run", recipe, "steps.1.temperature=4", "--out", "warm", "--quiet").exit_code == 0
    report = json.loads((tmp_path / "warm" / "report.json").read_text())
    assert (report["train"]["temperature"], report["train"]["epochs"]) == (4.0, 2)
    assert (tmp_path / "warm" / "report.html").read_text().count("temperature: 4.0") == 2


# --- sets of strangers


@pytest.mark.parametrize(
    "facts",
    [
        {"source": "CIFAR"},
        {"source": {"train_fingerprint": 3}},
        {"source": ["a"]},
        {"recipe": "digits"},
        {"recipe": ["digits"]},
    ],
    ids=str,
)
def test_provenance_of_another_form_is_damage(
    call: Call, made: Path, tmp_path: Path, facts: dict[str, Any]
) -> None:
    path = changed(made, tmp_path / "odd.h5", provenance={**read_set(made).provenance, **facts})
    result = call("evaluate", path, *QUICK)
    assert result.exit_code == 3, result.output
    assert str(path) in result.stderr and "provenance" in result.stderr


def test_a_recipe_nested_without_end_is_damage(call: Call, made: Path, tmp_path: Path) -> None:
    deep: Any = 0
    for _ in range(400):
        deep = [deep]
    result = call("evaluate", with_recipe(made, tmp_path / "deep.h5", data={"name": deep}), *QUICK)
    assert result.exit_code == 3, result.output
    assert "nested" in result.stderr


def test_a_set_without_a_recipe_cannot_be_evaluated(call: Call, made: Path, tmp_path: Path) -> None:
    result = call("evaluate", changed(made, tmp_path / "bare.h5", provenance={}))
    assert result.exit_code == 2
    assert "which recipe" in result.stderr


def test_paths_in_the_recipe_of_a_set_are_not_followed(call: Call, made: Path, tmp_path: Path) -> None:
    data = {"name": "folder", "folder": str(tmp_path)}
    cache = {"folder": str(tmp_path / "theirs")}
    model = {"name": "torchvision/resnet18", "weights": str(tmp_path / "theirs.pt")}
    path = with_recipe(made, tmp_path / "theirs.h5", data=data)
    result = call("evaluate", path, *QUICK)
    assert result.exit_code == 2
    assert "data.folder: is missing" in result.stderr and "path" in result.stderr
    assert "give data.folder=FOLDER on the command line" in result.stderr
    assert "no such folder" in call("evaluate", path, "data.folder=none", *QUICK).stderr
    path = with_recipe(made, tmp_path / "theirs.h5", cache=cache, evaluate={"students": [model]})
    result = call("evaluate", path, *QUICK)
    assert "theirs.pt" not in result.stderr
    assert not (tmp_path / "theirs").exists()


def test_students_whose_weights_are_not_here_are_refused_by_their_sha256(
    call: Call, made: Path, tmp_path: Path
) -> None:
    model = {"name": "torchvision/resnet18", "sha256": "0" * 64}
    path = with_recipe(made, tmp_path / "set.h5", evaluate={"students": [model]})
    result = call("evaluate", path, *QUICK)
    assert result.exit_code == 2, result.output
    assert "evaluate.students.0.weights=FILE" in result.stderr and "0" * 64 in result.stderr


def test_class_names_reach_no_terminal_as_they_are(call: Call, made: Path, tmp_path: Path) -> None:
    classes = ("\x1b[2J\x9b\u202ezero\n  fix: send me money", *read_set(made).classes[1:])
    result = call("evaluate", changed(made, tmp_path / "escape.h5", classes=classes), *QUICK)
    assert result.exit_code == 2
    assert r"\x1b[2J\x9b\u202ezero\n" in result.stderr
    assert not set("\x1b\x9b\u202e") & set(result.stderr)
    assert result.stderr.count("\n  fix: ") == 1


# --- a recipe.yaml beside the set


@pytest.mark.parametrize("text", ["nonsense: [", "seed: 3\n", "data: {name: digts}\nsteps: []\n"])
def test_a_foreign_recipe_beside_a_set_is_left_alone(
    call: Call, made: Path, tmp_path: Path, text: str
) -> None:
    beside = tmp_path / "elsewhere"
    beside.mkdir()
    (beside / "set.h5").write_bytes(made.read_bytes())
    (beside / "recipe.yaml").write_text(text)
    result = call("evaluate", beside / "set.h5", *QUICK)
    assert result.exit_code == 0, result.output
    assert "recipe.yaml" in result.stderr and "not the set's own" in result.stderr


# --- where the report goes


def test_the_report_of_another_set_is_not_overwritten(call: Call, made: Path, tmp_path: Path) -> None:
    other = changed(made, tmp_path / "other.h5", provenance={**read_set(made).provenance, "seed": 4})
    report = made.with_name("report.json").read_bytes()
    result = call("evaluate", other, *QUICK, "--out", made.parent)
    assert result.exit_code == 2, result.output
    assert "another set" in result.stderr and "--out" in result.stderr
    assert made.with_name("report.json").read_bytes() == report
    assert call("evaluate", made, *QUICK, "--out", made.parent).exit_code == 0


def test_a_folder_at_work_is_left_alone(call: Call, made: Path) -> None:
    with RunFolder(made.parent).locked():
        result = call("evaluate", made, *QUICK, "--out", made.parent)
    assert result.exit_code == 2, result.output
    assert "another run is at work" in result.stderr
