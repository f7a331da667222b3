"""Networks as functions of their flat parameter vectors, K of them at once."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call


class FlatNetworks:
    """logits(theta (K, P), x (K, B, Ch, H, W)) -> (K, B, C), differentiable any number of times.

    One network is called directly, which is the faster way on a CPU; several are one vmap, whose kernels compute all K.
    Networks stand in evaluation mode: a step can then be computed again from its counters alone.

    Args:
        module: whose forward pass it is; its own parameters are not used.
        shapes: of the parameters by name, in the order in which they stand in a vector.
    """

    def __init__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.module = module.eval()
        self.shapes = dict(shapes)
        self.sizes = [prod(shape) for shape in self.shapes.values()]

    @property
    def parameters(self) -> int:
        """P."""
        return sum(self.sizes)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        if len(theta) == 1:
            return self._forward(theta[0], x[0])[None]
        return torch.vmap(self._forward)(theta, x)

    def _forward(self, theta: Tensor, x: Tensor) -> Tensor:
        parts = theta.split(self.sizes)
        named = {
            name: _laid_out(part.view(shape))
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        return functional_call(self.module, named, (x,))


def _laid_out(weight: Tensor) -> Tensor:
    """Filters in channels_last, which makes a convolution's output so whatever its input is."""
    if weight.ndim != 4 or torch._C._are_functorch_transforms_active():
        return weight
    return weight.contiguous(memory_format=torch.channels_last)
