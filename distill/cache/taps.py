"""What is read from inside a network while it computes: a layer's input or output, reduced where it appears."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distill.errors import InputError
from distill.registry import nearest

PENULTIMATE = "penultimate"


@dataclass(frozen=True)
class Tap:
    """One place in a network.

    Args:
        layer: a module's name.
        side: whether its input or its output is read.
        reduce: (B, ...) -> (B, ...), called at once: memory then holds what it returns and not the layer's values.
    """

    layer: str
    side: Literal["input", "output"]
    reduce: Callable[[Tensor], Tensor]


@contextmanager
def listening(module: nn.Module, taps: Sequence[Tap]) -> Iterator[dict[Tap, list[Tensor]]]:
    """While open, every call of a tapped layer appends what `reduce` made of it, in the order of the calls."""
    caught: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(_hook(module.get_submodule(tap.layer), tap, caught[tap]).remove)
        yield caught


def _hook(layer: nn.Module, tap: Tap, caught: list[Tensor]) -> Any:
    def keep(value: object) -> None:
        if not isinstance(value, Tensor):
            raise InputError(
                f"the layer {tap.layer!r} gives no features",
                found=type(value).__name__,
                allowed="a layer that takes and puts out one tensor",
            )
        with torch.no_grad():
            caught.append(tap.reduce(value))

    if tap.side == "input":
        return layer.register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
    return layer.register_forward_hook(lambda _, __, output: keep(output))


def feature_tap(module: nn.Module, layer: str) -> Tap:
    """Where features of that name are read: flattened to float32 (B, D).

    Args:
        module: the network.
        layer: `penultimate` (the classifier's input) or a module's name, whose output is meant.

    Raises:
        InputError: no such layer; the message lists those there are.
    """
    if layer == PENULTIMATE:
        return Tap("classifier", "input", _flattened)
    names = [name for name, _ in module.named_modules() if name]
    if layer not in names:
        close = nearest(layer, names)
        raise InputError(
            f"the network has no layer {layer!r}",
            allowed=", ".join([PENULTIMATE, *names]),
            fix=f"did you mean {close!r}?" if close else None,
        )
    return Tap(layer, "output", _flattened)


def _flattened(values: Tensor) -> Tensor:
    """A copy: what follows the layer, such as ReLU, may work in place."""
    return values.detach().flatten(1).to(torch.float32, copy=True)
