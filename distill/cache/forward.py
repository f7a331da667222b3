"""One pass over a range of a split that yields everything asked for of a network.

Blocks of 256 images go forward once. Features and statistics are read where they appear (distill/cache/taps.py);
per-sample gradients use the same forward pass where they can (distill/cache/per_sample.py). What a quantity's values
are does not depend on what else is asked for beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.cache import critical_maps
from distill.cache.gradient_request import selected
from distill.cache.networks import Network
from distill.cache.per_sample import GradientPass
from distill.cache.quantities import (
    CriticalMaps,
    Features,
    GradientNorms,
    Gradients,
    Logits,
    Quantity,
    Statistics,
    Stored,
)
from distill.cache.rows import prefetched
from distill.cache.statistics import StatisticsLayout
from distill.cache.taps import Tap, feature_tap, listening
from distill.contracts import Split
from distill.errors import InputError, NonFiniteError
from distill.models import describe
from distill.training.batches import DeviceImages
from distill.training.job import Pool

FORWARD_ROWS = 256  # images a forward pass: enough to fill a device, and a divisor of a shard


@dataclass(frozen=True)
class Part:
    """One quantity over a range of samples, on the device.

    Args:
        values: float32 (rows, D); for statistics the sums over the range, float64 (classes, width).
        bad: bool (rows,), samples whose values are not finite.
    """

    values: Tensor
    bad: Tensor


def exact_convolutions() -> AbstractContextManager[None]:
    """Convolutions in float32, the same bits again: by default a GPU rounds their inputs to 10 bits."""
    flags: AbstractContextManager[None] = torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    )
    return flags


def _nothing() -> None:
    """Nobody waits for the last block."""


def resolved(quantity: Quantity, module: nn.Module) -> Quantity:
    """The quantity with the names that its patterns mean in a network, ("*",) where that is all; nothing is computed.

    Raises:
        InputError: the network has no such layer or parameter.
    """
    if isinstance(quantity, Features):
        feature_tap(module, quantity.layer)
    elif isinstance(quantity, Statistics):
        every, chosen = (
            StatisticsLayout.of(module, each, classes=1).names
            for each in (replace(quantity, layers=("*",)), quantity)
        )
        return replace(quantity, layers=_short(chosen, every))
    elif isinstance(quantity, Gradients | GradientNorms):
        parameters = [name for name, _ in module.named_parameters()]
        return replace(quantity, layers=_short(selected(parameters, quantity.layers), parameters))
    return quantity


def _short(chosen: Sequence[str], every: Sequence[str]) -> tuple[str, ...]:
    return ("*",) if len(chosen) == len(every) else tuple(chosen)


class Forward:
    """A network's pass over ranges of a split.

    Args:
        network: whose outputs are asked for.
        quantities: what is asked for.
        device: where it runs, in float32.
        work_bytes: memory that per-sample gradients may take beside the pass itself.

    Raises:
        InputError: the network has no such layer.
    """

    def __init__(
        self,
        network: Network,
        quantities: Collection[Stored | Statistics],
        *,
        device: torch.device,
        work_bytes: int,
    ) -> None:
        self.network = network
        self.device = device
        self.module = network.module(device)
        self.quantities = tuple(quantities)
        self.features = {
            quantity: feature_tap(self.module, quantity.layer)
            for quantity in self.quantities
            if isinstance(quantity, Features)
        }
        self.layouts = {
            quantity: StatisticsLayout.of(self.module, quantity, classes=network.classes)
            for quantity in self.quantities
            if isinstance(quantity, Statistics)
        }
        self._layer_taps = {quantity: layout.taps() for quantity, layout in self.layouts.items()}
        taps = [*self.features.values(), *(tap for taps in self._layer_taps.values() for tap in taps)]
        self._taps = list(dict.fromkeys(taps))
        self._gradients = {
            quantity: quantity.request
            for quantity in self.quantities
            if isinstance(quantity, Gradients | GradientNorms)
        }
        requests = tuple(dict.fromkeys(self._gradients.values()))
        self._gradient_pass = (
            GradientPass(self.module, requests, image_shape=network.image_shape, work_bytes=work_bytes)
            if requests
            else None
        )
        self._map_pass: critical_maps.MapPass | None = None
        if CriticalMaps() in self.quantities:
            name = describe(network.model)
            layer = critical_maps.map_layer(self.module, network.image_shape, name=name)
            self._map_pass = critical_maps.MapPass(self.module, layer)

    def over(
        self, split: Split, span: range, *, before_last: Callable[[], None] = _nothing
    ) -> dict[Stored | Statistics, Part]:
        """Every quantity over the samples `span`. Nothing here waits for a GPU.

        `before_last` is called before the last block is computed.
        """
        parts: dict[Stored | Statistics, list[Part]] = {quantity: [] for quantity in self.quantities}
        sums = {
            quantity: torch.zeros(layout.classes, layout.width, dtype=torch.float64, device=self.device)
            for quantity, layout in self.layouts.items()
        }
        blocks = -(-len(span) // FORWARD_ROWS)
        for number, (images, labels) in enumerate(self._blocks(split, span), start=1):
            if number == blocks:
                before_last()
            for quantity, part in self._block(images, labels, sums).items():
                parts[quantity].append(part)
        return {quantity: self._joined(quantity, found) for quantity, found in parts.items()}

    def _blocks(self, split: Split, span: range) -> Iterator[tuple[Tensor, Tensor]]:
        """Images as the network takes them, and labels, on the device."""
        blocks = (
            self._load(split, slice(start, min(start + FORWARD_ROWS, span.stop)))
            for start in range(span.start, span.stop, FORWARD_ROWS)
        )
        return prefetched(blocks) if self.device.type == "cuda" else blocks

    def _load(self, split: Split, rows: slice) -> tuple[Tensor, Tensor]:
        pool = Pool(split.images[rows], split.labels[rows], self.network.preprocessing)
        images = DeviceImages(pool, self.device)
        return next(images.blocks(FORWARD_ROWS)), pool.targets.to(self.device)

    def _block(
        self, images: Tensor, labels: Tensor, sums: dict[Statistics, Tensor]
    ) -> dict[Stored | Statistics, Part]:
        """Every quantity over a block; statistics are added to `sums`, which their parts share."""
        with exact_convolutions():
            logits, caught, of_samples = self._compute(images, labels)
        found: dict[Stored | Statistics, Part] = {}
        for quantity in self.quantities:
            if isinstance(quantity, Statistics):
                moments = [caught[tap] for tap in self._layer_taps[quantity]]
                bad = self.layouts[quantity].add(sums[quantity], moments, labels)
                found[quantity] = Part(sums[quantity], bad)
                continue
            if isinstance(quantity, Features):
                values = _last(caught[self.features[quantity]], quantity.layer)
            elif isinstance(quantity, Logits):
                values = logits.float()
            else:
                values = of_samples[quantity]
            found[quantity] = Part(values, ~torch.isfinite(values).all(dim=1))
        return found

    def _compute(
        self, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[Tap, list[Tensor]], dict[Stored, Tensor]]:
        """Logits (B, C), what the taps caught, and gradients (B, k), their norms (B, 1) and maps (B, h * w)."""
        gradients: dict = {}
        maps: Tensor | None = None
        with listening(self.module, self._taps) as caught:
            if self._gradient_pass is not None and self._gradient_pass.shares_forward:
                logits, gradients = self._gradient_pass.run(images, labels)
            elif self._map_pass is not None:
                logits, maps = self._map_pass.run(images, labels)
            else:
                with torch.no_grad():
                    logits = self.module(images)
        if self._gradient_pass is not None and not self._gradient_pass.shares_forward:
            _, gradients = self._gradient_pass.run(images, labels)
        if self._map_pass is not None and maps is None:
            _, maps = self._map_pass.run(images, labels)
        assert logits is not None
        found: dict[Stored, Tensor] = {
            quantity: gradients[request].reshape(len(images), -1)
            for quantity, request in self._gradients.items()
        }
        if maps is not None:
            found[CriticalMaps()] = maps.flatten(1)
        return logits.detach(), caught, found

    def _joined(self, quantity: Stored | Statistics, parts: list[Part]) -> Part:
        bad = torch.cat([part.bad for part in parts])
        values = [part.values for part in parts]
        whole = values[-1] if isinstance(quantity, Statistics) else torch.cat(values)
        return Part(whole, bad)


def logits_of(network: Network, split: Split, *, device: torch.device) -> Tensor:
    """A network's logits on images that no cache knows, float32 (N, C).

    Raises:
        NonFiniteError: any of them is NaN or infinite.
    """
    part = Forward(network, [Logits()], device=device, work_bytes=0).over(split, range(len(split)))[Logits()]
    if bool(part.bad.any()):
        raise NonFiniteError(
            f"{int(part.bad.sum())} of {len(split)} images gave NaN or infinite logits",
            fix="check the network's training (a lower lr), and the images' pixels",
        )
    return part.values


def _last(calls: list[Tensor], layer: str) -> Tensor:
    """What the layer put out at its last call."""
    if not calls:
        raise InputError(f"the layer {layer!r} gives no features", found="it is not computed in evaluation")
    return calls[-1]
