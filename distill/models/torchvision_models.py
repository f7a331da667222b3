"""Any torchvision classifier as `torchvision/NAME`, with weights from a local file.

The network's last linear layer becomes the classifier and what goes into it the features. Without weights that
layer is made for the data's classes; with weights the class counts must agree.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from distill.errors import DamagedDataError, InputError, missing_extra
from distill.registry import nearest
from distill.training.config import Strict

PREFIX = "torchvision/"


class TorchvisionConfig(Strict):
    """Options of `torchvision/NAME`.

    `weights` is a safetensors file or a state dict (loaded with weights_only), checked against `sha256` where given.
    Without it, weights are random.
    """

    name: Annotated[str, Field(pattern=f"^{PREFIX}.+")]
    weights: str | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    def build(self, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
        """The network, with the file's weights where one is named."""
        if image_shape[0] != 3:
            raise InputError(
                f"{self.name} takes RGB images",
                found=f"{image_shape[0]} channel",
                allowed="3 channels",
                fix="set data.channels to rgb",
            )
        state = None if self.weights is None else load_state(Path(self.weights), self.sha256)
        network = TorchvisionClassifier(_make(self.name), classes, keep_classifier=state is not None)
        if state is not None:
            _load(network, state, classes, where=str(self.weights))
        return network

    def describe(self) -> str:
        return self.name if self.weights is None else f"{self.name} ({Path(self.weights).name})"


class TorchvisionClassifier(nn.Module):
    """A torchvision network whose last linear layer is `classifier`.

    Args:
        network: the whole network.
        classes: C.
        keep_classifier: whether the last layer stays as it is, for weights to be loaded into.
    """

    def __init__(self, network: nn.Module, classes: int, *, keep_classifier: bool) -> None:
        super().__init__()
        path = _last_linear(network)
        parent = network.get_submodule(path.rpartition(".")[0])
        last = getattr(parent, path.rpartition(".")[2])
        if not keep_classifier:
            last = nn.Linear(last.in_features, classes, bias=last.bias is not None)
        setattr(parent, path.rpartition(".")[2], nn.Identity())
        self.body = network
        self.classifier = last
        self.path = path

    def features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        y = self.body(x)
        # Networks with auxiliary heads return them beside the logits while training.
        return y if isinstance(y, Tensor) else y[0]

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C)."""
        return self.classifier(self.features(x))


def _make(name: str) -> nn.Module:
    import torchvision

    known = torchvision.models.list_models(module=torchvision.models)
    short = name.removeprefix(PREFIX)
    if short not in known:
        close = nearest(short, known)
        raise InputError(
            f"torchvision has no classifier {short!r}",
            found=name,
            allowed="a name in torchvision.models.list_models(module=torchvision.models)",
            fix=f"did you mean {PREFIX + close!r}?" if close else None,
        )
    # Some networks would otherwise draw their weights with SciPy, slowly, and warn.
    options = {"init_weights": True} if short in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(short, weights=None, **options)


def _last_linear(network: nn.Module) -> str:
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise InputError(
            f"{type(network).__name__} ends in no linear layer, so it has no features to speak of",
            fix="use another network",
        )
    return names[-1]


def load_state(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a state dict, which is never unpickled beyond tensors.

    Raises:
        InputError: no such file, or not a mapping of tensors.
        DamagedDataError: another sha256 than asked for.
    """
    if not path.is_file():
        raise InputError("there is no such weights file", where=str(path), fix="correct weights")
    if sha256 is not None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != sha256:
            raise DamagedDataError(
                "the weights have another sha256 than the recipe says",
                where=str(path),
                found=found,
                allowed=sha256,
                fix="get the file again, or correct sha256 if you trust this file",
            )
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            "the weights file holds no state dict", where=str(path), allowed="a mapping from names to tensors"
        )
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise missing_extra("safetensors", "weights", purpose=f"reading {path.name}") from None
    try:
        return load_file(path)
    except Exception as error:  # its errors share no base class
        raise DamagedDataError("not a safetensors file", where=str(path), found=str(error)) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises what it likes
        raise DamagedDataError(
            "not a state dict that can be loaded with weights_only",
            where=str(path),
            found=str(error).splitlines()[0],
            fix="save the network's state_dict() anew, best as safetensors",
        ) from error


def _load(network: TorchvisionClassifier, state: dict[str, Tensor], classes: int, *, where: str) -> None:
    path = network.path
    state = {
        name.replace(path, "classifier", 1) if name.startswith(path + ".") else f"body.{name}": value
        for name, value in state.items()
    }
    weight = state.get("classifier.weight")
    if weight is not None and len(weight) != classes:
        raise InputError(
            "the weights are for another number of classes",
            where=where,
            found=f"{len(weight)} classes",
            allowed=f"{classes}, the data's",
            fix="use weights trained on these classes, or leave weights out",
        )
    wanted = network.state_dict()
    wrong = sorted(set(wanted) ^ set(state)) + sorted(
        name for name in set(wanted) & set(state) if wanted[name].shape != state[name].shape
    )
    if wrong:
        raise InputError(
            "the weights are for another network",
            where=where,
            found=f"{len(wrong)} names or shapes differ, such as {', '.join(wrong[:3])}",
            fix="name the network that these weights belong to",
        )
    network.load_state_dict(state)
