"""What a forward pass costs, found without computing it: operations, activations, parameters."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.models import build
from distill.training.config import Strict


@dataclass(frozen=True)
class ForwardCost:
    """Of one image.

    Args:
        flops: floating-point operations, two a multiply-add.
        activations: numbers that layers put out.
        parameters: P.
    """

    flops: float
    activations: int
    parameters: int


@lru_cache(maxsize=64)
def forward_cost(model: Strict, image_shape: tuple[int, int, int], classes: int) -> ForwardCost:
    """The cost of a network's forward pass; no weights are drawn, and none read from a file.

    Args:
        model: its configuration.
        image_shape: (Ch, H, W).
        classes: C.
    """
    network = _outline(_without_weights(model), image_shape, classes).eval()
    activations = 0

    def count(_: nn.Module, __: object, output: object) -> None:
        nonlocal activations
        if isinstance(output, torch.Tensor):
            activations += output.numel()

    for module in network.modules():
        if not list(module.children()):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, *image_shape, device="meta"))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return ForwardCost(float(counter.get_total_flops()), activations, parameters)


def _outline(model: Strict, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network without memory for its weights."""
    try:
        with torch.device("meta"):
            return build(model, image_shape=image_shape, classes=classes, seed=0)
    except NotImplementedError:  # torchvision's RegNets compute their widths with tensors
        return build(model, image_shape=image_shape, classes=classes, seed=0).to("meta")


def _without_weights(model: Strict) -> Strict:
    """The configuration without its weights file."""
    named = getattr(model, "weights", None) is not None
    return model.model_copy(update={"weights": None, "sha256": None}) if named else model
