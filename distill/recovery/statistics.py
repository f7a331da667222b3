"""How far the inputs of a network's batch norms are from what they were in training.

For a group of images (those whose statistics are taken together), layer l and channel statistics over the group and
all pixels,

    R = sum_l a_l ( ||mean_l - RM_l||_2 + ||var_l - RV_l||_2 ),

with the running mean RM and variance RV of the layer, a_1 = 10 for the first layer and 1 for the others, variances
biased, norms not squared (Yin et al., "Dreaming to Distill", CVPR 2020, equation 4, as Yin et al., "Squeeze, Recover and
Relabel", NeurIPS 2023, use it). The targets may be those of one class (Xiao and He, NeurIPS 2024).

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
class Moments:
    """What the batch norms of one network find in one forward pass, in the order in which they are computed.

    Args:
        groups: G; the batch holds them one after the other, as many images each.
        found: mean and variance (G, D) of each layer.
    """

    groups: int = 1
    found: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class ListeningNorm(nn.Module):
    """A batch norm in evaluation mode that says what it is given.

    Args:
        norm: the batch norm; its running statistics and affine parameters are used as they are.
        moments: where it says it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d, moments: Moments) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        weight = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight.detach()
        bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias.detach()
        scale = weight * (norm.running_var + norm.eps).rsqrt()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", bias - norm.running_mean * scale)
        self.moments = moments

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W); B = groups * images of a group."""
        y, mean, var = _Listen.apply(x, self.scale, self.shift, self.moments.groups)
        self.moments.found.append((mean, var))
        return y


class _Listen(torch.autograd.Function):
    """x (B, D, H, W) -> x * scale + shift, and mean and biased variance (G, D) of each group."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        flat = _by_group(x, groups)  # (G, n, D)
        wide = flat.float()
        mean = wide.mean(dim=1, keepdim=True)
        centred = wide - mean
        var = (centred * centred).mean(dim=1)
        ctx.save_for_backward(flat, mean, scale)
        ctx.shape = x.shape
        y = torch.addcmul(shift.to(x.dtype), flat, scale.to(x.dtype))
        return _as_images(y, x.shape), mean[:, 0], var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor, to_mean: Tensor, to_var: Tensor) -> tuple[Tensor | None, ...]:
        flat, mean, scale = ctx.saved_tensors
        count = flat.shape[1]
        slope = (2 / count) * to_var[:, None]  # (G, 1, D)
        constant = to_mean[:, None] / count - slope * mean
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


def listen(module: nn.Module) -> Moments:
    """Put listening batch norms, in place, where a frozen network has batch norms."""
    moments = Moments()
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.BatchNorm2d):
            module.set_submodule(name, ListeningNorm(part, moments))
    return moments


def targets_of(module: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Running mean and variance (1, D) of a network's batch norms, in the order of their names."""
    return [
        (part.running_mean[None].clone(), part.running_var[None].clone())
        for part in module.modules()
        if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None
    ]


def distance(moments: Moments, targets: list[tuple[Tensor, Tensor]]) -> Tensor:
    """R of each group, float32 (G,).

    Args:
        moments: of one forward pass.
        targets: mean and variance (1, D) or (G, D) of each layer.
    """
    total = torch.zeros(moments.groups, device=targets[0][0].device)
    for place, ((mean, var), (wanted_mean, wanted_var)) in enumerate(
        zip(moments.found, targets, strict=True)
    ):
        weight = FIRST_LAYER if place == 0 else 1.0
        total = total + weight * ((mean - wanted_mean).norm(dim=1) + (var - wanted_var).norm(dim=1))
    return total
