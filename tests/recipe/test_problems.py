"""Every mistake of a recipe at once: place, what was found, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
from pydantic_core import core_schema

from distill.errors import InputError, RecipeErrors
from distill.recipe import load_recipe, make_recipe
from distill.recipe_problems import _WHAT

pytestmark = pytest.mark.usefixtures("registry")

HEAD = "data: {name: digits}\n"
STEP = "steps:\n  - kcenter: {ipc: 1}\n"


def problems(path: str, *overrides: str) -> list[InputError]:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def only(path: str, *overrides: str) -> InputError:
    (problem,) = problems(path, *overrides)
    return problem


FIVE_MISTAKES = """\
seed: -1
data: {name: digts}
train:
  epoch: 10
steps:
  - kcentre: {ipc: 10}
  - soft_label:
      temperature: warm
"""
FIVE_LINES = """\
5 mistakes in recipe.yaml:
recipe.yaml:1: seed: too small
  found: -1
  allowed: a whole number >= 0 and <= 9223372036854775807
recipe.yaml:2: data.name: unknown data 'digts'
  found: digts
  allowed: digits, folder
  fix: did you mean 'digits'?
recipe.yaml:4: train.epoch: unknown key
  found: epoch: 10
  allowed: optimizer, lr, momentum, weight_decay, schedule, cosine_stretch, warmup_epochs, \
epochs, batch_size, micro_batches, augment, crop_scale, mix, \
mix_alpha, loss, dbr_weight, temperature, label_smoothing, gsam_rho, gsam_alpha
  fix: did you mean 'epochs'?
recipe.yaml:6: steps.0.kcentre: unknown method 'kcentre'
  found: kcentre
  allowed: json, kcenter, soft_label
  fix: did you mean 'kcenter'?
recipe.yaml:8: steps.1.soft_label.temperature: not a number
  found: warm
  allowed: a number > 0"""


def test_five_mistakes_are_five_errors(write) -> None:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(write(FIVE_MISTAKES))
    assert str(caught.value) == FIVE_LINES
    assert caught.value.exit_code == 2


# The part of a recipe, the error as printed without file and line.
CASES: list[tuple[str, str]] = [
    (
        "data: {}\n" + STEP,
        "data: has no name\n  allowed: name: digits, folder\n"
        "  fix: name the data, for example {name: digits}",
    ),
    (
        "data: digits\n" + STEP,
        "data: not a mapping\n  found: digits\n  allowed: a mapping\n"
        "  fix: name the data, for example {name: digits}",
    ),
    (STEP, "data: is missing\n  allowed: a mapping\n  fix: add `data: ...`"),
    (HEAD, "steps: is missing\n  allowed: a list of length >= 1\n  fix: add `steps: ...`"),
    (
        HEAD + "steps:",
        "steps: not a list\n  found: null\n  allowed: a list of length >= 1\n  fix: give a value",
    ),
    (HEAD + "steps: []", "steps: too few items\n  found: []\n  allowed: a list of length >= 1"),
    (
        HEAD + "steps: {kcenter: {ipc: 1}}",
        "steps: not a list\n  found: {kcenter: {ipc: 1}}\n  allowed: a list of length >= 1\n"
        "  fix: begin each item with `- `",
    ),
    (
        HEAD + "steps:\n  - kcenter:\n    ipc: 1\n",
        "steps.0: not a mapping with one key, a method's name\n  found: kcenter, ipc\n"
        "  allowed: kcenter, soft_label, json\n  fix: indent the options further than 'kcenter'",
    ),
    (
        HEAD + "steps: [{kcenter: {ipc: 1}, json: {}}]",
        "steps.0: not a mapping with one key, a method's name\n  found: kcenter, json\n"
        "  allowed: kcenter, soft_label, json\n  fix: begin each method with its own `- `",
    ),
    (
        HEAD + "steps: [json]",
        "steps.0: not a mapping with one key, a method's name\n  found: json\n"
        "  allowed: kcenter, soft_label, json\n  fix: write `- json: {}`",
    ),
    (
        HEAD + "steps: [{kcenter: 3}]",
        "steps.0.kcenter: not a mapping\n  found: 3\n  allowed: a mapping with ipc, features, or null",
    ),
    (
        HEAD + "steps: [kcenter: ]",
        "steps.0.kcenter.ipc: is missing\n  allowed: a whole number >= 1\n  fix: add `ipc: ...`",
    ),
    (
        HEAD + "steps: [kcenter: {ipc: 10.0}]",
        "steps.0.kcenter.ipc: not a whole number\n  found: 10.0\n  allowed: a whole number >= 1\n"
        "  fix: write 10",
    ),
    (
        HEAD + "steps: [kcenter: {ipc: '10'}]",
        "steps.0.kcenter.ipc: not a whole number\n  found: '10'\n  allowed: a whole number >= 1\n"
        "  fix: remove the quotes",
    ),
    (
        HEAD + "steps: [kcenter: {ipc: 1, features: pixel}]",
        "steps.0.kcenter.features: not one of the allowed values\n  found: pixel\n"
        "  allowed: network, pixels\n  fix: did you mean 'pixels'?",
    ),
    (HEAD + "steps: [soft_label: {first: 2, last: 1}]", "steps.0.soft_label: first is above last"),
    (
        HEAD + "steps: [soft_label: {layers: one}]",
        "steps.0.soft_label.layers: not a list\n  found: one\n  allowed: a list\n  fix: write [one]",
    ),
    (
        HEAD + "steps: [soft_label: {weights: 3}]",
        "steps.0.soft_label.weights: not text\n  found: 3\n  allowed: text, or null\n"
        "  fix: write it in quotes",
    ),
    (
        HEAD + "steps: [soft_label: {layers: [3]}]",
        "steps.0.soft_label.layers.0: not text\n  found: 3\n  allowed: text\n  fix: write it in quotes",
    ),
    (
        HEAD + "steps: [soft_label: {teacher: {model: {name: mpl}}}]",
        "steps.0.soft_label.teacher.model.name: not one of the allowed values\n  found: mpl\n"
        "  allowed: convnet, mlp\n  fix: did you mean 'mlp'?",
    ),
    (
        HEAD + "steps: [soft_label: {teacher: {model: {width: 3}}}]",
        "steps.0.soft_label.teacher.model.name: is missing\n  allowed: convnet, mlp\n  fix: add `name: ...`",
    ),
    (
        HEAD + "steps: [soft_label: {teacher: {model: {name: mlp, widths: 3}}}]",
        "steps.0.soft_label.teacher.model.widths: unknown key\n  found: widths: 3\n"
        "  allowed: name, width\n  fix: did you mean 'width'?",
    ),
    (
        "data: {name: digits, grayscale: yes}\n" + STEP,
        "data.grayscale: neither true nor false\n  found: 'yes'\n  allowed: true or false\n  fix: write true",
    ),
    (
        "data: {name: digits, valid: 1}\n" + STEP,
        "data.valid: too large\n  found: 1\n  allowed: a number >= 0 and < 1",
    ),
    (
        "data: {name: digits, valid: .nan}\n" + STEP,
        "data.valid: not a finite number\n  found: .nan\n  allowed: a number >= 0 and < 1",
    ),
    (
        "data: {name: digits, valid: }\n" + STEP,
        "data.valid: not a number\n  found: null\n  allowed: a number >= 0 and < 1\n"
        "  fix: give a value, or remove the key to keep its default",
    ),
    (
        "data: {name: digits, resize: wide}\n" + STEP,
        "data.resize: not an accepted value\n  found: wide\n"
        "  allowed: a whole number >= 1 and <= 64, or a list of length >= 2 and of length <= 2, or null",
    ),
    (
        "data: {name: digits, resize: [8, 99]}\n" + STEP,
        "data.resize.1: too large\n  found: 99\n  allowed: a whole number >= 1 and <= 64",
    ),
    (
        "data: {name: folder, folder: x, pattern: png}\n" + STEP,
        "data.pattern: not of the allowed form\n  found: png\n  allowed: text of the form ^\\*\\.[a-z]+$",
    ),
    (
        HEAD + STEP + "train: {lr: .inf}\n",
        "train.lr: not a finite number\n  found: .inf\n  allowed: a number > 0",
    ),
    (
        HEAD + STEP + "evaluate: {seeds: 1}\n",
        "evaluate.seeds: too small\n  found: 1\n  allowed: a whole number >= 2",
    ),
    (
        HEAD + STEP + "evaluate: {students: []}\n",
        "evaluate.students: too few items\n  found: []\n  allowed: a list of length >= 1",
    ),
    (
        HEAD + STEP + "evaluate: {students: [convnt]}\n",
        "evaluate.students.0: unknown model\n  found: convnt\n  allowed: convnet, mlp\n"
        "  fix: did you mean 'convnet'?",
    ),
    (
        HEAD + STEP + "evaluate: {students: [{name: mlp, width: 0}]}\n",
        "evaluate.students.0.width: too small\n  found: 0\n  allowed: a whole number >= 1",
    ),
    (
        HEAD + STEP + "evaluate: {students: [3]}\n",
        "evaluate.students.0: not a model\n  found: 3\n"
        "  allowed: convnet, mlp, resnet18, alexnet, vgg11, torchvision, or a mapping of name and options",
    ),
    (
        HEAD + STEP + "evaluate: {regimes: [hart]}\n",
        "evaluate.regimes.0: not one of the allowed values\n  found: hart\n  allowed: hard, soft, teacher\n"
        "  fix: did you mean 'hard'?",
    ),
    (
        HEAD + STEP + "evaluate: {full_epochs: 1e3}\n",
        "evaluate.full_epochs: not a whole number\n  found: 1000.0\n  allowed: a whole number >= 1, or null\n"
        "  fix: write 1000",
    ),
    (
        HEAD + "steps: [json: {checker: bad}]",
        "steps.0.json.checker: unknown checker\n  found: bad\n  allowed: good\n  fix: write good",
    ),
    (HEAD + STEP + "train: 3\n", "train: not a mapping\n  found: 3\n  allowed: a mapping"),
    (
        HEAD + STEP + "precison: auto\n",
        "precison: unknown key\n  found: precison: auto\n"
        "  allowed: seed, precision, data, target, train, steps, evaluate, cache, engine\n"
        "  fix: did you mean 'precision'?",
    ),
    (HEAD + STEP + "seed: 1\nseed: 1\n", "seed: stands twice, first on line 4\n  fix: keep one of them"),
    (
        HEAD + STEP + "train: !x {}\n",
        "train: a tag, where plain values are allowed only\n  found: !x\n  fix: remove the tag",
    ),
    (
        HEAD + STEP + "seed: !x 3\n",
        "seed: a tag, where plain values are allowed only\n  found: !x\n  fix: remove the tag",
    ),
]


@pytest.mark.parametrize(("text", "expected"), CASES, ids=[expected.split("\n")[0] for _, expected in CASES])
def test_each_mistake_has_its_words(write, text: str, expected: str) -> None:
    printed = str(only(write(text))).removeprefix("recipe.yaml:")
    line, _, rest = printed.partition(": ")
    assert line.isdecimal()
    if expected.startswith("steps.0.soft_label: first"):  # found is the whole mapping, checked by its start
        rest = rest.split("\n")[0]
    assert rest == expected


def test_a_mistake_stands_on_the_line_of_its_key(write) -> None:
    path = write(
        "data:\n  name: digits\n  cap: 0\nsteps:\n  - kcenter:\n      ipc: 0\n      feature: pixels\n"
    )
    assert [problem.where for problem in problems(path)] == [
        "recipe.yaml:3: data.cap",
        "recipe.yaml:6: steps.0.kcenter.ipc",
        "recipe.yaml:7: steps.0.kcenter.feature",
    ]


def test_a_wrong_method_hides_nothing(write) -> None:
    path = write(
        "data: {name: x}\nsteps:\n  - wrong: {}\n  - kcenter: {ipc: 0}\n  - {}\n"
        "evaluate: {seeds: 0}\nnope: 1\n"
    )
    assert [problem.where for problem in problems(path)] == [
        "recipe.yaml:1: data.name",
        "recipe.yaml:3: steps.0.wrong",
        "recipe.yaml:4: steps.1.kcenter.ipc",
        "recipe.yaml:5: steps.2",
        "recipe.yaml:6: evaluate.seeds",
        "recipe.yaml:7: nope",
    ]


def test_a_duplicate_does_not_hide_what_is_wrong_with_the_first(write) -> None:
    path = write(HEAD + STEP + "seed: -1\nseed: 2\n")
    assert [problem.what for problem in problems(path)] == ["too small", "stands twice, first on line 4"]


def test_a_list_is_not_called_short_because_its_items_are_wrong(write) -> None:
    assert [problem.where for problem in problems(write(HEAD + "steps: [3]\n"))] == ["recipe.yaml:2: steps.0"]


def test_names_are_escaped_in_errors(write) -> None:
    problem = only(write(HEAD + STEP + '"\\e[31m": 1\n'))
    assert "\x1b" not in str(problem)
    assert "\\x1b[31m" in str(problem)


def test_plain_data_give_the_same_errors_without_a_file() -> None:
    with pytest.raises(RecipeErrors) as caught:
        make_recipe({"data": {"name": "digits"}, "steps": [{"kcenter": {"ipc": 0}}]}, source="report.json")
    assert [problem.where for problem in caught.value.problems] == ["report.json: steps.0.kcenter.ipc"]


WORDS_OF_PYDANTIC = (
    "Input should",
    "Field required",
    "validation error",
    "errors.pydantic.dev",
    "type=",
    "Extra inputs",
)


@pytest.mark.parametrize("text", [text for text, _ in CASES])
def test_no_word_of_pydantic_reaches_the_user(write: Callable[[str], str], text: str) -> None:
    printed = str(only(write(text)))
    assert not [word for word in WORDS_OF_PYDANTIC if word in printed]


def test_error_types_that_pydantic_knows_still_exist() -> None:
    """A rename in pydantic would turn our words into the general ones."""
    raised_by_pydantic_itself = {"path_type"}  # has a case of its own above
    assert set(_WHAT) - raised_by_pydantic_itself <= set(get_args(core_schema.ErrorType))


# Arguments


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("steps.0.ipc=ten", "steps.0.ipc=ten: steps.0.kcenter.ipc: not a whole number"),
        ("steps.0.kcenter.ipc=ten", "steps.0.kcenter.ipc=ten: steps.0.kcenter.ipc: not a whole number"),
        (
            "steps.0.features=pixel",
            "steps.0.features=pixel: steps.0.kcenter.features: not one of the allowed values",
        ),
        ("steps.1.ipc=1", "steps.1.ipc=1: steps: no such item"),
        ("steps.x=1", "steps.x=1: steps: no such item"),
        ("steps.-1=1", "steps.-1=1: steps: no such item"),
        ("steps.0=null", "steps.0=null: steps.0: an item of a list has no default to go back to"),
        ("data=null", "data=null: data: is missing"),
        ("data.name=digts", "data.name=digts: data.name: unknown data 'digts'"),
        ("data.name.x=1", "data.name.x=1: data.name: has no keys below it"),
        ("trian.lr=1", "trian.lr=1: trian: unknown key"),
        ("train.l=1", "train.l=1: train.l: unknown key"),
        ("train.l=null", "train.l=null: train.l: unknown key"),
        ("trian=null", "trian=null: trian: unknown key"),
        (
            "evaluate.students.0=mlp",
            "evaluate.students.0=mlp: evaluate.students: has no items in this recipe",
        ),
        (
            "evaluate.students=[mlp, mpl]",
            "'evaluate.students=[mlp, mpl]': evaluate.students.1: unknown model",
        ),
        ("seed=[1", "seed=[1: not valid YAML: a `[` without its `]`, or a comma is missing"),
        ("seed={a: 1, a: 2}", "'seed={a: 1, a: 2}': stands twice, first on line 1"),
        ("seed", "seed: not of the form key=value"),
        ("=1", "=1: not of the form key=value"),
        ("a..b=1", "a..b=1: not of the form key=value"),
    ],
)
def test_mistakes_of_arguments_name_the_argument(write, argument: str, expected: str) -> None:
    assert str(only(write(HEAD + STEP), argument)).split("\n")[0] == expected


@pytest.mark.parametrize(
    ("argument", "fix"),
    [
        ("stpes.0.ipc=5", "did you mean 'steps'?"),
        ("evalaute.students.0=mlp", "did you mean 'evaluate'?"),
        ("evaluate.studnets.0=mlp", "did you mean 'students'?"),
        ("train.students.0=mlp", "give the whole list: train.students=[...]"),
        ("cache.folder.0=x", "give the whole list: cache.folder=[...]"),
        ("0.ipc=5", "begin with a key of the recipe: steps.0.ipc=10"),
    ],
)
def test_a_number_below_what_is_no_list_names_the_list_meant(write, argument: str, fix: str) -> None:
    path = write(HEAD + STEP + "evaluate: {students: [mlp]}\ncache:\n")
    assert only(path, argument).fix == fix


def test_a_name_written_wrongly_in_the_middle_of_an_argument_is_found(write) -> None:
    assert only(write(HEAD + STEP), "steps.0.kcentre.ipc=5").fix == "did you mean 'kcenter'?"


def test_a_long_argument_is_cut_before_each_of_its_mistakes(write) -> None:
    argument = f"steps=[{{kcenter: {{ipc: 0, features: {'x' * 100}}}}}]"
    places = [problem.where for problem in problems(write(HEAD + STEP), argument)]
    assert places == [f"'{argument[:57]}...': steps.0.kcenter.{key}" for key in ("ipc", "features")]


def test_mistakes_of_the_file_come_before_those_of_arguments(write) -> None:
    path = write("seed: -1\n" + HEAD + STEP)
    found = [
        str(problem.where) for problem in problems(path, "nonsense", "steps.0.ipc=0", "evaluate.seeds=1")
    ]
    assert found == [
        "recipe.yaml:1: seed",
        "nonsense",
        "steps.0.ipc=0: steps.0.kcenter.ipc",
        "evaluate.seeds=1: evaluate.seeds",
    ]


def test_an_argument_takes_the_blame_for_what_it_sets_only(write) -> None:
    path = write("data: {name: digits}\nsteps:\n  - kcenter: {ipc: 0, features: x}\n")
    assert [str(problem.where) for problem in problems(path, "steps.0.features=y")] == [
        "recipe.yaml:3: steps.0.kcenter.ipc",
        "steps.0.features=y: steps.0.kcenter.features",
    ]


def test_a_document_that_is_no_mapping(write) -> None:
    assert [problem.what for problem in problems(write("[1]\n"), "seed=1")] == [
        "not a mapping",
        "the recipe has no keys to override",
    ]
