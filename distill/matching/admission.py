"""What cannot be matched: networks that are more than their weights, and experts that stand still."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distill.cache.networks import definition
from distill.cache.trajectories import Layout, Trajectories
from distill.errors import InputError
from distill.models import describe
from distill.training.config import Strict

_ROUNDING = 1e-6  # of the weights' norm: a few roundings of float32


def refuse_network(model: Strict, *, image_shape: tuple[int, int, int], classes: int) -> None:
    """Refuse what a trajectory of weights cannot tell, before anything is trained; no weights are drawn or read.

    Args:
        model: of the experts.
        image_shape: (Ch, H, W).
        classes: C.

    Raises:
        InputError: images that the network cannot take, running statistics, or a forward pass that draws.
    """
    with torch.device("meta"):
        module = definition(model, image_shape=image_shape, classes=classes)
    Layout.of(module, (0,))
    if drawn := _drawn(module, image_shape):
        raise InputError(
            "the network draws as it trains: experts would train with it, and students, which repeat their steps, not",
            found=f"{describe(model)}, which calls {', '.join(drawn)}",
            allowed="networks without dropout and stochastic depth",
            fix="use another network, such as convnet",
        )


def _drawn(module: nn.Module, image_shape: tuple[int, int, int]) -> list[str]:
    """Operations of a training pass that take from a random generator."""
    draws = _Draws()
    with torch.no_grad(), draws:
        module.train()(torch.empty(2, *image_shape, device="meta"))
    return sorted(draws.found)


class _Draws(TorchDispatchMode):
    """Notes the names of operations that draw."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def refuse_still(experts: Trajectories, *, starts: range, epochs: int) -> None:
    """Refuse experts whose weights do not change where they are to be followed: every loss would be 0 / 0.

    Args:
        experts: of which the first is looked at; the others train alike.
        starts: epochs that students may start after.
        epochs: how many epochs later they are to arrive.

    Raises:
        InputError: the weights change by no more than rounding.
    """
    for start in starts:
        before, after = experts.after(0, start), experts.after(0, start + epochs)
        moved = float((after - before).norm() / before.norm())
        if not moved > _ROUNDING:
            raise InputError(
                f"experts did not move between epochs {start} and {start + epochs}",
                where="trajectory.experts.lr",
                found=f"weights that changed by {moved:.2g} of their norm",
                allowed=f"more than {_ROUNDING:g}, which is rounding",
                fix="raise experts.lr" + (", or lower start_epochs.last" if start else ""),
            )
