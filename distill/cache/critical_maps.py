"""Class activation maps: where on an image a network's logit of a class rests.

With the last map of features A (D, h, w) of a network and its logit z_y of class y,

    C_y(h, w) = relu( sum_d  dz_y / dA_d(h, w) * A_d(h, w) ).

Where the head is linear behind the map, pooled (Zhou et al., "Learning Deep Features for Discriminative Localization",
CVPR 2016, equation 2: the gradient is W[y, d] / hw) or flattened (each place has weights of its own), the sum over all
places is z_y less its bias, so that the map is exact, up to the factor 1 / hw which no user of it sees. Behind other
heads it is the first order (Draelos and Carin, "Use HiResCAM instead of Grad-CAM for faithful explanations", 2020).
Grad-CAM, the usual choice there, averages gradients over the places first and may point at places that the logit does
not rest on.

Only what lies behind the map is differentiated: a map costs hardly more than the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import InputError

_POOLINGS = (nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class MapLayer:
    """Where a network has its last map of features.

    Args:
        name: of the layer that puts it out.
        height, width: of the map.
    """

    name: str
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a layer in a forward pass.

    Args:
        name, layer: whose.
        given: its first argument.
        output: what it returned.
        version: how often `output` had been written to, in place, when it was returned.
    """

    name: str
    layer: nn.Module
    given: Any
    output: Any
    version: int


def map_layer(module: nn.Module, image_shape: tuple[int, int, int], *, name: str) -> MapLayer:
    """The layer whose output is the last map of features, before a pooling that ends it.

    Args:
        module: a network in evaluation mode, also one without memory for its weights (on the meta device).
        image_shape: of its images, (Ch, H, W).
        name: of the network, for messages.

    Raises:
        InputError: it has no map of features, or attention mixes the places behind it.
    """
    calls = _calls(module, image_shape)
    maps = [call for call in calls if _is_map(call.output)]
    if not maps:
        raise InputError(
            f"the network {name} has no map of features, in which critical pixels could be found",
            found="no layer that puts out (B, D, h, w) of more than one place",
            allowed="networks of convolutions, such as resnet18 or convnet",
            fix="take another teacher",
        )
    _refuse_attention(calls, maps[-1], name)
    found = _source(maps, maps[-1].output)
    while isinstance(found.layer, _POOLINGS) and any(call.output is found.given for call in maps):
        found = _source(maps, found.given)
    return MapLayer(found.name, *found.output.shape[2:])


def _source(calls: Sequence[_Call], output: Tensor) -> _Call:
    """The call that made a tensor what it is: of those that returned it after it was last written to, the innermost.

    A skip connection or an activation in place leaves a tensor the same object with other values.
    """
    own = [call for call in calls if call.output is output]
    last = max(call.version for call in own)
    return next(call for call in own if call.version == last)


def _calls(module: nn.Module, image_shape: tuple[int, int, int]) -> list[_Call]:
    """Calls of layers, in the order of their returns."""
    found: list[_Call] = []

    def note(name: str, layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        version = output._version if isinstance(output, Tensor) else 0
        found.append(_Call(name, layer, given[0] if given else None, output, version))

    hooks = [
        layer.register_forward_hook(partial(note, name)) for name, layer in module.named_modules() if name
    ]
    try:
        device = next(module.parameters()).device
        with torch.no_grad():
            module(torch.zeros(1, *image_shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_map(output: object) -> bool:
    return isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1


def _refuse_attention(calls: list[_Call], last: _Call, name: str) -> None:
    behind = calls[calls.index(last) + 1 :]
    if any("attention" in type(call.layer).__name__.lower() for call in behind):
        raise InputError(
            f"the network {name} mixes the places of its last map by attention, so that none of them is critical",
            found=f"attention behind layer {last.name}",
            allowed="networks of convolutions, such as resnet18 or convnet",
            fix="take another teacher",
        )


class MapPass:
    """A network that tells with its logits where they rest.

    Args:
        module: frozen, in evaluation mode.
        layer: of its last map.
    """

    def __init__(self, module: nn.Module, layer: MapLayer) -> None:
        self.module, self.layer = module, layer

    def run(self, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, C), and the maps of the logits of `classes`, int64 (B,): float32 (B, h, w), 0 or more.

        Args:
            images: (B, Ch, H, W) as the network takes them.
            classes: one an image.
        """
        with torch.enable_grad(), self._kept() as kept:
            logits = self.module(images)
        values = kept[-1]
        (slope,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), values)
        return logits.detach(), (slope * values.detach()).sum(dim=1).float().clamp(min=0)

    @contextmanager
    def _kept(self) -> Iterator[list[Tensor]]:
        """While open, the map is kept as what logits are differentiated by."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
            kept.append(output.detach().requires_grad_())
            return kept[-1].clone()  # what follows may work in place

        hook = self.module.get_submodule(self.layer.name).register_forward_hook(keep)
        try:
            yield kept
        finally:
            hook.remove()
