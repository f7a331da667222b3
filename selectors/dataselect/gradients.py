"""Gradients of samples, for selectors that match them: what is asked of them, and how it is computed.

The gradient of the cross-entropy by the last layer is rank one,  g_i = l_i (x) r_i  with  l_i = softmax(z_i) - y_i  and
r_i = (f_i, 1), so that

    <g_i, V> = l_i^T V r_i,    <g_i, g_j> = <l_i, l_j> <r_i, r_j>,    sum_i w_i g_i = L^T diag(w) R,

and the N x C(D + 1) numbers are never formed. Projected gradients, and the mean over several networks, are rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dataselect.space import FeatureSpace
from dataselect.space_config import SpaceConfig
from distill.contracts import Source, Split
from distill.errors import InputError
from distill.selection import class_counts

_BLOCK = 4096  # rows computed at once
_LEVEL = 1e-7  # far above the rounding of float64, far below what tells gradients apart

Against = Literal["train", "valid"]


class GradientConfig(SpaceConfig):
    """A budget, and the space of gradients: of the last layer in closed form (`last_layer`), or projected ones of all
    layers (`gradients`)."""

    unit_gradients: ClassVar[bool] = False  # the sum of gradients is matched, and not that of directions

    features: Literal["last_layer", "gradients"] = "last_layer"


class GradientMatrix(ABC):
    """Gradients of N samples, of which products alone are asked. A direction is what a gradient is: a tensor.

    Args:
        block: rows computed at once.
    """

    def __init__(
        self, count: int, shape: tuple[int, ...], device: torch.device, *, block: int = _BLOCK
    ) -> None:
        self.count = count
        self.shape = shape  # of a direction
        self.device = device
        self.block = block

    def __len__(self) -> int:
        return self.count

    def products(self, direction: Tensor, rows: Tensor | None = None) -> Tensor:
        """<g_i, direction> of every row, or of `rows`, int64 (n,): (n,), computed in the direction's type."""
        count = len(self) if rows is None else len(rows)
        out = torch.empty(count, dtype=direction.dtype, device=self.device)
        for block in self._slices(count):
            out[block] = self._products(block if rows is None else rows[block], direction)
        return out

    @abstractmethod
    def _products(self, rows: slice | Tensor, direction: Tensor) -> Tensor:
        """`products` of few rows."""

    @abstractmethod
    def between(self, rows: Tensor, others: Tensor) -> Tensor:
        """<g_i, g_j> of rows (a,) and others (b,): float64 (a, b)."""

    @abstractmethod
    def combined(self, rows: Tensor, weights: Tensor) -> Tensor:
        """sum_i weights_i g_i over rows (a,): float64."""

    def squares(self) -> Tensor:
        """||g_i||^2 of every row: float32 (N,)."""
        return torch.cat([self._squares(block) for block in self._slices(len(self))])

    @abstractmethod
    def _squares(self, rows: slice) -> Tensor:
        """`squares` of few rows."""

    def total(self) -> Tensor:
        """sum_i g_i: float64."""
        whole = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for block in self._slices(len(self)):
            rows = torch.arange(block.start, block.stop, device=self.device)
            whole += self.combined(rows, torch.ones(len(rows), dtype=torch.float64, device=self.device))
        return whole

    def _slices(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.block):
            yield slice(start, min(start + self.block, count))


class DenseGradients(GradientMatrix):
    """Gradients as rows, float32 (N, P)."""

    def __init__(self, values: Tensor, *, block: int = _BLOCK) -> None:
        super().__init__(len(values), values.shape[1:], values.device, block=block)
        self.values = values

    def _products(self, rows: slice | Tensor, direction: Tensor) -> Tensor:
        return self.values[rows].to(direction.dtype) @ direction

    def _squares(self, rows: slice) -> Tensor:
        return self.values[rows].square().sum(dim=1)

    def between(self, rows: Tensor, others: Tensor) -> Tensor:
        return self.values[rows].double() @ self.values[others].double().T

    def combined(self, rows: Tensor, weights: Tensor) -> Tensor:
        return weights @ self.values[rows].double()


class FactoredGradients(GradientMatrix):
    """Last-layer gradients, the outer products of rows of `left`, float32 (N, C), and `right`, float32 (N, D + 1)."""

    def __init__(self, left: Tensor, right: Tensor, *, block: int = _BLOCK) -> None:
        super().__init__(len(left), (left.shape[1], right.shape[1]), left.device, block=block)
        self.left = left
        self.right = right

    def _products(self, rows: slice | Tensor, direction: Tensor) -> Tensor:
        left, right = (part[rows].to(direction.dtype) for part in (self.left, self.right))
        return ((left @ direction) * right).sum(dim=1)

    def _squares(self, rows: slice) -> Tensor:
        return self.left[rows].square().sum(dim=1) * self.right[rows].square().sum(dim=1)

    def between(self, rows: Tensor, others: Tensor) -> Tensor:
        left, right = (part[rows].double() @ part[others].double().T for part in (self.left, self.right))
        return left * right

    def combined(self, rows: Tensor, weights: Tensor) -> Tensor:
        return (self.left[rows].double() * weights[:, None]).T @ self.right[rows].double()


def gradients_of(space: FeatureSpace, split: Split, samples: np.ndarray) -> GradientMatrix:
    """The gradients of samples of the source's train or validation split, as they are: neither centred nor scaled."""
    if space.factored:
        return FactoredGradients(*space.factors(samples, split=split))
    return DenseGradients(space.raw(samples, split=split))


def matched_split(source: Source, against: Against) -> Split:
    """The split whose gradient is to be matched, or whose loss is to be lowered."""
    return source.train if against == "train" else source.valid


def refuse_without_validation(source: Source, *, per_class: bool) -> None:
    """Raise InputError where there is no validation sample, or with `per_class` none of some class."""
    counts = class_counts(source.valid.labels.numpy(), len(source.classes))
    lacking = [name for name, count in zip(source.classes, counts, strict=True) if not count]
    if not len(source.valid) or (per_class and lacking):
        raise InputError(
            "against: valid needs validation images" + (" of every class" if per_class else ""),
            where="against",
            found="none" if not len(source.valid) else f"none of {', '.join(lacking[:5])}",
            fix="raise data.valid, or set against: train",
        )


def in_levels(values: Tensor, scale: float) -> Tensor:
    """float64 values as whole multiples of 1e-7 of a scale: those of equal gradients are equal, however rounded.

    Args:
        values: of any shape.
        scale: about the largest; 0 where all are 0.
    """
    return (values / (_LEVEL * scale)).round() if scale else torch.zeros_like(values)
