"""Trained networks: what one is, and how the cache keeps it."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.cache.identity import definition_parts, has_weights_file, preprocessing_parts
from distill.contracts import Preprocessing, Progress
from distill.files import disk_errors, remove_stale_partials, write_bytes_atomically
from distill.models import build, digest
from distill.models.torchvision_models import TorchvisionConfig
from distill.training.config import Strict
from distill.training.recording import Dynamics

_DYNAMICS = tuple(each.name for each in fields(Dynamics))


@dataclass(frozen=True, eq=False)
class Network:
    """A trained network and how images must be prepared for it.

    Args:
        model: its configuration.
        image_shape: (Ch, H, W).
        classes: C.
        preprocessing: what it was trained behind.
        state: name -> tensor, on the host.
        facts: JSON-able: how it was trained, its seconds and peak memory.
        dynamics: how the samples it was trained on fared, None where that was not recorded.
        kept: its weights after earlier epochs, by epoch.
    """

    model: Strict
    image_shape: tuple[int, int, int]
    classes: int
    preprocessing: Preprocessing
    state: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    dynamics: Dynamics | None = None
    kept: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """What a network is, without what follows from it and was computed meanwhile."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def checkpoints(self) -> list[Network]:
        """The network after each of the epochs that were kept, the earliest first."""
        return [replace(self, state=self.kept[epoch], dynamics=None, kept={}) for epoch in sorted(self.kept)]

    def module(self, device: torch.device) -> nn.Module:
        """The network in evaluation mode, frozen."""
        module = definition(self.model, image_shape=self.image_shape, classes=self.classes)
        module.load_state_dict(dict(self.state))
        module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.eval().requires_grad_(False)

    @cached_property
    def outline(self) -> nn.Module:
        """Its layers, and the names and shapes of its parameters; without memory for them."""
        return definition(self.model, image_shape=self.image_shape, classes=self.classes).to("meta")

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides its outputs: definition, weights and preprocessing; JSON-able."""
        return {
            "model": definition_parts(self.model),
            "classes": self.classes,
            "weights": digest(self.module(torch.device("cpu"))),
            **preprocessing_parts(self.preprocessing),
        }


def definition(model: Strict, *, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network of a configuration with any weights; the file that its own would come from is not needed."""
    weighted = False
    if isinstance(model, TorchvisionConfig):
        weighted = has_weights_file(model)
        model = model.model_copy(update={"weights": None, "sha256": None})
    module = build(model, image_shape=image_shape, classes=classes, seed=0)
    for part in module.modules():
        if hasattr(part, "transform_input"):  # not in the state; true where weights were loaded, as built
            part.transform_input = weighted  # type: ignore[assignment]
    return module


def save_network(folder: Path, key: str, network: Network) -> None:
    """Keep the weights and facts as FOLDER/KEY.SHA256.npz, in one move; an earlier network of that key goes."""
    arrays = {f"state/{name}": value.numpy() for name, value in network.state.items()}
    for epoch, state in network.kept.items():
        arrays |= {f"epoch-{epoch}/{name}": value.numpy() for name, value in state.items()}
    if network.dynamics is not None:
        arrays |= {f"dynamics/{name}": getattr(network.dynamics, name).numpy() for name in _DYNAMICS}
    facts = np.frombuffer(json.dumps(dict(network.facts), sort_keys=True).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, facts=facts, **arrays)  # type: ignore[arg-type]
    data = buffer.getvalue()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}.{hashlib.sha256(data).hexdigest()}.npz"
    write_bytes_atomically(path, data)
    for other in folder.glob(f"{key}.*.npz"):
        if other != path:
            with disk_errors(other):
                other.unlink(missing_ok=True)


def load_network(
    folder: Path,
    key: str,
    *,
    model: Strict,
    image_shape: tuple[int, int, int],
    classes: int,
    preprocessing: Preprocessing,
    progress: Progress,
) -> Network | None:
    """The network kept under `key`, None where there is none or its file is damaged (with a warning)."""
    remove_stale_partials(folder)
    for path in sorted(folder.glob(f"{key}.*.npz")):
        data = _read(path)
        if data is None:
            continue  # another run has put a newer one in its place
        if hashlib.sha256(data).hexdigest() != path.name.split(".")[1]:
            with disk_errors(path):
                path.unlink(missing_ok=True)
            progress.warn(f"{path} is damaged and will be trained again")
            continue
        with suppress(OSError):  # another run may have removed it
            os.utime(path)  # it was used now
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            groups = _grouped(file)
            facts = json.loads(file["facts"].tobytes())
        dynamics = Dynamics(**groups["dynamics"]) if "dynamics" in groups else None
        kept = {
            int(group.removeprefix("epoch-")): state
            for group, state in groups.items()
            if group.startswith("epoch-")
        }
        return Network(
            model, image_shape, classes, preprocessing, groups["state"], facts, dynamics=dynamics, kept=kept
        )
    return None


def _read(path: Path) -> bytes | None:
    with disk_errors(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None


def read_facts(path: Path) -> dict[str, Any]:
    """What a network's file says of it, without its weights."""
    with np.load(path, allow_pickle=False) as file:
        facts: dict[str, Any] = json.loads(file["facts"].tobytes())
    return facts


def _grouped(file: Any) -> dict[str, dict[str, Tensor]]:
    """The arrays of a network's file named GROUP/NAME: by group, then by name."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name in file.files:
        group, _, rest = name.partition("/")
        if rest:
            groups.setdefault(group, {})[rest] = torch.from_numpy(file[name])
    return groups
