"""The JSON schema of recipes: complete, closed, and saying what the recipe itself says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from distill.recipe import json_schema

pytestmark = pytest.mark.usefixtures("registry")


def sub_schemas(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from sub_schemas(item)


def target(schema: dict[str, Any], ref: str) -> dict[str, Any]:
    assert ref.startswith("#/$defs/")
    return schema["$defs"][ref.removeprefix("#/$defs/")]


def test_it_names_its_dialect_and_every_key() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(schema["properties"]) == [
        "seed",
        "precision",
        "data",
        "target",
        "train",
        "steps",
        "evaluate",
        "cache",
        "engine",
    ]
    assert schema["required"] == ["data", "steps"]
    assert schema["additionalProperties"] is False


def test_every_reference_resolves() -> None:
    schema = json_schema()
    refs = [each["$ref"] for each in sub_schemas(schema) if "$ref" in each]
    assert refs
    assert all(target(schema, ref) for ref in refs)


def test_every_definition_is_used() -> None:
    schema = json_schema()
    refs = {each["$ref"] for each in sub_schemas(schema) if "$ref" in each}
    assert {ref.removeprefix("#/$defs/") for ref in refs} == set(schema["$defs"])


def test_it_lists_every_method_with_its_options() -> None:
    schema = json_schema()
    step = schema["properties"]["steps"]["items"]
    assert list(step["properties"]) == ["kcenter", "soft_label", "json"]
    assert (step["minProperties"], step["maxProperties"], step["additionalProperties"]) == (1, 1, False)
    ref, null = step["properties"]["kcenter"]["anyOf"]
    assert null == {"type": "null"}
    assert target(schema, ref["$ref"])["properties"]["ipc"]["minimum"] == 1


def test_it_lists_every_data_name() -> None:
    schema = json_schema()
    data = schema["properties"]["data"]
    assert data["required"] == ["name"]
    names = [target(schema, form["$ref"])["properties"]["name"]["const"] for form in data["oneOf"]]
    assert names == ["digits", "folder"]


@pytest.mark.parametrize("name", ["convnet", "mlp"])
def test_students_are_names_or_options(name: str) -> None:
    schema = json_schema()
    evaluate = target(schema, schema["properties"]["evaluate"]["$ref"])
    named, *forms = evaluate["properties"]["students"]["items"]["anyOf"]
    assert name in named["anyOf"][0]["enum"]
    assert name in [target(schema, form["$ref"])["properties"]["name"]["const"] for form in forms]
