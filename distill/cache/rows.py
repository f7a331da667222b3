"""Arrays of one row a sample, read by blocks: from the tiers, or computed from other such arrays as they are read."""

from __future__ import annotations

import math
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distill.cache.shards import SHARD_ROWS
from distill.cache.tiers import Tiers, read_ahead
from distill.errors import InputError
from distill.training.recording import margins

T = TypeVar("T")


class Rows(ABC):
    """An (N, D) float32 array; N is bounded by the disk, not by memory.

    What is read may be a view of what the cache keeps: copy it before changing it in place.

    Args:
        shape: (N, D).
        device: where what is read lies.
    """

    shape: tuple[int, int]
    device: torch.device

    def __len__(self) -> int:
        return self.shape[0]

    @abstractmethod
    def read(self, rows: slice) -> Tensor:
        """Consecutive rows, (rows, D); limits mean what they mean for a list."""

    @abstractmethod
    def take(self, indices: Tensor | np.ndarray) -> Tensor:
        """A copy of the rows `indices`, int64 in [0, N), in their order: (len(indices), D)."""

    @abstractmethod
    def absent(self) -> Tensor:
        """Numbers of the samples that have no values, as theirs were not finite: int64 (n,), ascending, on the host."""

    def blocks(self, size: int = SHARD_ROWS) -> Iterator[tuple[slice, Tensor]]:
        """Consecutive row ranges of at most `size` rows, and their values (size, D); the next is read ahead."""
        blocks = ((rows, self.read(rows)) for rows in self._slices(size))
        return prefetched(blocks) if self.device.type == "cuda" else blocks

    def _slices(self, size: int) -> Iterator[slice]:
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))

    def _limits(self, rows: slice) -> tuple[int, int]:
        start, stop, step = rows.indices(len(self))
        assert step == 1, "rows are consecutive"
        return start, max(start, stop)


class StoredRows(Rows):
    """Rows in shards.

    Args:
        files: the shards in order.
        shape: (N, D).
        tiers: where shards are kept while they are read.
        holes: numbers of the shards that hold rows of NaN, of samples whose values were not finite.
        filled: whether these rows are read as zeros.
    """

    def __init__(
        self,
        files: tuple[Path, ...],
        shape: tuple[int, int],
        tiers: Tiers,
        *,
        holes: Collection[int] = (),
        filled: bool = True,
    ) -> None:
        self.files = files
        self.shape = shape
        self.tiers = tiers
        self.device = tiers.device
        self.holes = frozenset(holes)
        self.filled = filled

    def unfilled(self) -> StoredRows:
        """The same rows, NaN where they are not finite: what follows from such a row is then NaN too."""
        return StoredRows(self.files, self.shape, self.tiers, holes=self.holes, filled=False)

    def absent(self) -> Tensor:
        found = [torch.empty(0, dtype=torch.int64)]
        for shard in sorted(self.holes):
            rows = self.tiers.get(self.files[shard])[:, 0].isnan().nonzero()[:, 0].cpu()
            found.append(rows + shard * SHARD_ROWS)
        return torch.cat(found)

    def read(self, rows: slice) -> Tensor:
        start, stop = self._limits(rows)
        if start == stop:
            return torch.empty(0, self.shape[1], device=self.device)
        parts = [
            self._shard(shard)[max(start - first, 0) : stop - first]
            for shard in range(start // SHARD_ROWS, -(-stop // SHARD_ROWS))
            for first in (shard * SHARD_ROWS,)
        ]
        moved = [part.to(self.device, non_blocking=True) for part in parts]
        return moved[0] if len(moved) == 1 else torch.cat(moved)

    def take(self, indices: Tensor | np.ndarray) -> Tensor:
        wanted = torch.as_tensor(indices, device="cpu")
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"rows {int(wanted.min())} to {int(wanted.max())} of an array of {len(self)}")
        out = torch.empty(len(wanted), self.shape[1], device=self.device)
        shard_of = wanted // SHARD_ROWS
        for shard in shard_of.unique().tolist():
            places = (shard_of == shard).nonzero()[:, 0]
            values = self._shard(shard)
            local = (wanted[places] - shard * SHARD_ROWS).to(values.device)
            out[places.to(self.device)] = values[local].to(self.device)
        return out

    def blocks(self, size: int = SHARD_ROWS) -> Iterator[tuple[slice, Tensor]]:
        if self.device.type == "cuda":
            yield from super().blocks(size)
            return
        announced = 0
        for rows in self._slices(size):
            ahead = min(rows.stop // SHARD_ROWS + 1, len(self.files) - 1)
            if ahead > announced:
                read_ahead(self.files[ahead])
                announced = ahead
            yield rows, self.read(rows)

    def _shard(self, number: int) -> Tensor:
        values = self.tiers.get(self.files[number])
        return (
            values.masked_fill(values[:, :1].isnan(), 0.0) if self.filled and number in self.holes else values
        )


class ComputedRows(Rows):
    """Rows that follow from other rows and the labels, computed as they are read and kept nowhere.

    Args:
        compute: (labels (B,), one (B, D_i) a source) -> (B, D).
        sources: arrays of N rows.
        labels: int64 (N,).
        width: D.
    """

    def __init__(
        self, compute: Callable[..., Tensor], sources: Sequence[Rows], labels: Tensor, *, width: int
    ) -> None:
        self.compute = compute
        self.sources = tuple(sources)
        self.labels = labels
        self.shape = (len(labels), width)
        self.device = self.sources[0].device

    def absent(self) -> Tensor:
        return _union(self.sources)

    def read(self, rows: slice) -> Tensor:
        start, stop = self._limits(rows)
        block = slice(start, stop)
        labels = self.labels[block].to(self.device)
        return self.compute(labels, *(source.read(block) for source in self.sources))

    def take(self, indices: Tensor | np.ndarray) -> Tensor:
        wanted = torch.as_tensor(indices, device="cpu")
        labels = self.labels[wanted].to(self.device)
        return self.compute(labels, *(source.take(wanted) for source in self.sources))


class HeldRows(Rows):
    """Rows in memory: few numbers a sample, such as scores.

    Args:
        values: (N, D) on the device.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.shape = (values.shape[0], values.shape[1])
        self.device = values.device

    def absent(self) -> Tensor:
        return self.values.isnan().any(dim=1).nonzero()[:, 0].cpu()

    def read(self, rows: slice) -> Tensor:
        start, stop = self._limits(rows)
        return self.values[start:stop]

    def take(self, indices: Tensor | np.ndarray) -> Tensor:
        return self.values[torch.as_tensor(indices, device=self.device)]


class GradientRows(ComputedRows):
    """Gradients of the cross-entropy with respect to the last layer's weights and bias, one row a sample.

    With features f (D), probabilities p (C) and label y, the gradient is the outer product (p - onehot(y)) (f, 1):
    rank one, so inner products never need the flat form:
    <g_i, g_j> = <p_i - y_i, p_j - y_j> * (<f_i, f_j> + 1).

    A sample whose features or logits are NaN has rows of zeros.

    Args:
        features: (N, D), the classifier's input.
        logits: (N, C).
        labels: int64 (N,).
    """

    def __init__(self, features: Rows, logits: Rows, labels: Tensor) -> None:
        self.factor_widths = logits.shape[1], features.shape[1] + 1  # C, D + 1
        super().__init__(_flat_gradients, (features, logits), labels, width=math.prod(self.factor_widths))

    def factors(self, rows: slice | Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
        """softmax(logits) - onehot(label), (rows, C), and (features, 1), (rows, D + 1).

        Args:
            rows: consecutive ones as for `read`, or indices as for `take`.
        """
        if isinstance(rows, slice):
            block = slice(*self._limits(rows))
            labels, parts = self.labels[block], [source.read(block) for source in self.sources]
        else:
            wanted = torch.as_tensor(rows, device="cpu")
            labels, parts = self.labels[wanted], [source.take(wanted) for source in self.sources]
        return _factors(labels.to(self.device), *parts)


class MeanRows(Rows):
    """The mean of several arrays of one shape, such as gradients at several checkpoints.

    Args:
        parts: arrays (N, D).
        normalise: whether every row of every part is first scaled to length 1 (rows of zeros stay so): checkpoints
            with large gradients would otherwise decide alone.
        weights: how much each part counts, such as the learning rate at its checkpoint; None is alike.

    Raises:
        InputError: weights that have no mean.
    """

    def __init__(
        self, parts: Sequence[Rows], *, normalise: bool, weights: Sequence[float] | None = None
    ) -> None:
        shapes = {part.shape for part in parts}
        assert len(shapes) == 1, f"arrays of one shape have a mean, not {shapes}"
        self.parts = tuple(parts)
        self.normalise = normalise
        self.shares = None if weights is None else _shares(weights, len(parts))
        self.shape = parts[0].shape
        self.device = parts[0].device

    def absent(self) -> Tensor:
        return _union(self.parts)

    def read(self, rows: slice) -> Tensor:
        return self._mean([part.read(rows) for part in self.parts])

    def take(self, indices: Tensor | np.ndarray) -> Tensor:
        return self._mean([part.take(indices) for part in self.parts])

    def _mean(self, values: list[Tensor]) -> Tensor:
        if self.normalise:
            values = [F.normalize(each, dim=1) for each in values]
        if self.shares is None:
            return torch.stack(values).mean(dim=0)
        whole = self.shares[0] * values[0]
        for share, each in zip(self.shares[1:], values[1:], strict=True):
            whole.add_(each, alpha=share)
        return whole


def _union(parts: Sequence[Rows]) -> Tensor:
    """The samples that are absent in any of the arrays."""
    return torch.cat([part.absent() for part in parts]).unique()


def _shares(weights: Sequence[float], count: int) -> list[float]:
    """The weights divided by their sum."""
    given = [float(weight) for weight in weights]
    total = math.fsum(given)
    if len(given) == count and all(weight >= 0 for weight in given) and 0 < total < math.inf:
        return [weight / total for weight in given]
    raise InputError(
        "these weights have no mean over the networks",
        where="weights",
        found=", ".join(f"{weight:g}" for weight in given) or "none",
        allowed=f"{count} numbers of at least 0, one of them greater: one a network",
    )


def residuals(labels: Tensor, logits: Tensor) -> Tensor:
    """softmax(logits) - onehot(label): the cross-entropy's gradient by the logits, (B, C)."""
    probabilities = F.softmax(logits, dim=1)
    return probabilities.scatter_add_(1, labels[:, None], -torch.ones_like(probabilities[:, :1]))


def losses(labels: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy of every sample, (B, 1)."""
    return F.cross_entropy(logits, labels, reduction="none")[:, None]


def margin_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """Margins, (B, 1)."""
    return margins(labels, logits)[:, None]


def error_norms(labels: Tensor, logits: Tensor) -> Tensor:
    """EL2N, ||softmax(logits) - onehot(label)||_2, (B, 1).

    Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021, definition 2.2; its expectation over
    initial weights is the mean over networks.
    """
    return residuals(labels, logits).norm(dim=1, keepdim=True)


def _extended(features: Tensor) -> Tensor:
    return torch.cat([features, torch.ones_like(features[:, :1])], dim=1)


def _factors(labels: Tensor, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(logits) - onehot(label), (B, C), and (features, 1), (B, D + 1); zeros for rows of NaN."""
    absent = features[:, :1].isnan() | logits[:, :1].isnan()
    left, right = residuals(labels, logits), _extended(features)
    return left.masked_fill_(absent, 0.0), right.masked_fill_(absent, 0.0)


def _flat_gradients(labels: Tensor, features: Tensor, logits: Tensor) -> Tensor:
    """(B, C * (D + 1))."""
    left, right = _factors(labels, features, logits)
    return (left[:, :, None] * right[:, None, :]).flatten(1)


def prefetched(items: Iterator[T], *, ahead: int = 2) -> Iterator[T]:
    """The items, at most `ahead` of them computed in a thread before they are asked for.

    An error in the thread is raised where the item would have been; the thread ends when the consumer stops.
    """
    slots: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def offer(kind: str, value: T | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                slots.put((kind, value), timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for item in items:
                if not offer("item", item):
                    return
        except BaseException as error:
            offer("error", error)
        else:
            offer("end", None)

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            kind, value = slots.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        stopped.set()
