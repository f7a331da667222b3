"""One pass over a split that yields everything a network's forward knows: features of a layer, and logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from distill.cache.networks import Network
from distill.contracts import Split
from distill.errors import InputError, NonFiniteError
from distill.registry import nearest
from distill.training.batches import DeviceImages
from distill.training.job import Pool

PENULTIMATE = "penultimate"
FORWARD_ROWS = 256  # images a forward pass: enough to fill a device, and a divisor of a shard


class Forward:
    """A network's forward pass over blocks of a split.

    Args:
        network: whose outputs are asked for.
        layer: `penultimate` (the classifier's input) or a module's name; its output is flattened to (B, D).
        device: where it runs, in float32.
    """

    def __init__(self, network: Network, *, layer: str, device: torch.device) -> None:
        self.network = network
        self.module = network.module(device)
        self.layer = layer
        self.device = device
        self._hooked = _find_layer(self.module, layer)

    def rows(self, split: Split, span: range) -> tuple[np.ndarray, np.ndarray]:
        """Features float32 (len(span), D) and logits float32 (len(span), C) of the samples `span`."""
        parts = [
            self._block(split, range(start, min(start + FORWARD_ROWS, span.stop)))
            for start in range(span.start, span.stop, FORWARD_ROWS)
        ]
        features, logits = (np.concatenate([part[which] for part in parts]) for which in (0, 1))
        return features, logits

    @torch.no_grad()
    def _block(self, split: Split, span: range) -> tuple[np.ndarray, np.ndarray]:
        rows = slice(span.start, span.stop)
        pool = Pool(split.images[rows], split.labels[rows], self.network.preprocessing)
        images = DeviceImages(pool, self.device).gather(torch.arange(len(span), device=self.device))
        with _captured(self._hooked, before=self.layer == PENULTIMATE) as caught:
            logits = self.module(images)
        features = caught[0].flatten(1)
        _refuse_non_finite(features, span, f"features of layer {self.layer}")
        _refuse_non_finite(logits, span, "logits")
        return features.float().cpu().numpy(), logits.float().cpu().numpy()


def _find_layer(module: nn.Module, layer: str) -> nn.Module:
    layers = dict(module.named_modules())
    if layer == PENULTIMATE:
        return [child for child in layers.values() if isinstance(child, nn.Linear)][-1]
    if layer not in layers or layer == "":
        names = [name for name in layers if name]
        close = nearest(layer, names)
        raise InputError(
            f"the network has no layer {layer!r}",
            allowed=", ".join([PENULTIMATE, *names]),
            fix=f"did you mean {close!r}?" if close else None,
        )
    return layers[layer]


@contextmanager
def _captured(module: nn.Module, *, before: bool) -> Iterator[list[Tensor]]:
    """What goes into (`before`) or comes out of a module during one forward pass."""
    caught: list[Tensor] = []
    if before:
        handle = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


def _refuse_non_finite(values: Tensor, span: range, what: str) -> None:
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1)
    if bool(bad.any()):
        first = span.start + int(bad.nonzero()[0])
        raise NonFiniteError(
            f"{int(bad.sum())} of {len(span)} {what} are NaN or infinite, the first at sample {first}",
            fix="check the network's training (a lower lr), and the image's pixels",
        )
