"""Any torchvision classifier as `torchvision/NAME`, with weights from a local file.

The network's last linear layer becomes the classifier and what goes into it the features. Without weights that layer
is made anew for the data's classes; with weights the class counts must agree. Auxiliary heads are left out.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from distill.errors import DamagedDataError, InputError, missing_extra
from distill.machine_paths import MachinePath
from distill.models.base import Classifier, ModelConfig
from distill.registry import nearest

PREFIX = "torchvision/"

# What the networks with auxiliary heads call them.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}

# What networks call the pooling behind their first convolution.
_STEM_POOLINGS = ("maxpool", "maxpool1", "features.pool0")
# Tensors may share what a file holds, as tied weights do; beyond that a small file would claim much memory.
_MOST_CLAIMED = 2
_SLACK_BYTES = 1 << 20


class TorchvisionConfig(ModelConfig):
    """Options of `torchvision/NAME`.

    `weights` is a safetensors file or a state dict (loaded with weights_only), checked against `sha256` where given.
    Without either, weights are random; `sha256` alone, as a set's recipe has it, waits for the file's name. `stem:
    small` is the habit for images of 32 and 64 px: the first convolution is one of 3 x 3 px and stride 1, and no
    pooling follows it.
    """

    name: Annotated[str, Field(pattern=f"^{PREFIX}.+")]
    weights: Annotated[str, Field(min_length=1), MachinePath(sha256="sha256")] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    stem: Literal["full", "small"] = "full"

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        known = [PREFIX + each for each in classifier_names()]
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean {close!r}?" if close else f"it has {', '.join(known)}"
            raise ValueError(f"torchvision has no classifier {name.removeprefix(PREFIX)!r}; {hint}")
        return name

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Classifier:
        if image_shape[0] != 3:
            raise InputError(
                f"{self.name} takes RGB images",
                found=f"{image_shape[0]} channel{'s' if image_shape[0] != 1 else ''}",
                allowed="3 channels",
                fix="set data.channels to rgb",
            )
        if self.weights is None and self.sha256 is not None:
            raise InputError(
                f"the weights of {self.name} are known by their sha256 alone",
                found=self.sha256,
                fix="name the file of this sha256 in weights, in the model's options",
            )
        state = None if self.weights is None else load_state(Path(self.weights), sha256=self.sha256)
        module = make_classifier(self.name.removeprefix(PREFIX), weighted=state is not None)
        if self.stem == "small":
            _shrink_stem(module, self.name)
        path = last_linear(module, self.name)
        _fit_head(module, path, classes)
        if state is not None:
            _load(module, state, head=path, where=str(self.weights))
        network = _split(module, path)
        _refuse_size(network, image_shape, self.name)
        return network

    def describe(self) -> str:
        name = self.name if self.stem == "full" else f"{self.name}-small"
        return name if self.weights is None else f"{name} ({Path(self.weights).name})"


def load_state(path: Path, *, sha256: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict, of which nothing but tensors is unpickled.

    Raises:
        InputError: no such file, or no mapping from names to tensors.
        DamagedDataError: another sha256 than asked for, or a file that cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(
            "cannot read the weights file",
            where=str(path),
            found=error.strerror,
            fix="correct weights in the model's options; a relative path starts at the current folder",
        ) from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DamagedDataError(
            "the weights have another sha256 than asked for",
            where=str(path),
            found=found,
            allowed=sha256,
            fix="get the file again, or correct sha256 if you trust this file",
        )
    state = _read_safetensors(data, path) if path.suffix == ".safetensors" else _read_torch(data, path)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise InputError(
            "the weights file holds no state dict",
            where=str(path),
            allowed="a mapping from names to tensors",
            fix="save the network's state_dict()",
        )
    claimed = sum(value.nbytes for value in state.values())
    if any(value.is_meta for value in state.values()) or claimed > _MOST_CLAIMED * len(data) + _SLACK_BYTES:
        raise DamagedDataError(
            "the weights file holds less than its tensors say",
            where=str(path),
            found=f"{len(data):,} bytes for tensors of {claimed:,}",
            fix="get the file again",
        )
    return dict(state)


def _read_safetensors(data: bytes, path: Path) -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError:
        raise missing_extra("safetensors", "weights", purpose=f"reading {path.name}") from None
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DamagedDataError("not a safetensors file", where=str(path), found=str(error)) from error


def _read_torch(data: bytes, path: Path) -> Any:
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle raises what it likes
        raise DamagedDataError(
            "not a state dict that torch can load with weights_only",
            where=str(path),
            found=(str(error) or type(error).__name__).splitlines()[0],
            fix="save the network's state_dict() anew, best as safetensors",
        ) from error


def classifier_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def make_classifier(name: str, *, weighted: bool) -> nn.Module:
    """The torchvision network, its weights random; prepared for torchvision's own weights where `weighted`."""
    import torchvision

    options: dict[str, Any] = {}
    if name in AUXILIARY:
        # `transform_input` undoes ImageNet's mean and std, which torchvision's weights of these networks expect.
        options = {"aux_logits": False, "init_weights": not weighted, "transform_input": weighted}
    return torchvision.models.get_model(name, weights=None, **options)


def _shrink_stem(module: nn.Module, name: str) -> None:
    """Make the first convolution one of 3 x 3 px and stride 1, and leave out the pooling behind it."""
    path, first = next((path, part) for path, part in module.named_modules() if isinstance(part, nn.Conv2d))
    if first.stride == (1, 1):
        raise InputError(
            f"the first convolution of {name} has stride 1, and the stem is no larger than it should be",
            found="stem: small",
            fix="leave stem out",
        )
    small = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None)
    module.set_submodule(path, small)
    for pooling in _STEM_POOLINGS:
        if isinstance(_submodule(module, pooling), nn.MaxPool2d):
            module.set_submodule(pooling, nn.Identity())


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    return dict(module.named_modules()).get(path)


def last_linear(module: nn.Module, name: str) -> str:
    """The path of the last linear layer."""
    paths = [path for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not paths:
        raise InputError(
            f"{name} has no final linear layer, which features and classifier are told apart by",
            fix="use another network, such as torchvision/resnet18",
        )
    return paths[-1]


def _fit_head(module: nn.Module, path: str, classes: int) -> None:
    """Make the linear layer at `path` anew where it has another number of outputs than C."""
    last = module.get_submodule(path)
    assert isinstance(last, nn.Linear)
    if last.out_features != classes:
        module.set_submodule(path, nn.Linear(last.in_features, classes, bias=last.bias is not None))


def _split(module: nn.Module, path: str) -> Classifier:
    """Take the linear layer at `path` out of the network, as its classifier."""
    last = module.get_submodule(path)
    assert isinstance(last, nn.Linear)
    module.set_submodule(path, nn.Identity())
    return Classifier(module, last)


def _load(module: nn.Module, state: dict[str, Tensor], *, head: str, where: str) -> None:
    """Load the file's tensors, once every name and shape is as it should be."""
    heads = tuple(prefix for prefixes in AUXILIARY.values() for prefix in prefixes)
    state = {name_today(name): value for name, value in state.items() if not name.startswith(heads)}
    wanted = module.state_dict()
    last = f"{head}.weight"
    if (
        last in state
        and state[last].shape[1:] == wanted[last].shape[1:]
        and len(state[last]) != len(wanted[last])
    ):
        raise InputError(
            "the weights are for another number of classes",
            where=where,
            found=f"{len(state[last])} classes",
            allowed=f"{len(wanted[last])}, the data's",
            fix="use weights trained on these classes, or leave weights out",
        )
    wrong = differences(state, wanted)
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            "the weights are for another network",
            where=where,
            found="; ".join(wrong[:3]) + more,
            fix="name the network that these weights belong to",
        )
    module.load_state_dict(state)


def name_today(name: str) -> str:
    """A parameter's name, where torchvision's files of DenseNets still have one from before: norm.1 is norm1."""
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", name)


def differences(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """What is missing from a state, what it has too much of, and what has another shape, in words."""
    return [
        *(f"{name} is missing" for name in wanted if name not in state),
        *(f"{name} is unknown" for name in state if name not in wanted),
        *(
            f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}"
            for name, value in wanted.items()
            if name in state and state[name].shape != value.shape
        ),
    ]


@torch.no_grad()
def _refuse_size(network: Classifier, image_shape: tuple[int, int, int], name: str) -> None:
    """Try one black image: what sizes a network takes is written nowhere else."""
    network.eval()
    try:
        network(torch.zeros(1, *image_shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(
            f"{name} cannot take images of {image_shape[1]} x {image_shape[2]} px",
            found=(str(error) or type(error).__name__).splitlines()[0],
            fix="set data.resize, to 224 for most networks of torchvision",
        ) from error
    network.train()
