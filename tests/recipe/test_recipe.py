"""From YAML and arguments to a checked recipe, and back to text."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import distill.recipe
from distill.errors import InputError, RecipeErrors
from distill.recipe import (
    EvaluateConfig,
    Recipe,
    as_dict,
    differences,
    load_recipe,
    make_recipe,
    merged_yaml,
    recipe_names,
    recipe_text,
)
from distill.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("registry")

SMALL = """\
data: {name: digits}
steps:
  - kcenter: {ipc: 1}
"""
FULL = """\
seed: 3
precision: bfloat16
data: {name: folder, folder: images, pattern: '*.jpg'}
train: {lr: 1e-3, epochs: 10, optimizer: adamw}
steps:
  - kcenter: {ipc: 10, features: pixels}
  - soft_label:
      teacher: {model: {name: mlp, width: 8}, train: {epochs: 2}}
      layers: [first, last]
  - json:
evaluate:
  seeds: 2
  students: [convnet, {name: mlp, width: 64}]
  against: []
  regimes: [soft]
  full_epochs: 7
cache: {folder: here}
"""


def small_recipe() -> Recipe:
    return make_recipe({"data": {"name": "digits"}, "steps": [{"kcenter": {"ipc": 1}}]})


def test_what_is_left_out_has_its_default(write) -> None:
    recipe = load_recipe(write(SMALL)).recipe
    assert recipe == small_recipe()
    assert (recipe.seed, recipe.precision, recipe.train) == (0, "auto", TrainConfig())
    assert recipe.evaluate == EvaluateConfig()
    assert recipe.evaluate.seeds == 5
    assert recipe.evaluate.against == ("random", "full")
    assert recipe.evaluate.regimes is None
    assert recipe.cache.folder is None
    assert [(step.method, step.config.ipc) for step in recipe.steps] == [("kcenter", 1)]


def test_every_key_is_read(write) -> None:
    recipe = load_recipe(write(FULL)).recipe
    assert (recipe.seed, recipe.precision, recipe.cache.folder) == (3, "bfloat16", "here")
    assert recipe.data.folder == "images"
    assert (recipe.train.lr, recipe.train.epochs) == (0.001, 10)
    assert [step.method for step in recipe.steps] == ["kcenter", "soft_label", "json"]
    assert recipe.steps[1].config.layers == ("first", "last")
    assert recipe.steps[1].config.teacher.model.width == 8
    assert [student.width for student in recipe.evaluate.students] == [128, 64]
    assert (recipe.evaluate.seeds, recipe.evaluate.regimes, recipe.evaluate.full_epochs) == (2, ("soft",), 7)


def test_a_section_with_nothing_after_it_has_its_defaults(write) -> None:
    text = SMALL + "train:\nevaluate: null\ncache: ~\n"
    assert load_recipe(write(text)).recipe == small_recipe()


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValidationError):
        small_recipe().seed = 1  # type: ignore[misc]


def test_where_names_line_or_argument(write) -> None:
    loaded = load_recipe(write(SMALL), ["steps.0.ipc=10", "train.lr=1"])
    assert loaded.where("data") == "recipe.yaml:1: data"
    assert loaded.where("steps", 0, "kcenter") == "recipe.yaml:3: steps.0.kcenter"
    assert loaded.where("steps", 0, "kcenter", "ipc") == "steps.0.ipc=10: steps.0.kcenter.ipc"
    assert loaded.where("train", "lr") == "train.lr=1: train.lr"
    assert loaded.where() == "recipe.yaml:1"


# Where recipes are found


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "digits.yaml").write_text(SMALL)
    (folder / "cifar10.yaml").write_text(FULL)
    (folder / "notes.txt").write_text("")
    monkeypatch.setattr(distill.recipe, "_shipped_folder", lambda: folder)
    return folder


def test_shipped_recipes_are_found_by_name(shipped: Path) -> None:
    assert recipe_names() == ["cifar10", "digits"]
    assert recipe_text("digits") == SMALL
    loaded = load_recipe("digits")
    assert loaded.recipe == small_recipe()
    assert loaded.source == "recipes/digits.yaml"


def test_unknown_names_give_the_nearest(shipped: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe("digit")
    assert caught.value.found == "digit"
    assert caught.value.allowed == "cifar10, digits"
    assert "did you mean 'digits'?" in str(caught.value)


@pytest.mark.parametrize("name", ["..", "", "\0", "a\nb", "notes.txt", "digits.YAML", "x" * 9999])
def test_names_are_looked_up_never_joined_to_a_path(shipped: Path, name: str) -> None:
    with pytest.raises(InputError, match="there is no recipe"):
        load_recipe(name)


@pytest.mark.parametrize("path", ["digits", "digits.yml", "./digits", "below/digits"])
def test_a_path_wins_over_a_shipped_name(shipped: Path, write, path: str) -> None:
    Path("below").mkdir()
    write(SMALL + "seed: 9\n", name=path)
    loaded = load_recipe(path)
    assert (loaded.recipe.seed, loaded.source) == (9, path)


@pytest.mark.parametrize("path", ["digits.yaml", "below/digits"])
def test_what_looks_like_a_path_is_never_a_shipped_name(shipped: Path, write, path: str) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_recipe(path)


@pytest.mark.parametrize(("place", "installed"), [("distill/recipes", True), ("recipes", False)])
def test_recipes_ship_inside_the_package_or_beside_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, installed: bool
) -> None:
    for folder in ("recipes", "distill/recipes") if installed else ("recipes", "distill"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / place / "digits.yaml").write_text(SMALL)
    monkeypatch.setattr(distill.recipe, "__file__", str(tmp_path / "distill" / "recipe.py"))
    assert recipe_names() == ["digits"]


# And back


def test_merged_yaml_fills_in_defaults_and_loads_back_equal(write) -> None:
    recipe = load_recipe(write(FULL)).recipe
    text = merged_yaml(recipe)
    assert "weight_decay: 0.0005" in text
    assert "- kcenter:\n    ipc: 10\n" in text
    assert load_recipe(write(text, name="merged.yaml")).recipe == recipe
    assert make_recipe(as_dict(recipe)) == recipe
    assert merged_yaml(make_recipe(as_dict(recipe))) == text


def test_equal_recipes_have_equal_text(write) -> None:
    texts = {
        merged_yaml(load_recipe(write(SMALL)).recipe),
        merged_yaml(load_recipe(write(SMALL + "seed: 0\ntrain: {lr: 1e-2}\n")).recipe),
        merged_yaml(small_recipe()),
    }
    assert len(texts) == 1
    assert merged_yaml(load_recipe(write(SMALL + "seed: 1\n")).recipe) not in texts


def test_differences_are_lines_of_key_paths() -> None:
    old = {"seed": 0, "steps": [{"kcenter": {"ipc": 10}}], "evaluate": {"against": ["random"]}, "gone": None}
    new = {
        "seed": 0,
        "steps": [{"kcenter": {"ipc": 50}}, {"json": {}}],
        "evaluate": {"against": ["random", "full"]},
    }
    assert differences(old, new) == [
        "steps.0.kcenter.ipc: 10 -> 50",
        "evaluate.against: [random] -> [random, full]",
        "gone: null -> absent",
        "steps.1.json: absent -> {}",
    ]
    assert differences(old, old) == []


FINITE = st.floats(min_value=1e-6, max_value=1e6)
OPTIONS = st.fixed_dictionaries(
    {
        "data": st.fixed_dictionaries(
            {
                "name": st.just("folder"),
                "folder": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
            }
        ),
        "steps": st.lists(
            st.fixed_dictionaries({"kcenter": st.fixed_dictionaries({"ipc": st.integers(1, 10**9)})})
            | st.fixed_dictionaries(
                {"json": st.none() | st.fixed_dictionaries({"checker": FINITE | st.text("1e-no:# ")})}
            )
            | st.fixed_dictionaries(
                {
                    "soft_label": st.fixed_dictionaries(
                        {
                            "temperature": FINITE,
                            "layers": st.lists(st.text("no1e:-# ", max_size=5), max_size=3),
                        }
                    )
                }
            ),
            min_size=1,
            max_size=3,
        ),
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "train": st.none() | st.fixed_dictionaries({"lr": FINITE, "epochs": st.integers(1, 1000)}),
        "evaluate": st.none() | st.fixed_dictionaries({"seeds": st.integers(2, 9)}),
    },
)


@given(options=OPTIONS)
@settings(max_examples=50, deadline=None)
def test_any_recipe_survives_the_way_to_text_and_back(
    options: dict, tmp_path_factory: pytest.TempPathFactory
) -> None:
    recipe = make_recipe(options)
    path = tmp_path_factory.mktemp("recipes") / "merged.yaml"
    path.write_text(merged_yaml(recipe), encoding="utf-8")
    again = load_recipe(str(path)).recipe
    assert again == recipe
    assert merged_yaml(again) == merged_yaml(recipe)


# Text near a recipe reaches further than random text does.
WORDS = """
data: steps: train: evaluate: seed: name: digits kcenter: soft_label: ipc: students: teacher: model: layers:
convnet 1 -1 1e-3 null true .nan .inf { } [ ] ' *a &a !x - : ,
"""
PIECES = st.sampled_from([*WORDS.split(), "- ", "  ", "\n", "\n  ", ", ", ": "])


@given(
    text=st.text(max_size=80)
    | st.lists(PIECES, max_size=25).map("".join)
    | st.lists(PIECES).map(lambda pieces: SMALL + "".join(pieces))
)
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_recipe_or_our_error(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("recipes") / "any.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        recipe = load_recipe(str(path)).recipe
    except RecipeErrors as error:
        assert error.problems
        assert all(str(problem.where).startswith(f"{path}:") for problem in error.problems)
        assert not any(
            word in str(error).lower() for word in ("pydantic", "input should", "type=", "https://")
        )
    except InputError as error:
        assert str(error).startswith(f"{path}:")
    else:
        assert make_recipe(as_dict(recipe)) == recipe


@given(
    arguments=st.lists(
        st.tuples(
            st.sampled_from(["seed", "steps.0.ipc", "steps.0", "train.lr", "data", "a.b", "steps.1.json"]),
            st.text(max_size=8),
        ),
        max_size=3,
    )
)
@settings(max_examples=100, deadline=None)
def test_any_argument_is_applied_or_our_error(
    arguments: list, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(SMALL)
    try:
        load_recipe(str(path), [f"{key}={value}" for key, value in arguments])
    except RecipeErrors as error:
        assert error.problems


def test_the_language_needs_no_torch() -> None:
    program = "import sys, distill.recipe; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=Path(distill.__file__).parents[1]).returncode == 0
    )
