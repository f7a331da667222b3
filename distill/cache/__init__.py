"""The cache: what networks say about the source, computed once for all steps of a run and for later runs.

Rows are identified by everything that decides them (`distill.cache.identity`), stored in checksummed shards
(`distill.cache.shards`) and read by blocks. One forward pass answers features and logits together; last-layer
gradients are a closed form of the two and are never stored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.cache.forward import PENULTIMATE, Forward
from distill.cache.identity import cache_key
from distill.cache.networks import Network
from distill.cache.shards import SHARD_ROWS, Rows, ShardFolder
from distill.contracts import Progress, Split
from distill.errors import InputError
from distill.files import disk_errors, write_bytes_atomically
from distill.training.memory import memory_errors

__all__ = ["PENULTIMATE", "Answers", "Cache", "GradientRows", "Network", "Rows", "default_folder"]

FORMAT = 1
_MARKER = "distill-cache.json"


def default_folder() -> Path:
    """DISTILL_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("DISTILL_CACHE"):
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "distill"


@dataclass(frozen=True)
class GradientRows:
    """Gradients of the cross-entropy with respect to the last layer's weights and bias, one row a sample.

    With features f (D), probabilities p (C) and label y, the gradient is the outer product (p - onehot(y)) (f, 1):
    rank one, so inner products never need the flat form:
    <g_i, g_j> = <p_i - y_i, p_j - y_j> * (<f_i, f_j> + 1).

    Args:
        features: (N, D).
        logits: (N, C).
        labels: int64 (N,).
    """

    features: Rows
    logits: Rows
    labels: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C * (D + 1))."""
        return len(self.features), self.logits.shape[1] * (self.features.shape[1] + 1)

    def residuals(self, rows: slice) -> np.ndarray:
        """softmax(logits) - onehot(label), float32 (rows, C)."""
        logits = self.logits.read(rows)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        residual = shifted / shifted.sum(axis=1, keepdims=True)
        residual[np.arange(len(residual)), self.labels[rows]] -= 1
        return residual

    def blocks(self, size: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Flat gradients by blocks of at most `size` rows: float32 (size, C * (D + 1))."""
        for rows, features in self.features.blocks(size):
            extended = np.concatenate([features, np.ones_like(features[:, :1])], axis=1)
            flat = self.residuals(rows)[:, :, None] * extended[:, None, :]
            yield rows, flat.reshape(len(features), -1)


@dataclass(frozen=True)
class Answers:
    """What one forward pass over a split knows."""

    features: Rows
    logits: Rows


class Cache:
    """Features, logits, gradients and trained networks, kept in one folder.

    Args:
        folder: created if absent; refused if it holds anything else than a cache of this format.
        device: where forward passes run.
        progress: where passes and repairs are told.
    """

    def __init__(self, folder: Path, *, device: torch.device, progress: Progress) -> None:
        self.folder = folder
        self.device = device
        self.progress = progress
        self.images_forwarded = 0
        self.hits = 0
        _claim(folder)

    @property
    def networks_folder(self) -> Path:
        return self.folder / "networks"

    def features(self, split: Split, network: Network, *, layer: str = PENULTIMATE) -> Rows:
        """Outputs of `layer` for every sample, flattened: float32 (N, D)."""
        return self.request(split, network, layer=layer).features

    def logits(self, split: Split, network: Network) -> Rows:
        """float32 (N, C)."""
        return self.request(split, network).logits

    def gradients(self, split: Split, network: Network) -> GradientRows:
        """Last-layer gradients of every sample's cross-entropy."""
        answers = self.request(split, network)
        return GradientRows(answers.features, answers.logits, split.labels.numpy())

    def request(self, split: Split, network: Network, *, layer: str = PENULTIMATE) -> Answers:
        """Features of `layer` and logits, by one pass over the samples that are not on disk yet."""
        folders = {kind: self._shards(kind, split, network, layer) for kind in ("features", "logits")}
        present = {kind: folder.present() for kind, folder in folders.items()}
        spans = folders["features"].ranges
        missing = [span for span in spans if any(span not in shards for shards in present.values())]
        if missing:
            forward = Forward(network, layer=layer, device=self.device)
            total = sum(len(span) for span in missing)
            with (
                memory_errors("computing features", fix="use a smaller network"),
                self.progress.task(f"features and logits, {layer}", total=total, unit="image") as task,
            ):
                for span in missing:
                    values = dict(zip(("features", "logits"), forward.rows(split, span), strict=True))
                    for kind, folder in folders.items():
                        if span not in present[kind]:
                            present[kind][span] = folder.write(span, values[kind])
                    self.images_forwarded += len(span)
                    task.advance(len(span))
        else:
            self.hits += 1
        return Answers(**{kind: folder.open(present[kind]) for kind, folder in folders.items()})

    def _shards(self, kind: str, split: Split, network: Network, layer: str) -> ShardFolder:
        parts: Mapping[str, Any] = {
            "data": split.fingerprint,
            "rows": len(split),
            "shard_rows": SHARD_ROWS,
            "network": network.identity,
            # Logits do not depend on the layer whose features are asked for beside them.
            "layer": layer if kind == "features" else "logits",
            "dtype": "float32",
        }
        folder = ShardFolder(
            self.folder / "rows" / cache_key(kind, parts), rows=len(split), progress=self.progress
        )
        folder.describe(parts)
        return folder


def _claim(folder: Path) -> None:
    """Make the folder a cache, or refuse it: nothing that is not ours is written to or deleted."""
    marker = folder / _MARKER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # In this order: another process that claims the folder now puts the marker down before anything else.
        filled = any(not entry.name.startswith(".") for entry in folder.iterdir())
        foreign = filled and not marker.exists()
    if foreign:
        raise InputError(
            "the folder holds other files and is no cache",
            where=str(folder),
            allowed="an empty or absent folder, or an earlier cache",
            fix="set cache.folder, or the environment variable DISTILL_CACHE, to another folder",
        )
    if not marker.exists():
        write_bytes_atomically(marker, json.dumps({"format": FORMAT}).encode())
    try:
        found = json.loads(marker.read_text())["format"]
    except (ValueError, KeyError, TypeError):
        found = None
    if found != FORMAT:
        raise InputError(
            "the cache has another format",
            where=str(marker),
            found=str(found),
            allowed=str(FORMAT),
            fix="name another folder in cache.folder, or remove this one yourself",
        )
