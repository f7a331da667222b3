"""What docs/recipes.md says, tried out with the real methods, data and models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from distill.distillers.committee import Committee
from distill.distillers.committee_priors import PriorConfig
from distill.distillers.nrr import NonCriticalRefinement
from distill.distillers.recovering import RecoveringConfig
from distill.distillers.trajectory import Experts, TrajectoryMatching
from distill.errors import RecipeErrors
from distill.labels.calibration import Calibration
from distill.labels.pool import PoolTeacher
from distill.labels.projector import Projection
from distill.labels.relabel import Relabelling
from distill.matching.windows import StartEpochs
from distill.models.encoders import EncoderConfig
from distill.recipe import EvaluateConfig, Recipe, json_schema, load_recipe, recipe_names
from distill.recovery.recover import Recovery
from distill.registry import DATA, METHODS
from distill.training.config import TrainConfig
from distill.yaml_lines import parse_scalar

DOCS = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCS, flags=re.DOTALL | re.MULTILINE)


def rows(section: str, docs: str = DOCS) -> dict[str, str]:
    """Key and default of each row of the first table in a section."""
    text = re.split(rf"^##+ {section}$", docs, flags=re.MULTILINE)[1]
    found: dict[str, str] = {}
    for line in text.splitlines():
        if match := re.match(r"\| `(\w+)` \|.*\| (.*) \|$", line):
            found[match[1]] = match[2].strip("`")
        elif found:
            return found
    return found


def test_the_first_example_is_a_recipe(write) -> None:
    recipe = load_recipe(write(blocks("yaml")[0])).recipe
    assert [step.method for step in recipe.steps] == ["kcenter", "soft_label"]


def test_the_printed_errors_are_what_is_printed(write) -> None:
    path = write(blocks("yaml")[1], name="mistakes.yaml")
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, ["evaluate.seeds=1"])
    printed = next(block for block in blocks("") if "mistakes in mistakes.yaml" in block)
    assert str(caught.value) == printed.rstrip("\n")


def test_the_tables_list_every_key() -> None:
    assert list(rows("Keys")) == list(Recipe.model_fields)
    assert list(rows("evaluate")) == list(EvaluateConfig.model_fields)
    assert list(rows("train")) == list(TrainConfig.model_fields)


def test_the_table_of_training_gives_the_defaults() -> None:
    defaults = TrainConfig().model_dump(mode="json")
    assert {key: parse_scalar(text) for key, text in rows("train").items()} == defaults


def test_the_data_names_are_all_there() -> None:
    sentence = next(line for line in DOCS.splitlines() if line.startswith("`name` is one of"))
    assert set(re.findall(r"`(\w+)`", sentence.split(". ")[0])) == {"name", *DATA}


def test_the_schema_of_the_real_registry_lists_everything() -> None:
    schema = json_schema()
    assert set(METHODS) <= set(schema["properties"]["steps"]["items"]["properties"])
    forms = [
        schema["$defs"][form["$ref"].removeprefix("#/$defs/")]
        for form in schema["properties"]["data"]["oneOf"]
    ]
    assert {form["properties"]["name"]["const"] for form in forms} == set(DATA)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid(name: str) -> None:
    assert load_recipe(name).recipe.steps


TRAJECTORY = (Path(__file__).parents[2] / "docs" / "trajectory.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("section", "config"),
    [("Options", TrajectoryMatching.Config), ("experts", Experts), ("start_epochs", StartEpochs)],
)
def test_the_tables_of_trajectory_matching_give_keys_and_defaults(
    section: str, config: type[BaseModel]
) -> None:
    found = rows(section, TRAJECTORY)
    assert list(found) == list(config.model_fields)
    defaults = config().model_dump(mode="json")
    nested = ("experts", "start_epochs", "model")
    told = {key: parse_scalar(text) for key, text in found.items() if key not in nested}
    assert told == {key: value for key, value in defaults.items() if key not in nested}


def test_the_example_of_trajectory_matching_is_a_recipe(write) -> None:
    example = re.findall(r"^```yaml\n(.*?)^```$", TRAJECTORY, flags=re.DOTALL | re.MULTILINE)[0]
    assert load_recipe(write(example)).recipe.steps[0].method == "trajectory"


LABELS, COMMITTEE, NRR = (
    (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
    for name in ("labels.md", "committee.md", "nrr.md")
)


@pytest.mark.parametrize(
    ("docs", "section", "config"),
    [
        (LABELS, "Options", Relabelling),
        (LABELS, "calibration", Calibration),
        (LABELS, "projector", Projection),
        (LABELS, "encoder", EncoderConfig),
        (COMMITTEE, "Options", Committee.Config),
        (COMMITTEE, "teachers", PoolTeacher),
        (COMMITTEE, "prior", PriorConfig),
        (COMMITTEE, "recover", Recovery),
    ],
)
def test_the_tables_of_labels_and_committees_give_keys_and_defaults(
    docs: str, section: str, config: type[BaseModel]
) -> None:
    found = rows(section, docs)
    assert list(found) == list(config.model_fields)
    for key, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, int | float | str | None) and not field.is_required():
            assert parse_scalar(found[key]) == default, key


def test_the_table_of_refinement_gives_what_it_adds_to_the_committee() -> None:
    found = rows("Options", NRR)
    shared = {key: field.default for key, field in RecoveringConfig.model_fields.items()}
    fields = NonCriticalRefinement.Config.model_fields
    own = [key for key, field in fields.items() if key not in shared or field.default != shared[key]]
    assert list(found) == own
    for key in own:
        assert parse_scalar(found[key]) == NonCriticalRefinement.Config.model_fields[key].default, key


@pytest.mark.parametrize(("docs", "method"), [(LABELS, "soft_label"), (COMMITTEE, "committee"), (NRR, "nrr")])
def test_the_examples_of_labels_and_committees_are_recipes(write, docs: str, method: str) -> None:
    example = re.findall(r"^```yaml\n(.*?)^```$", docs, flags=re.DOTALL | re.MULTILINE)[0]
    assert load_recipe(write(example)).recipe.steps[0].method == method
