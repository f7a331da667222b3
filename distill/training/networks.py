"""K networks behind one face: a single module, or a stack that computes all K at once.

The stack holds every parameter as one tensor (K, ...) and maps the forward pass over it (torch.func); optimisers
are elementwise, so one step over the stacked parameters is K independent steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state


class Networks(Protocol):
    """K networks; x (K, B, Ch, H, W) -> logits (K, B, C)."""

    @property
    def stacked(self) -> bool:
        """Whether the first dimension of every parameter counts networks."""
        ...

    def parameters(self) -> list[Tensor]: ...

    def __call__(self, x: Tensor) -> Tensor: ...

    def on_shared(self, x: Tensor) -> Tensor:
        """Logits (K, B, C) of one batch x (B, Ch, H, W) in evaluation mode."""
        ...

    def train(self, mode: bool) -> None: ...

    def states(self) -> list[dict[str, Tensor]]:
        """K state dicts, copied to the host."""
        ...

    def vectors(self) -> Tensor:
        """All parameters of each network in their order, copied to the host: float32 (K, P)."""
        ...


class SingleNetwork:
    """One module, computed directly (channels_last: convolutions and pooling are faster so on CPU and GPU)."""

    stacked = False

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def parameters(self) -> list[Tensor]:
        return list(self.module.parameters())

    def __call__(self, x: Tensor) -> Tensor:
        return self.module(x[0])[None]

    def on_shared(self, x: Tensor) -> Tensor:
        return self.module(x)[None]

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def states(self) -> list[dict[str, Tensor]]:
        return [_to_host(self.module.state_dict())]

    def vectors(self) -> Tensor:
        flat = [value.detach().reshape(1, -1) for value in self.module.parameters()]
        return torch.cat(flat, dim=1).cpu()


class NetworkStack:
    """K modules of one architecture as stacked tensors."""

    stacked = True

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        modules = [module.to(device) for module in modules]
        self.template = modules[0]
        self.weights, self.buffers = stack_module_state(list(modules))
        self.weights = {name: value.detach().requires_grad_() for name, value in self.weights.items()}

    def parameters(self) -> list[Tensor]:
        return list(self.weights.values())

    def _forward(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.template, (weights, buffers), (x,))

    def __call__(self, x: Tensor) -> Tensor:
        mapped = torch.vmap(self._forward, randomness="different")
        return mapped(self.weights, self.buffers, x)

    def on_shared(self, x: Tensor) -> Tensor:
        return torch.vmap(self._forward, in_dims=(0, 0, None))(self.weights, self.buffers, x)

    def train(self, mode: bool) -> None:
        self.template.train(mode)

    def states(self) -> list[dict[str, Tensor]]:
        count = len(next(iter(self.weights.values())))
        merged = {**self.weights, **self.buffers}
        names = list(self.template.state_dict())
        return [_to_host({name: merged[name][k] for name in names}) for k in range(count)]

    def vectors(self) -> Tensor:
        flat = [value.detach().flatten(1) for value in self.weights.values()]
        return torch.cat(flat, dim=1).cpu()


def _to_host(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, never views: training may go on with the originals."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}
