"""Names and mappings become configurations, and every mistake in them is told at its place."""

from __future__ import annotations

import json

import pytest
from pydantic import Field, ValidationError

from distill.errors import InputError
from distill.models import MODEL_CONFIGS, ModelSpec, describe, model_config
from distill.models.convnet import ConvNetConfig
from distill.models.torchvision_models import TorchvisionConfig
from distill.registry import MODELS
from distill.training.config import Strict


class Holder(Strict):
    model: ModelSpec = Field(default_factory=lambda: model_config("convnet"))
    others: tuple[ModelSpec, ...] = ()


def test_registry_names_these_classes() -> None:
    assert {name: entry.load() for name, entry in MODELS.items()} == MODEL_CONFIGS


def test_a_name_and_a_mapping() -> None:
    assert model_config("convnet") == model_config({"name": "convnet"}) == ConvNetConfig()
    assert model_config({"name": "convnet", "width": 32, "norm": "batch"}) == ConvNetConfig(
        width=32, norm="batch"
    )
    weighted = {"name": "torchvision/resnet18", "weights": "w.safetensors", "sha256": "0" * 64}
    assert model_config(weighted) == TorchvisionConfig(**weighted)
    assert hash(model_config("convnet")) == hash(model_config("convnet"))


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("convent", ["unknown model 'convent'", "did you mean 'convnet'?", "torchvision/NAME"]),
        ("torchvision", ["unknown model 'torchvision'", "did you mean 'torchvision/resnet18'?"]),
        ({"width": 3}, ["has no name", "convnet"]),
        ({"name": ["convnet"]}, ["name is not text", "['convnet']"]),
        (3, ["not a model", "3", "mapping of name and options"]),
        ("torchvision/resnet19", ["no classifier 'resnet19'", "did you mean 'torchvision/resnet1"]),
        ("torchvision/lraspp_mobilenet_v3_large", ["no classifier"]),
        ("torchvision/", ["name:"]),
        ({"name": "convnet", "width": 0, "norm": "layer"}, ["convnet: width:", "norm:"]),
        ({"name": "mlp", "norm": "batch"}, ["mlp: norm: Extra inputs are not permitted"]),
        ({"name": "torchvision/resnet18", "weights": "w", "sha256": "abc"}, ["sha256:"]),
    ],
)
def test_bad_models(value, parts) -> None:
    with pytest.raises(InputError) as caught:
        model_config(value)
    for part in parts:
        assert part in str(caught.value)


def test_wrong_options_carry_pydantics_findings() -> None:
    with pytest.raises(InputError) as caught:
        model_config({"name": "convnet", "width": 0, "norm": "layer"})
    assert isinstance(caught.value.__cause__, ValidationError)
    assert caught.value.__cause__.error_count() == 2


def test_field_takes_both_forms_and_writes_mappings() -> None:
    holder = Holder.model_validate(
        {"model": "mlp", "others": ({"name": "convnet", "width": 8}, ConvNetConfig())}
    )
    written = holder.model_dump(mode="json")
    assert written["model"] == {"name": "mlp", "width": 128, "depth": 2}
    assert [each["width"] for each in written["others"]] == [8, 128]
    assert holder.model_dump()["model"] == written["model"]
    assert Holder.model_validate_json(json.dumps(written)) == holder
    assert Holder().model == ConvNetConfig()


def test_field_reports_every_error_at_its_place() -> None:
    bad = {
        "model": {"name": "convnet", "width": 0, "depht": 3},
        "others": [{"name": "convent"}, "convent", 3, {"name": "resnet18", "width": "x"}],
    }
    with pytest.raises(ValidationError) as caught:
        Holder.model_validate_json(json.dumps(bad))
    assert {each["loc"] for each in caught.value.errors()} == {
        ("model", "width"),
        ("model", "depht"),
        ("others", 0, "name"),
        ("others", 1),
        ("others", 2),
        ("others", 3, "width"),
    }
    assert "unknown model 'convent'" in str(caught.value)


def test_field_has_a_schema_of_every_form() -> None:
    forms = Holder.model_json_schema()["properties"]["model"]["anyOf"]
    assert "convnet" in forms[0]["enum"]
    assert forms[1]["pattern"] == "^torchvision/"
    assert [form["properties"]["name"].get("const") for form in forms[2:7]] == [
        "convnet", "mlp", "resnet18", "alexnet", "vgg11"
    ]  # fmt: skip
    assert forms[2]["properties"]["norm"]["enum"] == ["instance", "batch", "none"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("convnet", "convnet-w128"),
        ({"name": "convnet", "width": 32, "depth": 3, "norm": "batch"}, "convnet-w32-d3-batch"),
        ("mlp", "mlp-w128-d2"),
        ("resnet18", "resnet18"),
        ({"name": "resnet18", "width": 16, "norm": "none"}, "resnet18-w16-none"),
        ({"name": "alexnet", "norm": "batch"}, "alexnet-batch"),
        ("vgg11", "vgg11"),
        ("torchvision/resnet18", "torchvision/resnet18"),
        ({"name": "torchvision/resnet18", "weights": "a/w.pt"}, "torchvision/resnet18 (w.pt)"),
    ],
)
def test_describe(value, text) -> None:
    assert describe(model_config(value)) == text
