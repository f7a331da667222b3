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
        layer: `penultimate` (the classifier's input) or a module's name; what it puts out, at its last call where it
            is called several times, is flattened to (B, D).
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
        features = self._one_tensor(caught).flatten(1)
        _refuse_non_finite(features, span, f"features of layer {self.layer}")
        _refuse_non_finite(logits, span, "logits")
        return features.float().cpu().numpy(), logits.float().cpu().numpy()

    def _one_tensor(self, caught: list[object]) -> Tensor:
        if caught and isinstance(caught[-1], Tensor):
            return caught[-1]
        raise InputError(
            f"the layer {self.layer!r} gives no features",
            found=f"{type(caught[-1]).__name__}" if caught else "it is not computed in evaluation",
            allowed="a layer that puts out one tensor",
        )


def _find_layer(module: nn.Module, layer: str) -> nn.Module:
    if layer == PENULTIMATE:
        return module.get_submodule("classifier")
    layers = dict(module.named_modules())
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
def _captured(module: nn.Module, *, before: bool) -> Iterator[list[object]]:
    """What goes into (`before`) or comes out of a module at each of its calls; copies, as ReLU may work in place."""
    caught: list[object] = []

    def keep(value: object) -> None:
        caught.append(value.clone() if isinstance(value, Tensor) else value)

    if before:
        handle = module.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: keep(output))
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
