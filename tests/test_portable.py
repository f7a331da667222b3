"""No path of a machine leaves with a set: every registered configuration says which of its fields hold paths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from distill.errors import InputError
from distill.machine_paths import path_mark
from distill.models import MODEL_CONFIGS
from distill.portable import path_places, refuse_absent_files, without_paths
from distill.recipe import Recipe, make_recipe
from distill.registry import DATA, TARGETS, methods

# Free text that is no path: names, formats of names, and digests.
NO_PATHS = {
    "name", "classes", "class_names", "x_train", "y_train", "x_test", "y_test", "sha256", "method", "layer",
    "device_bytes", "host_bytes", "work_bytes", "layers", "templates", "field", "proportions",
}  # fmt: skip


def parts(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from parts(part)


def configs(config: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A configuration and those of its fields."""
    yield config
    for field in config.model_fields.values():
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from configs(part)


REGISTERED = {
    f"{kind} {name}": config
    for kind, found in (
        ("recipe", {"recipe": Recipe}),
        ("data", {name: entry.load().Config for name, entry in DATA.items()}),
        ("target", {name: entry.load().Config for name, entry in TARGETS.items() if name not in DATA}),
        ("target of", {"text": TARGETS["text"].load().Config}),
        ("model", MODEL_CONFIGS),
        ("method", {name: entry.load().Config for name, entry in methods().items()}),
    )
    for name, config in found.items()
}


@pytest.mark.parametrize("config", REGISTERED.values(), ids=REGISTERED)
def test_every_field_of_free_text_holds_a_path_or_is_known_not_to(config: type[BaseModel]) -> None:
    """A new option that holds a path must be marked with MachinePath."""
    unknown = {
        f"{own.__name__}.{name}"
        for own in configs(config)
        for name, field in own.model_fields.items()
        if any(part in (str, Path) for part in parts(field.annotation))
        and path_mark(field) is None
        and name not in NO_PATHS
    }
    assert not unknown


SECRET = "/home/someone/secret"
PLACES: list[dict[str, Any]] = [
    *({"name": name, "folder": SECRET} for name in ("cifar10", "cifar100", "mnist", "fashion_mnist", "svhn")),
    {"name": "folder", "folder": SECRET},
    {"name": "arrays", "path": f"{SECRET}.npz"},
    {"name": "idx", "train": [f"{SECRET}/a", f"{SECRET}/b"], "test": [f"{SECRET}/c", f"{SECRET}/d"]},
    {"name": "webdataset", "folder": SECRET, "train": [f"{SECRET}/*.tar"], "test": [f"{SECRET}/*.tar"]},
]
FILES: list[Any] = [
    SECRET,
    [f"{SECRET}/*.jsonl", f"{SECRET}/more"],
    {"one": f"{SECRET}/a", "two": [f"{SECRET}/b", SECRET]},
]


def recipe(**sections: Any) -> Recipe:
    return make_recipe({"data": {"name": "digits"}, "steps": [{"random": {"ipc": 1}}], **sections})


@pytest.mark.parametrize("data", PLACES, ids=[data["name"] for data in PLACES])
def test_where_the_data_lie_leaves_no_trace(data: dict[str, Any]) -> None:
    elsewhere = json.loads(json.dumps(data).replace(SECRET, "data"))
    plain = without_paths(recipe(data=data, cache={"folder": SECRET}))
    assert SECRET not in json.dumps(plain) and "cache" not in plain
    assert plain == without_paths(recipe(data=elsewhere))
    assert plain["data"]["name"] == data["name"] and plain["data"]["valid"] == 0.1


@pytest.mark.parametrize("files", FILES, ids=["a path", "a list", "targets"])
def test_where_files_of_text_lie_leaves_no_trace(files: Any) -> None:
    """Neither do the names of targets, which the set tells beside its recipe, nor who did the work."""

    def made(files: Any, **sections: Any) -> dict[str, Any]:
        data = files["one"] if isinstance(files, dict) else files
        return without_paths(
            recipe(
                data={"name": "text", "files": data},
                target={"name": "text", "files": files, "field": "body"},
                steps=[{"dsir": {"count": 3}}],
                **sections,
            )
        )

    plain = made(files, cache={"folder": SECRET}, engine="ray")
    assert SECRET not in json.dumps(plain) and not {"cache", "engine"} & plain.keys()
    assert plain == made(json.loads(json.dumps(files).replace(SECRET, "data")))
    assert plain["target"]["field"] == "body" and "files" not in plain["target"]
    found = {
        place.path: place.value for place in path_places(recipe(target={"name": "text", "files": files}))
    }
    assert found[("target", "files")] == files


def test_a_share_in_the_place_of_a_path_stays() -> None:
    assert without_paths(recipe(data={"name": "webdataset", "test": 0.3}))["data"]["test"] == 0.3


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "secret" / "weights.pt"
    path.parent.mkdir()
    path.write_bytes(b"content")
    return path


def with_weights(path: Path, **options: str) -> Recipe:
    model = {"name": "torchvision/resnet18", "weights": str(path), **options}
    return recipe(
        steps=[{"soft_label": {"ipc": 1, "teacher": {"model": model}}}],
        evaluate={"students": ["mlp", model]},
    )


def test_weights_are_known_by_their_content(weights: Path) -> None:
    plain = without_paths(with_weights(weights))
    digest = hashlib.sha256(b"content").hexdigest()
    assert str(weights.parent) not in json.dumps(plain)
    for model in (plain["steps"][0]["soft_label"]["teacher"]["model"], plain["evaluate"]["students"][1]):
        assert model["sha256"] == digest and "weights" not in model
    assert plain == without_paths(with_weights(weights, sha256=digest))
    assert "sha256" not in plain["evaluate"]["students"][0]


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"soft_label\.teacher\.model\.weights") as caught:
        without_paths(with_weights(tmp_path / "none.pt"))
    assert "none.pt" in str(caught.value.found)


def test_a_recipe_from_a_set_waits_for_its_files(weights: Path) -> None:
    portable = without_paths(with_weights(weights))
    with pytest.raises(InputError, match="not named") as caught:
        refuse_absent_files(make_recipe(portable))
    assert caught.value.where == "steps.0.soft_label.teacher.model.weights"
    with pytest.raises(InputError, match=r"evaluate\.students\.1\.weights=FILE"):
        refuse_absent_files(make_recipe(portable), sections=("evaluate",))
    named = make_recipe(portable, [f"evaluate.students.1.weights={weights}"])
    refuse_absent_files(named, sections=("evaluate",))
    refuse_absent_files(with_weights(weights))


def test_places_are_key_paths_of_the_recipe(weights: Path) -> None:
    found = {place.path: place.value for place in path_places(with_weights(weights))}
    assert found == {
        ("steps", 0, "soft_label", "teacher", "model", "weights"): str(weights),
        ("evaluate", "students", 1, "weights"): str(weights),
        ("cache", "folder"): None,
    }
