"""`key=value` arguments."""

from __future__ import annotations

from typing import Any

import pytest

from distill.recipe import load_recipe, make_recipe
from distill.recipe_overrides import Draft, apply_overrides

pytestmark = pytest.mark.usefixtures("registry")

RECIPE: dict[str, Any] = {
    "seed": 1,
    "data": {"name": "digits", "cap": 5},
    "steps": [{"kcenter": {"ipc": 1}}, {"json": None}],
}


def overridden(*overrides: str) -> Any:
    draft = Draft(RECIPE)
    apply_overrides(draft, overrides)
    assert draft.problems == []
    return draft.value


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("seed=2", 2),
        ("seed=1e-3", 0.001),
        ("seed=010", 10),
        ("seed=no", "no"),
        ("seed=true", True),
        ("seed='2'", "2"),
        ("seed=[1, {a: 2}]", [1, {"a": 2}]),
        ("seed={a: [1]}", {"a": [1]}),
        ("seed=a=b", "a=b"),
        ("seed=*.tar #1: x", "*.tar #1: x"),
    ],
)
def test_values_are_yaml_and_the_first_equals_sign_splits(argument: str, value: object) -> None:
    assert overridden(argument)["seed"] == value


@pytest.mark.parametrize("key", ["steps.0.ipc", "steps.0.kcenter.ipc"])
def test_steps_are_reached_by_number_with_or_without_their_method(key: str) -> None:
    assert overridden(f"{key}=9")["steps"][0] == {"kcenter": {"ipc": 9}}


def test_an_empty_step_is_filled() -> None:
    assert overridden("steps.1.checker=9")["steps"][1] == {"json": {"checker": 9}}


def test_steps_are_replaced_and_appended() -> None:
    assert overridden("steps.0={json: {}}", "steps.2={kcenter: {ipc: 3}}")["steps"] == [
        {"json": {}},
        {"json": None},
        {"kcenter": {"ipc": 3}},
    ]


def test_sections_that_the_file_lacks_are_made() -> None:
    assert overridden("train.lr=1", "a.b.c=2")["train"] == {"lr": 1}
    assert overridden("a.b.c=2")["a"] == {"b": {"c": 2}}


def test_null_goes_back_to_the_default() -> None:
    value = overridden("seed=null", "data.cap=~", "steps.0.kcenter=", "train.lr=null")
    assert value == {"data": {"name": "digits"}, "steps": [{"kcenter": None}, {"json": None}], "train": {}}


def test_later_arguments_win() -> None:
    assert overridden("seed=2", "seed=null", "seed=3")["seed"] == 3


def test_the_recipe_itself_stays_as_it_was() -> None:
    overridden("steps.0.ipc=9", "seed=null", "steps.2={json: {}}")
    assert RECIPE["seed"] == 1
    assert RECIPE["steps"] == [{"kcenter": {"ipc": 1}}, {"json": None}]


def test_arguments_win_over_the_file_and_the_file_over_defaults(write) -> None:
    path = write("seed: 1\ndata: {name: digits}\ntrain: {lr: 1, epochs: 7}\nsteps: [{kcenter: {ipc: 1}}]\n")
    recipe = load_recipe(path, ["train.lr=2"]).recipe
    assert (recipe.train.lr, recipe.train.epochs, recipe.train.momentum) == (2.0, 7, 0.9)


def test_plain_data_take_arguments_too() -> None:
    data = {"data": {"name": "folder"}, "steps": [{"kcenter": {"ipc": 1}}]}
    assert make_recipe(data, ["data.folder=here", "steps.0.ipc=2"]).data.folder == "here"
    assert data["data"] == {"name": "folder"}


def test_arguments_mend_a_wrong_file(write) -> None:
    path = write("data: {name: digits}\nsteps: [{kcenter: {ipc: 0}}]\n")
    assert load_recipe(path, ["steps.0.ipc=4"]).recipe.steps[0].config.ipc == 4
