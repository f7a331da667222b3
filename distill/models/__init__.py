"""Networks by name.

A recipe says `convnet`, `{name: convnet, width: 32}` or `torchvision/resnet18`; `build` makes the network. Every one
has `features` and a final linear `classifier` (`distill.models.base`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, SerializeAsAny, ValidationError, WithJsonSchema

from distill.errors import InputError
from distill.models.alexnet import AlexNetConfig
from distill.models.base import Classifier, ModelConfig
from distill.models.convnet import ConvNetConfig
from distill.models.mlp import MLPConfig
from distill.models.resnet import ResNet18Config
from distill.models.torchvision_models import PREFIX, TorchvisionConfig
from distill.models.vgg import VGG11Config
from distill.randomness import derive_seed
from distill.recipe_problems import refuse
from distill.registry import MODELS, nearest
from distill.training.config import Strict

MODEL_CONFIGS: dict[str, type[ModelConfig]] = {
    "convnet": ConvNetConfig,
    "mlp": MLPConfig,
    "resnet18": ResNet18Config,
    "alexnet": AlexNetConfig,
    "vgg11": VGG11Config,
    "torchvision": TorchvisionConfig,
}
assert MODEL_CONFIGS.keys() == MODELS.keys()

_PLAIN_NAMES = [name for name in MODEL_CONFIGS if name != "torchvision"]
_ALLOWED = ", ".join([*_PLAIN_NAMES, f"{PREFIX}NAME"])


def model_config(value: str | Mapping[str, Any]) -> ModelConfig:
    """The configuration that a recipe's `convnet` or `{name: convnet, ...}` means.

    Raises:
        InputError: an unknown name, or wrong options; the `__cause__` is then a pydantic ValidationError with all.
    """
    options = _options(value)
    config = _config_class(options)
    try:
        return config.model_validate(options)
    except ValidationError as error:
        told = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise InputError(f"{options['name']}: {'; '.join(told)}") from error


def _options(value: Any) -> dict[str, Any]:
    """A name, or a mapping, as a mapping."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise InputError(
            "not a model", found=repr(value), allowed=f"{_ALLOWED}, or a mapping of name and options"
        )
    return dict(value)


def _config_class(options: Mapping[str, Any]) -> type[ModelConfig]:
    if "name" not in options:
        raise InputError("the model has no name", allowed=f"name: {_ALLOWED}")
    name = options["name"]
    if not isinstance(name, str):
        raise InputError("the model's name is not text", found=repr(name), allowed=_ALLOWED)
    if name.startswith(PREFIX):
        return TorchvisionConfig
    if name in _PLAIN_NAMES:
        return MODEL_CONFIGS[name]
    close = f"{PREFIX}resnet18" if name == "torchvision" else nearest(name, _PLAIN_NAMES)
    fix = f"did you mean {close!r}?" if close else None
    raise InputError(f"unknown model {name!r}", found=name, allowed=_ALLOWED, fix=fix)


def _read(value: Any) -> ModelConfig:
    """Names and mappings become configurations; each error keeps its place within the mapping."""
    if isinstance(value, ModelConfig):
        return value
    try:
        options = _options(value)
        config = _config_class(options)
    except InputError as error:
        refuse(error, value, *(("name",) if isinstance(value, Mapping) and "name" in value else ()))
    return config.model_validate(options)


def _schema() -> dict[str, Any]:
    forms = [config.model_json_schema() for config in MODEL_CONFIGS.values()]
    return {"anyOf": [{"enum": _PLAIN_NAMES}, {"type": "string", "pattern": f"^{PREFIX}"}, *forms]}


ModelSpec = Annotated[SerializeAsAny[ModelConfig], BeforeValidator(_read), WithJsonSchema(_schema())]
"""A field of a configuration that names a network, by name or as a mapping."""


def build(config: Strict, *, image_shape: tuple[int, int, int], classes: int, seed: int) -> Classifier:
    """The network of a configuration.

    Args:
        config: from `model_config`.
        image_shape: (Ch, H, W).
        classes: C.
        seed: initial weights depend on it alone; the global generators are left as they were.

    Raises:
        InputError: images that the network cannot take, or weights for another network.
        DamagedDataError: a weights file with another sha256 than asked for, or that cannot be read.
    """
    assert isinstance(config, ModelConfig)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which would seed the accelerators' generators too.
        torch.default_generator.manual_seed(derive_seed(seed, "weights"))
        return config.build(image_shape, classes)


def describe(config: Strict) -> str:
    """Short text that tells configurations apart, such as `convnet-w32`."""
    assert isinstance(config, ModelConfig)
    return config.describe()


def digest(module: torch.nn.Module) -> str:
    """sha256 (hex) over the network's definition and every tensor of its state: name, dtype, shape and bytes."""
    result = hashlib.sha256(str(module).encode())
    for name, value in module.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()
