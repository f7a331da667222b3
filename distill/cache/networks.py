"""Trained networks: what one is, and how the cache keeps it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.cache.shards import is_whole
from distill.contracts import Preprocessing, Progress
from distill.files import disk_errors, remove_stale_partials, write_bytes_atomically
from distill.models import build, digest
from distill.training.config import Strict


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
    """

    model: Strict
    image_shape: tuple[int, int, int]
    classes: int
    preprocessing: Preprocessing
    state: Mapping[str, Tensor]
    facts: Mapping[str, Any]

    def module(self, device: torch.device) -> nn.Module:
        """The network in evaluation mode, frozen."""
        module = build(self.model, image_shape=self.image_shape, classes=self.classes, seed=0)
        module.load_state_dict(dict(self.state))
        module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return module.eval().requires_grad_(False)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides its outputs: definition, weights and preprocessing; JSON-able."""
        pre = self.preprocessing
        return {
            "weights": digest(self.module(torch.device("cpu"))),
            "mean": list(pre.mean),
            "std": list(pre.std),
            "zca": None if pre.zca is None else _array_digest(pre.zca),
            "zca_mean": None if pre.zca_mean is None else _array_digest(pre.zca_mean),
        }


def _array_digest(values: np.ndarray) -> str:
    """sha256 (hex) over type, shape and values."""
    head = f"{values.dtype.str} {values.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()


def save_network(folder: Path, key: str, network: Network) -> None:
    """Keep the weights and facts as FOLDER/KEY.SHA256.npz, in one move."""
    arrays = {f"state/{name}": value.numpy() for name, value in network.state.items()}
    facts = np.frombuffer(json.dumps(dict(network.facts), sort_keys=True).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, facts=facts, **arrays)  # type: ignore[arg-type]
    data = buffer.getvalue()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(folder / f"{key}.{hashlib.sha256(data).hexdigest()}.npz", data)


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
        if not is_whole(path, path.name.split(".")[1]):
            progress.warn(f"{path} is damaged and will be trained again")
            continue
        with np.load(path, allow_pickle=False) as file:
            state = {
                name.removeprefix("state/"): torch.from_numpy(file[name])
                for name in file.files
                if name.startswith("state/")
            }
            facts = json.loads(file["facts"].tobytes())
        return Network(model, image_shape, classes, preprocessing, state, facts)
    return None
