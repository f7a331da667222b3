"""How far the inputs of a network's batch norms are from what they were in training.

For a group of images (those whose statistics are taken together), layer l and channel statistics over the group and
all pixels,

    R = sum_l a_l ( ||mean_l - RM_l||_2 + ||var_l - RV_l||_2 ),

with the running mean RM and variance RV of the layer, a_1 = 10 for the first layer and 1 for the others, variances
biased, norms not squared (Yin et al., "Dreaming to Distill", CVPR 2020, as Yin et al., "Squeeze, Recover and Relabel",
NeurIPS 2023, use it). The targets may be those of one class (Xiao and He, NeurIPS 2024).

Released codes take the statistics in hooks that copy every activation, and of one group at a time. Here each batch norm
is a module that normalises and takes the statistics of G groups in one pass, with its backward written out, so that
many groups go through a network as one batch and mean the same.

With x of group g and channel c, n numbers each, s and t the scale and shift that the batch norm comes down to in
evaluation, and gradients dy, dmean and dvar of its three results:

    dx = s dy + (dmean + 2 (x - mean) dvar) / n.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FIRST_LAYER = 10.0  # a_1


@dataclass(eq=False)
class Heard:
    """What the batch norms of one network find in one forward pass.

    Args:
        groups: G; the batch holds them one after the other, as many images each.
        moments: mean and variance (G, D) of each layer, by its name.
    """

    groups: int = 1
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class ListeningNorm(nn.Module):
    """A batch norm in evaluation mode that says what it is given.

    Args:
        norm: the batch norm; its running statistics and affine parameters are used as they are.
        name: of the layer.
        heard: where it says it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d, name: str, heard: Heard) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        weight = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach()
        bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
        scale = weight * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", bias - norm.running_mean * scale)
        self.name, self.heard = name, heard

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W); B = groups * images of a group."""
        y, mean, var = _Listen.apply(x, self.scale, self.shift, self.heard.groups)
        self.heard.moments[self.name] = (mean, var)
        return y


class _Listen(torch.autograd.Function):
    """x (B, D, H, W) -> x * scale + shift, and mean and biased variance (G, D) of each group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous(memory_format=torch.channels_last)
        flat = _by_group(x, groups)  # (G, n, D)
        wide = flat.to(scale.dtype)  # float32 where autocast computes in less
        mean = wide.mean(dim=1)
        y = torch.empty_like(x, dtype=wide.dtype)
        room = _by_group(y, groups)  # of squares first, then of the result: fresh memory is dear on a CPU
        var = torch.sub(wide, mean[:, None], out=room).square_().mean(dim=1)
        torch.addcmul(shift, wide, scale, out=room)
        ctx.save_for_backward(flat, mean, scale)
        ctx.shape = x.shape
        return y.to(x.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor, to_mean: Tensor, to_var: Tensor) -> tuple[Tensor | None, ...]:
        flat, mean, scale = ctx.saved_tensors
        count = flat.shape[1]
        slope = (2 / count) * to_var[:, None]  # (G, 1, D)
        constant = to_mean[:, None] / count - slope * mean[:, None]
        g = _by_group(to_y, len(flat))
        found = torch.addcmul(constant.to(g.dtype), flat, slope.to(g.dtype)).addcmul_(g, scale.to(g.dtype))
        return _as_images(found, ctx.shape), None, None, None


def _by_group(x: Tensor, groups: int) -> Tensor:
    """(B, D, H, W) -> (G, n, D), n numbers a channel and group; a view where x is in channels_last."""
    return x.permute(0, 2, 3, 1).reshape(groups, -1, x.shape[1])


def _as_images(flat: Tensor, shape: torch.Size) -> Tensor:
    """The way back from `_by_group`, in channels_last."""
    batch, channels, height, width = shape
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


Targets = dict[str, tuple[Tensor, Tensor]]


def listen(module: nn.Module) -> tuple[Heard, Targets]:
    """Put listening batch norms, in place, where a frozen network has batch norms.

    Returns:
        What they will hear, and the running mean and variance (1, D) of each, by name, in the network's order.
    """
    heard, targets = Heard(), {}
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None and part.running_var is not None
            targets[name] = (part.running_mean[None].clone(), part.running_var[None].clone())
            module.set_submodule(name, ListeningNorm(part, name, heard))
    return heard, targets


def distance(heard: Heard, targets: Targets) -> Tensor:
    """R of each group, float32 (G,).

    Args:
        heard: in one forward pass.
        targets: mean and variance, (1, D) or (G, D), of each layer; the first is the one of weight a_1.
    """
    total: Tensor | int = 0
    for place, (name, (wanted_mean, wanted_var)) in enumerate(targets.items()):
        mean, var = heard.moments[name]
        weight = FIRST_LAYER if place == 0 else 1.0
        total = total + weight * ((mean - wanted_mean).norm(dim=1) + (var - wanted_var).norm(dim=1))
    assert isinstance(total, Tensor), "a network with batch norm"
    return total
