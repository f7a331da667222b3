"""A small registry of made-up rooms: the recipe language is tested without torch and real methods."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import pytest
from pydantic import BeforeValidator, Field, ValidationError, model_validator

import distill.recipe
from distill.errors import InputError
from distill.registry import Entry
from distill.training.config import Positive, Strict, TrainConfig

Side = Annotated[int, Field(ge=1, le=64)]


class DigitsConfig(Strict):
    name: Literal["digits"] = "digits"
    cap: Annotated[int, Field(ge=1)] | None = None
    valid: Annotated[float, Field(ge=0, lt=1)] = 0.1
    resize: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    grayscale: bool = False


class FolderConfig(Strict):
    name: Literal["folder"] = "folder"
    folder: Annotated[str, Field(min_length=1)]
    pattern: Annotated[str, Field(pattern=r"^\*\.[a-z]+$")] = "*.png"


class ConvNetConfig(Strict):
    name: Literal["convnet"] = "convnet"
    width: Annotated[int, Field(ge=1)] = 128
    norm: Literal["instance", "batch", "none"] = "instance"


class MLPConfig(Strict):
    name: Literal["mlp"] = "mlp"
    width: Annotated[int, Field(ge=1)] = 128


class TeacherConfig(Strict):
    model: Annotated[ConvNetConfig | MLPConfig, Field(discriminator="name")] = ConvNetConfig()
    train: TrainConfig = TrainConfig()


class KCenterConfig(Strict):
    ipc: Annotated[int, Field(ge=1)]
    features: Literal["network", "pixels"] = "network"


class SoftLabelConfig(Strict):
    """Options of every kind that a method may declare."""

    temperature: Positive = 1.0
    teacher: TeacherConfig = TeacherConfig()
    layers: tuple[str, ...] = ()
    weights: Path | None = None
    first: int | None = None
    last: int | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.first is not None and self.last is not None and self.first > self.last:
            raise ValueError("first is above last")
        return self


def _checked(value: Any) -> Any:
    """As plugins may do it: an error of ours behind the ValueError that pydantic wants."""
    if value == "bad":
        error = InputError("unknown checker", found=value, allowed="good", fix="write good")
        raise ValueError(error.what) from error
    return value


class PluginConfig(Strict):
    checker: Annotated[Any, BeforeValidator(_checked)] = 1


MODEL_CONFIGS: dict[str, type[Strict]] = {"convnet": ConvNetConfig, "mlp": MLPConfig}


def model_config(value: str | dict) -> Strict:
    given = {"name": value} if isinstance(value, str) else value
    name = given.get("name")
    if name not in MODEL_CONFIGS:
        fix = "did you mean 'convnet'?"
        raise InputError("unknown model", found=str(name), allowed=", ".join(MODEL_CONFIGS), fix=fix)
    try:
        return MODEL_CONFIGS[name].model_validate(given)
    except ValidationError as error:
        raise InputError("wrong model options") from error


def _room(config: type[Strict]) -> type:
    return type("Room", (), {"Config": config})


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data names, three methods (one from a plugin), two models."""
    rooms = types.ModuleType("made_up_rooms")
    configs = {
        "digits": DigitsConfig,
        "folder": FolderConfig,
        "kcenter": KCenterConfig,
        "soft_label": SoftLabelConfig,
        "json": PluginConfig,  # the name of a pydantic attribute
    }
    for name, config in configs.items():
        setattr(rooms, name, _room(config))
    models = types.ModuleType("distill.models")
    models.__dict__.update(model_config=model_config, MODEL_CONFIGS=MODEL_CONFIGS)
    monkeypatch.setitem(sys.modules, "made_up_rooms", rooms)
    monkeypatch.setitem(sys.modules, "distill.models", models)
    entries = {name: Entry(name, f"made_up_rooms:{name}", "made-up", "") for name in configs}
    data = {name: entries[name] for name in ("digits", "folder")}
    methods = {name: entries[name] for name in ("kcenter", "soft_label", "json")}
    monkeypatch.setattr(distill.recipe, "DATA", data)
    monkeypatch.setattr(distill.recipe, "methods", lambda: methods)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes text to recipe.yaml in the current directory, a temporary one, and gives the name."""
    monkeypatch.chdir(tmp_path)

    def write_text(text: str, name: str = "recipe.yaml") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write_text
