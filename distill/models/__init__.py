"""Networks by name.

A recipe says `convnet`, `{name: convnet, width: 32}` or `torchvision/resnet18`; `build` makes the network. Every one
has `features` and a final linear `classifier` (`distill.models.base`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema
from torch import nn

from distill.errors import InputError
from distill.models.alexnet import AlexNetConfig
from distill.models.convnet import ConvNetConfig
from distill.models.mlp import MLPConfig
from distill.models.resnet import ResNet18Config
from distill.models.torchvision_models import PREFIX, TorchvisionConfig
from distill.models.vgg import VGG11Config
from distill.randomness import derive_seed
from distill.registry import MODELS, nearest
from distill.training.config import Strict

ModelConfig = ConvNetConfig | MLPConfig | ResNet18Config | AlexNetConfig | VGG11Config | TorchvisionConfig

MODEL_CONFIGS: dict[str, type[Strict]] = {
    "convnet": ConvNetConfig,
    "mlp": MLPConfig,
    "resnet18": ResNet18Config,
    "alexnet": AlexNetConfig,
    "vgg11": VGG11Config,
    "torchvision": TorchvisionConfig,
}
assert MODEL_CONFIGS.keys() == MODELS.keys()


def model_config(value: str | Mapping[str, Any]) -> Any:
    """The configuration that a recipe's `convnet` or `{name: convnet, ...}` means.

    Raises:
        InputError: an unknown name; its `__cause__` is a pydantic ValidationError where options are wrong.
    """
    options = {"name": value} if isinstance(value, str) else dict(value)
    try:
        return _config_class(options).model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{options['name']}: {'.'.join(map(str, first['loc']))}: {first['msg']}", found=repr(first["input"])
        ) from error


def _config_class(options: Mapping[str, Any]) -> type[Strict]:
    name = options.get("name")
    if name is None:
        raise InputError("the model has no name", allowed=_ALLOWED)
    if str(name).startswith(PREFIX):
        return TorchvisionConfig
    if name not in MODEL_CONFIGS or name == "torchvision":
        close = nearest(str(name), MODEL_CONFIGS)
        raise InputError(
            f"unknown model {str(name)!r}",
            found=str(name),
            allowed=_ALLOWED,
            fix=f"did you mean {close!r}?" if close else None,
        )
    return MODEL_CONFIGS[name]


_ALLOWED = ", ".join([*(name for name in MODEL_CONFIGS if name != "torchvision"), f"{PREFIX}NAME"])


def _read(value: Any) -> Any:
    """Names and mappings become configurations; errors keep their places within the mapping."""
    if isinstance(value, ModelConfig):
        return value
    if not isinstance(value, str | Mapping):
        raise ValueError(f"not a model; allowed: {_ALLOWED}")
    options = {"name": value} if isinstance(value, str) else dict(value)
    try:
        config = _config_class(options)
    except InputError as error:
        raise ValueError(error.what + (f"; {error.fix}" if error.fix else f"; allowed: {_ALLOWED}")) from error
    return config.model_validate(options)


def _schema() -> dict[str, Any]:
    names = [name for name in MODEL_CONFIGS if name != "torchvision"]
    forms = [config.model_json_schema() for config in MODEL_CONFIGS.values()]
    return {"anyOf": [{"enum": names}, {"type": "string", "pattern": f"^{PREFIX}"}, *forms]}


ModelSpec = Annotated[
    Any,
    BeforeValidator(_read),
    PlainSerializer(lambda config: config.model_dump(mode="json")),
    WithJsonSchema(_schema()),
]
"""A field of a configuration that names a network, by name or as a mapping."""


def build(config: Any, *, image_shape: tuple[int, int, int], classes: int, seed: int) -> nn.Module:
    """The network of a configuration.

    Args:
        config: from `model_config`.
        image_shape: (Ch, H, W).
        classes: C.
        seed: initial weights depend on it alone; the global generator is left as it was.

    Raises:
        InputError: images that the network cannot take, or weights for another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        return config.build(image_shape, classes)


def describe(config: Any) -> str:
    """Short text that tells configurations apart, such as `convnet-w32`."""
    return config.describe()


def digest(module: nn.Module) -> str:
    """sha256 (hex) over the network's definition and every tensor of its state."""
    result = hashlib.sha256(str(module).encode())
    for name, value in module.state_dict().items():
        tensor = value.detach().cpu().contiguous()
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return result.hexdigest()
