"""Mean and variance of the inputs of layers, over a split or for each of its classes.

What batch norm would normalise by, and what recovery matches. For channel c of a layer's input x (N, Ch, positions):

    mean_c = E[x_c],  var_c = E[x_c^2] - mean_c^2   (biased, as batch norm normalises), E over samples and positions.

Each sample adds its own mean m and second moment v + m^2 (m and v of its positions in float32, the sums in float64), so
sums of parts of a split add up, and memory does not grow with the split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from distill.cache.quantities import Statistics
from distill.cache.taps import Tap
from distill.errors import InputError

_TYPES: Mapping[str, tuple[type[nn.Module], ...]] = {
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
}


@dataclass(frozen=True)
class Moments:
    """Of one layer's input.

    Args:
        mean, var: float32 (Ch,), or (C, Ch) for each class; 0 for a class without samples.
        count: samples, int64 () or (C,).
    """

    mean: Tensor
    var: Tensor
    count: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Moments by layer name, in the order in which the network defines its layers."""

    layers: Mapping[str, Moments]

    def __getitem__(self, layer: str) -> Moments:
        return self.layers[layer]


@dataclass(frozen=True)
class StatisticsLayout:
    """Where the sums of each layer stand in a row: [samples, means of all layers, second moments of all layers].

    Args:
        names, channels: of the layers.
        classes: C, or 1 where classes are not told apart.
    """

    names: tuple[str, ...]
    channels: tuple[int, ...]
    classes: int

    @classmethod
    def of(cls, module: nn.Module, quantity: Statistics, *, classes: int) -> StatisticsLayout:
        """The layers of a network that the quantity names.

        Raises:
            InputError: there is none; the message lists those there are.
        """
        layers = {
            name: _input_channels(layer)
            for name, layer in module.named_modules()
            if isinstance(layer, _TYPES[quantity.of])
        }
        chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in quantity.layers)]
        if not chosen:
            words = quantity.of.replace("_", " ")
            raise InputError(
                f"the network has no {words} layer of that name"
                if layers
                else f"the network has no {words} layer",
                found=", ".join(quantity.layers),
                allowed=", ".join(layers) or None,
                fix=None if layers else "use a network with norm: batch, or statistics of convolutions",
            )
        return cls(
            tuple(chosen), tuple(layers[name] for name in chosen), classes if quantity.per_class else 1
        )

    @property
    def width(self) -> int:
        """Sums a class."""
        return 1 + 2 * sum(self.channels)

    def taps(self) -> list[Tap]:
        return [Tap(name, "input", _sample_moments) for name in self.names]

    def add(self, sums: Tensor, caught: Sequence[Sequence[Tensor]], labels: Tensor) -> Tensor:
        """Add a block's samples to the sums; which of them were left out because they are not finite, bool (B,).

        Args:
            sums: float64 (classes, width).
            caught: a layer's moments (B, 2, Ch), one entry a call of the layer; the mean of the calls counts.
            labels: int64 (B,).
        """
        moments = [torch.stack(list(calls)).double().mean(dim=0) for calls in caught]  # (B, 2, Ch)
        rows = torch.cat([moment[:, 0] for moment in moments] + [moment[:, 1] for moment in moments], dim=1)
        bad = ~torch.isfinite(rows).all(dim=1)
        counted = torch.cat([torch.ones_like(rows[:, :1]), rows], dim=1)
        counted = torch.where(bad[:, None], 0.0, counted)
        classes = labels if self.classes > 1 else torch.zeros_like(labels)
        # A product instead of index_add_, whose order of additions on a GPU is another each time.
        members = nn.functional.one_hot(classes, self.classes).to(counted.dtype)  # (B, C)
        sums.addmm_(members.T, counted)
        return bad

    def statistics(self, sums: Tensor) -> LayerStatistics:
        """Moments from complete sums, float64 (classes, width)."""
        count = sums[:, :1]
        means, seconds = (sums[:, 1:] / count.clamp(min=1)).chunk(2, dim=1)
        variances = (seconds - means**2).clamp(min=0)
        one = self.classes == 1
        found = {}
        for name, mean, var in zip(
            self.names, means.split(self.channels, 1), variances.split(self.channels, 1), strict=True
        ):
            whole = (mean.float(), var.float(), count[:, 0].long())
            found[name] = Moments(*(part[0] for part in whole)) if one else Moments(*whole)
        return LayerStatistics(found)


def _input_channels(layer: nn.Module) -> int:
    return layer.num_features if hasattr(layer, "num_features") else layer.in_channels  # type: ignore[return-value]


def _sample_moments(x: Tensor) -> Tensor:
    """Mean and second moment of each sample's channels: (B, Ch, ...) -> float64 (B, 2, Ch)."""
    if x.dim() == 2:
        mean, var = x.double(), torch.zeros_like(x, dtype=torch.float64)
    else:
        found = torch.var_mean(x.float(), dim=tuple(range(2, x.dim())), correction=0)
        var, mean = (part.double() for part in found)
    return torch.stack([mean, var + mean**2], dim=1)
