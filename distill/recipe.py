"""Recipes: a whole run as data, and the road from YAML and `key=value` arguments to a checked `Recipe`.

Names of methods, data and models are looked up in the registry when a recipe is read, so those of installed
packages count too, and only what a recipe names is imported. Every mistake of a recipe is told at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PlainValidator,
    SerializeAsAny,
    ValidationError,
    WithJsonSchema,
    create_model,
    model_serializer,
)
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from distill.byte_sizes import AsBytes, ByteSize
from distill.errors import InputError, RecipeErrors
from distill.machine_paths import MachinePath
from distill.parallel import Where
from distill.recipe_overrides import Draft, apply_overrides
from distill.recipe_problems import Problem, Written, explain, key_path, refuse, unknown_key
from distill.registry import DATA, MODELS, TARGETS, Entry, lookup, methods, nearest
from distill.training.config import Precision, Strict, TrainConfig
from distill.yaml_lines import KeyPath, Mark, dump, flow, parse, quoted, read_text

# Sections whose options all have defaults: a key with nothing after it means those.
_OPTIONAL_SECTIONS = ("train", "evaluate", "cache")
_LARGEST_SEED = 2**63 - 1
_MODEL_NAME = {
    "anyOf": [
        {"enum": [name for name in MODELS if name != "torchvision"]},
        {"pattern": "^torchvision/", "type": "string"},
    ]
}

_ARGUMENT = 60  # characters of an argument that are told


def _validated(config: type[Strict], value: Any) -> Strict:
    """The configuration of plain data; by way of JSON, where strict validation takes lists for tuples."""
    return config.model_validate_json(json.dumps(value))


def _read_data(value: Any) -> Strict:
    return _named_data(value, DATA)


def _read_target(value: Any) -> Strict | None:
    return None if value is None else _named_data(value, TARGETS)


def _named_data(value: Any, known: dict[str, Entry]) -> Strict:
    if isinstance(value, Strict):
        return value
    named = "name the data, for example {name: digits}"
    if not isinstance(value, dict):
        refuse(InputError("not a mapping", found=flow(value), allowed="a mapping", fix=named), value)
    if "name" not in value:
        refuse(InputError("has no name", allowed=f"name: {', '.join(known)}", fix=named), value)
    try:
        source = lookup(str(value["name"]), known, what="data").load()
    except InputError as error:
        refuse(error, value, "name")
    return _validated(source.Config, value)


def _read_student(value: Any) -> Strict:
    from distill.models import model_config

    if isinstance(value, Strict):
        return value
    if not isinstance(value, str | dict):
        allowed = f"{', '.join(MODELS)}, or a mapping of name and options"
        refuse(InputError("not a model", found=flow(value), allowed=allowed), value)
    try:
        return model_config(value)
    except InputError as error:
        if isinstance(error.__cause__, ValidationError):
            raise error.__cause__ from error
        refuse(error, value)


class Step(Strict):
    """One step of a recipe, written `- method: {options}`.

    Args:
        method: a name in `distill.registry.methods()`.
        config: of the class `Config` of that method.
    """

    method: str
    config: SerializeAsAny[Strict]

    @model_serializer
    def _as_written(self) -> dict[str, Any]:
        return {self.method: self.config.model_dump(mode="json")}


def _read_step(value: Any) -> Step:
    if isinstance(value, Step):
        return value
    known = methods()
    if not isinstance(value, dict) or len(value) != 1:
        refuse(_not_a_step(value, known), value)
    method, options = next(iter(value.items()))
    try:
        config = lookup(method, known, what="method").load().Config
    except InputError as error:
        refuse(error, value, method)
    # The alias puts the method's name into the locations of its errors.
    holder = create_model("Step", __base__=Strict, options=(config, Field(alias=method)))
    checked = _validated(holder, {method: {} if options is None else options})
    return Step.model_construct(method=method, config=checked.options)  # type: ignore[attr-defined]


def _not_a_step(value: Any, known: Iterable[str]) -> InputError:
    fix = "write `- method: {options}`"
    if isinstance(value, str) and value in known:
        fix = f"write `- {value}: {{}}`"
    elif isinstance(value, dict) and len(value) > 1:
        named = [key for key in value if key in known]
        fix = "begin each method with its own `- `"
        if len(named) == 1:
            fix = f"indent the options further than {named[0]!r}"
    found = ", ".join(map(quoted, value)) if isinstance(value, dict) and value else flow(value)
    return InputError(
        "not a mapping with one key, a method's name", found=found, allowed=", ".join(known), fix=fix
    )


DataField = Annotated[SerializeAsAny[Strict], PlainValidator(_read_data), WithJsonSchema({})]
TargetField = Annotated[SerializeAsAny[Strict | None], PlainValidator(_read_target), WithJsonSchema({})]
StudentField = Annotated[SerializeAsAny[Strict], PlainValidator(_read_student), WithJsonSchema({})]
StepField = Annotated[SerializeAsAny[Step], PlainValidator(_read_step), WithJsonSchema({})]
Control = Literal["random", "random_soft", "random_target", "full"]
Regime = Literal["hard", "soft", "teacher"]
Tested = Literal["data", "target", "transfer", "nothing"]
TEXT = "text"  # the name of data that no student learns


def _default_students() -> tuple[Strict, ...]:
    return (_read_student("convnet"),)


class EvaluateConfig(Strict):
    """How the set is compared with the alternatives.

    Args:
        seeds: students trained for each figure; an interval needs two.
        students: model names, or mappings of a name and options.
        against: controls besides the set; none where the list is empty.
        regimes: labels that students of the set see; null is every one that applies.
        on: whose test split students are tested on: that of `data`, or of the `target`, which then has the same
            classes; `transfer` freezes students, which learn the set, and tests a linear classifier on their features
            that learns the target's train split; with `nothing` no student is trained, which is the default of text.
        full_epochs: epochs on the full data; null gives it about as many optimiser steps as the other arms, at
            least one epoch.
    """

    seeds: Annotated[int, Field(ge=2)] = 5
    students: Annotated[tuple[StudentField, ...], Field(min_length=1)] = Field(
        default_factory=_default_students
    )
    against: tuple[Control, ...] = ("random", "full")
    regimes: Annotated[tuple[Regime, ...], Field(min_length=1)] | None = None
    on: Tested = "data"
    full_epochs: Annotated[int, Field(ge=1)] | None = None


class CacheConfig(Strict):
    """Where features, gradients, statistics and networks are kept between runs, and how.

    None of it changes results, but for `non_finite` and, in their last digits, `work_bytes`.

    Args:
        folder: null is the user's cache folder.
        device_bytes: rows kept on a GPU; null is a quarter of what is free there.
        host_bytes: rows kept in host memory; null is a quarter of what is free.
        work_bytes: memory for per-sample gradients beside the forward pass. It decides how many samples go through at
            once, and so how sums are rounded; gradients computed with another value are not found again.
        non_finite: share of images whose features or gradients may be NaN or infinite before the run stops;
            within it rows read as zeros and scores as NaN, with a warning.
    """

    folder: Annotated[str, Field(min_length=1), MachinePath()] | None = None
    device_bytes: ByteSize | None = None
    host_bytes: ByteSize | None = None
    work_bytes: Annotated[int, AsBytes(at_least=1 << 20)] = 1 << 30
    non_finite: Annotated[float, Field(ge=0, le=1)] = 0.001


class Recipe(Strict):
    """A run: data, steps, evaluation.

    Args:
        seed: everything random in the run follows from it.
        precision: of network arithmetic; auto takes bfloat16 where the device is fast with it.
        data: the source, the `Config` of a class in `distill.registry.DATA`.
        target: data that a selector wants to resemble, of the same form; null where no step asks for them.
        train: how students of the set are trained.
        steps: methods in order, each given the result of the one before.
        evaluate: how the set is compared.
        cache: where intermediate results are kept.
        engine: who reads text: processes of this machine, or a Ray cluster; it does not change results.
    """

    seed: Annotated[int, Field(ge=0, le=_LARGEST_SEED)] = 0
    precision: Precision = "auto"
    data: DataField
    target: TargetField = None
    train: TrainConfig = TrainConfig()
    steps: Annotated[tuple[StepField, ...], Field(min_length=1)]
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    cache: CacheConfig = CacheConfig()
    engine: Where = "local"

    @property
    def of_text(self) -> bool:
        """Whether the data are documents, and not images."""
        name: str = self.data.name  # type: ignore[attr-defined]
        return name == TEXT


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and where each part of it was written.

    Args:
        recipe: checked, defaults filled in.
        source: the file, as errors name it.
        overrides: the arguments applied, in order.
        draft: the recipe as written, with the origin of each part.
    """

    recipe: Recipe
    source: str
    overrides: tuple[str, ...]
    draft: Draft

    def where(self, *path: str | int) -> str:
        """`file:line: key.path`, or `argument: key.path`, for an error about this part of the recipe."""
        return _where(self.source, self.draft.origin(path), path)

    def by_argument(self, *path: str | int) -> bool:
        """Whether an argument wrote this part of the recipe, or reset it."""
        if self.draft.origin(path) not in self.overrides:
            return False
        return path in self.draft.origins or _holds(self.draft.value, path)


def _holds(value: Any, path: KeyPath) -> bool:
    for part in path:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in _shipped_folder().glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The YAML of a shipped recipe; InputError, with the nearest name, for an unknown one."""
    known = recipe_names()
    if name not in known:
        close = nearest(name, known)
        fix = f"did you mean {close!r}? A file is named with its folder or its ending .yaml"
        raise InputError(
            f"there is no recipe {quoted(name)}",
            found=quoted(name),
            allowed=", ".join(known) or None,
            fix=fix if close else "name a file with its folder or its ending .yaml",
        )
    return read_text(_shipped_folder() / f"{name}.yaml")


def _shipped_folder() -> Path:
    """Inside the installed package; in a checkout, beside it."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read, override and check a recipe.

    Args:
        name_or_path: a path if it ends in .yaml or .yml, holds a separator or is a file; else a shipped
            recipe.
        overrides: `key.sub=value` arguments, applied in order; null goes back to the default.

    Raises:
        RecipeErrors: every mistake, in the order of the file, then of the arguments.
        InputError: no such recipe, an unreadable file, or text that is not YAML.
    """
    source, text = _locate(name_or_path)
    document = parse(text, source=source)
    draft = Draft({} if document.value is None else document.value, dict(document.marks))
    for path, mark, error in document.problems:
        draft.problems.append((mark, Problem(path, error.what, error.found, error.allowed, error.fix)))
    apply_overrides(draft, overrides)
    return LoadedRecipe(_check(draft, source=source), source, tuple(overrides), draft)


def make_recipe(data: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "recipe") -> Recipe:
    """The recipe of plain data, such as a run's report or a set's provenance holds.

    Args:
        data: what JSON can hold.
        overrides: as in `load_recipe`.
        source: names the data in errors.

    Raises:
        RecipeErrors: every mistake.
        TypeError: something that JSON cannot hold.
    """
    return read_recipe(data, overrides, source=source).recipe


def read_recipe(data: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str) -> LoadedRecipe:
    """`make_recipe`, and where each part came from."""
    draft = Draft(json.loads(json.dumps(data)), {(): source})
    apply_overrides(draft, overrides)
    return LoadedRecipe(_check(draft, source=source), source, tuple(overrides), draft)


def _locate(name_or_path: str) -> tuple[str, str]:
    """What errors call the recipe, and its text."""
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    is_path = name_or_path.endswith((".yaml", ".yml")) or any(each in name_or_path for each in separators)
    if is_path or os.path.isfile(name_or_path):  # noqa: PTH113 (Path.is_file raises on names that are too long)
        return name_or_path, read_text(Path(name_or_path))
    return f"recipes/{name_or_path}.yaml", recipe_text(name_or_path)


def _check(draft: Draft, *, source: str) -> Recipe:
    """The recipe of a draft, or every mistake in it."""
    raw = draft.value
    if isinstance(raw, dict):
        raw = {key: value for key, value in raw.items() if value is not None or key not in _OPTIONAL_SECTIONS}
    raw = _without_students(raw)
    recipe, found = None, []
    try:
        recipe = Recipe.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        found = explain(error, Written(raw, _schema_of_named(raw)))
    unread = {(problem.path, "null") for _, problem in draft.problems}
    problems = [
        *draft.problems,
        *((draft.origin(each.path), each) for each in found if (each.path, each.found) not in unread),
        *_unknown_resets(draft, raw),
    ]
    if recipe is None or problems:
        raise RecipeErrors(_in_order(problems, source), source=source)
    return recipe


def _without_students(raw: Any) -> Any:
    """The recipe, where a text recipe does not say what students are tested on: there are none."""
    data = raw.get("data") if isinstance(raw, dict) else None
    evaluate = raw.get("evaluate", {}) if isinstance(raw, dict) else None
    if not isinstance(data, dict) or data.get("name") != TEXT or not isinstance(evaluate, dict):
        return raw
    return {**raw, "evaluate": {"on": "nothing", **evaluate}}


def _unknown_resets(draft: Draft, raw: Any) -> list[tuple[str, Problem]]:
    """Arguments that reset what is no key: nothing else would notice them."""
    if not draft.resets:
        return []
    written = Written(raw, _schema_of_named(raw))
    known = [(argument, path, written.keys(path[:-1])) for path, argument in draft.resets]
    return [
        (argument, unknown_key(path, keys)) for argument, path, keys in known if keys and path[-1] not in keys
    ]


def _in_order(problems: list[tuple[Mark | str, Problem]], source: str) -> list[InputError]:
    """As errors: those of the file by line, then those of arguments."""

    def position(entry: tuple[Mark | str, Problem]) -> tuple[bool, Mark]:
        origin = entry[0]
        return (False, origin) if isinstance(origin, Mark) else (True, Mark(0, 0))

    return [
        InputError(
            problem.what,
            where=_where(source, origin, problem.path),
            found=problem.found,
            allowed=problem.allowed,
            fix=problem.fix,
        )
        for origin, problem in sorted(problems, key=position)
    ]


def _where(source: str, origin: Mark | str, path: KeyPath) -> str:
    place = f"{source}:{origin.line}" if isinstance(origin, Mark) else quoted(_cut(origin))
    return f"{place}: {key_path(path)}" if path else place


def _cut(argument: str) -> str:
    """An argument that may hold all steps, short enough to stand before each of its mistakes."""
    return argument if len(argument) <= _ARGUMENT else argument[: _ARGUMENT - 3] + "..."


def as_dict(recipe: Recipe) -> dict[str, Any]:
    """The merged recipe as plain data, every default filled in."""
    return recipe.model_dump(mode="json")


def merged_yaml(recipe: Recipe) -> str:
    """The merged recipe as YAML that loads back to an equal recipe; equal recipes give equal text."""
    return dump(as_dict(recipe))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two recipes as plain data: lines such as `steps.0.kcenter.ipc: 10 -> 50`."""
    before, after = _leaves(old), _leaves(new)
    paths = dict.fromkeys([*before, *after])
    return [
        f"{key_path(path)}: {before.get(path, 'absent')} -> {after.get(path, 'absent')}"
        for path in paths
        if before.get(path) != after.get(path)
    ]


def _leaves(value: Any, path: KeyPath = ()) -> dict[KeyPath, str]:
    """The text of every scalar, empty mapping and list of scalars, by key path."""
    if isinstance(value, Mapping) and value:
        below = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        below = list(enumerate(value))
    else:
        return {path: flow(value)}
    return {leaf: text for key, item in below for leaf, text in _leaves(item, (*path, key)).items()}


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of recipes: every method, data name and model; imports them all."""
    return _schema(data=DATA, targets=TARGETS, steps=methods(), with_models=True)


def _schema_of_named(raw: Any) -> dict[str, Any]:
    """The JSON schema of recipes, as far as this one's names need it: only those are imported."""
    recipe = raw if isinstance(raw, dict) else {}
    steps, evaluate = recipe.get("steps"), recipe.get("evaluate")
    named = (
        {key for step in steps if isinstance(step, dict) for key in step}
        if isinstance(steps, list)
        else set()
    )
    return _schema(
        data=_known(recipe.get("data"), DATA),
        targets=_known(recipe.get("target"), TARGETS),
        steps=[name for name in methods() if name in named],
        with_models=isinstance(evaluate, dict) and "students" in evaluate,
    )


def _known(section: Any, table: Mapping[str, Entry]) -> list[str]:
    """The name in a section of data, where there is such a one."""
    name = section.get("name") if isinstance(section, dict) else None
    return [name] if isinstance(name, str) and name in table else []


class _Lenient(GenerateJsonSchema):
    """Types that have no JSON schema, as a plugin may use, are described as any value."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


def _schema(
    *, data: Iterable[str], targets: Iterable[str], steps: Iterable[str], with_models: bool
) -> dict[str, Any]:
    known = methods()
    sources = [lookup(name, DATA, what="data").load().Config for name in data]
    wanted = [lookup(name, TARGETS, what="data").load().Config for name in targets]
    configs = {name: lookup(name, known, what="method").load().Config for name in steps}
    models = _model_configs() if with_models else []
    classes = dict.fromkeys([Recipe, EvaluateConfig, *sources, *wanted, *configs.values(), *models])
    refs, document = models_json_schema([(each, "validation") for each in classes], schema_generator=_Lenient)
    ref = {config: refs[config, "validation"] for config in classes}
    definitions = document["$defs"]
    recipe, evaluate = (
        definitions[ref[each]["$ref"].rsplit("/", 1)[-1]] for each in (Recipe, EvaluateConfig)
    )
    recipe["properties"]["data"] = _data_schema([ref[config] for config in sources])
    recipe["properties"]["target"] = {
        "anyOf": [_data_schema([ref[config] for config in wanted]), {"type": "null"}],
        "default": None,
    }
    recipe["properties"]["steps"]["items"] = _step_schema({name: ref[each] for name, each in configs.items()})
    evaluate["properties"]["students"]["items"] = {
        "anyOf": [_MODEL_NAME, *(ref[config] for config in models)]
    }
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **recipe,
        "$defs": {key: each for key, each in definitions.items() if each is not recipe},
    }


def _data_schema(forms: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "object", "required": ["name"], "oneOf": forms}


def _step_schema(options: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """A mapping with exactly one key, a method's name."""
    return {
        "type": "object",
        "properties": {name: {"anyOf": [form, {"type": "null"}]} for name, form in options.items()},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _model_configs() -> list[type[Strict]]:
    from distill.models import MODEL_CONFIGS

    return list(MODEL_CONFIGS.values())
