"""Networks as functions of their flat parameter vectors, K of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from distill.cache.trajectories import Layout
from distill.matching.convolution import Inner, with_second_derivative


class FlatNetworks:
    """logits(theta (K, P), x (K, B, Ch, H, W)) -> (K, B, C), differentiable any number of times.

    One network is called directly, which is the faster way on a CPU; several are one vmap, whose kernels compute all K.
    Networks stand in evaluation mode: a step can then be computed again from its counters alone.

    Args:
        module: whose forward pass it is; its own parameters are not used.
        layout: how the parameters stand in a vector.
    """

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self.module = module.eval()
        self.layout = layout
        self.inner = with_second_derivative(module)

    def __call__(self, theta: Tensor, x: Tensor) -> Tensor:
        if len(theta) == 1:
            return self._forward(theta[0], x[0])[None]
        return torch.vmap(self._forward)(theta, x)

    @contextmanager
    def products_only(self) -> Iterator[Inner]:
        """Inner steps are not taken here, only differentiated: see `Inner.values`, and `Inner.take` for its product."""
        self.inner.values = False
        try:
            yield self.inner
        finally:
            self.inner.values = True

    def _forward(self, theta: Tensor, x: Tensor) -> Tensor:
        named = {name: _laid_out(weight) for name, weight in self.layout.views(theta).items()}
        self.inner.input = x
        try:
            return functional_call(self.module, named, (x,))
        finally:
            self.inner.input = None


def _laid_out(weight: Tensor) -> Tensor:
    """Filters in channels_last, which makes a convolution's output so whatever its input is."""
    if weight.ndim != 4 or torch._C._are_functorch_transforms_active():
        return weight
    return weight.contiguous(memory_format=torch.channels_last)
