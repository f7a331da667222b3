"""Per-sample gradients of one layer in closed form, from what went into it and the gradient g of what came out.

With positions l (pixels, tokens; one where a layer works on vectors) and sums within one sample:

    linear:        dL/dW = sum_l g_l x_l^T                 dL/db = sum_l g_l
    convolution:   the same, x_l being the patch that position l sees
    normalisation: dL/dw = sum_l g_l * xhat_l              dL/db = sum_l g_l

One product of matrices a sample, so that a network's per-sample gradients cost what its ordinary ones do. (Goodfellow,
"Efficient Per-Example Gradient Computations", 2015; Rochette, Manoel and Tramel, "Efficient Per-Example Gradient
Computations in Convolutional Neural Networks", 2019.) The product is left unformed, but for convolutions in groups, see
`Outer`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models.norm import InstanceNorm, NormReluPool


@dataclass(frozen=True)
class Outer:
    """Gradients sum_l left_l right_l^T of a weight (O, I), not formed.

    Args:
        left: (B, L, O).
        right: (B, L, I); of a convolution patches, I counting Kh, Kw, Ch.
        kernel: (Kh, Kw) of a convolution, whose weight is (O, Ch, Kh, Kw).
    """

    left: Tensor
    right: Tensor
    kernel: tuple[int, int] | None = None

    @property
    def shape(self) -> torch.Size:
        """The weight's: (O, I) or (O, Ch, Kh, Kw)."""
        rows, columns = self.left.shape[2], self.right.shape[2]
        if self.kernel is None:
            return torch.Size((rows, columns))
        return torch.Size((rows, columns // math.prod(self.kernel), *self.kernel))

    @property
    def positions(self) -> int:
        """L."""
        return self.left.shape[1]

    def split(self, block_bytes: int) -> Iterator[tuple[slice, Outer]]:
        """Some samples at a time, whose formed gradients take at most `block_bytes` if more than one sample."""
        each = self.shape.numel() * self.left.element_size()
        rows = max(1, block_bytes // each)
        for start in range(0, len(self.left), rows):
            block = slice(start, start + rows)
            yield block, Outer(self.left[block], self.right[block], self.kernel)

    @cached_property
    def formed(self) -> Tensor:
        """(B, *shape); of a convolution in channels_last memory."""
        left = self.left.transpose(1, 2)
        if self.positions == 1:  # a matrix product would take several times longer
            product = left * self.right
        elif self.kernel is None:
            product = left @ self.right
        else:  # contiguous: the product is then faster by more than the copy takes
            product = left.contiguous() @ self.right
        if self.kernel is None:
            return product
        return product.unflatten(2, (*self.kernel, -1)).permute(0, 1, 4, 2, 3)


Gradient = Tensor | Outer

_CACHED_BYTES = 1 << 21  # of one tensor, so that the few that are worked on stay in the processor's cache


def has_closed_form(layer: nn.Module) -> bool:
    """Whether `layer_gradients` knows this layer. A subclass may compute something else and is not known."""
    if type(layer) is nn.Conv2d:
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in _CLOSED_FORMS


@torch.no_grad()
def layer_gradients(layer: nn.Module, calls: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Gradient]:
    """Gradients of the layer's own parameters for each sample, by the parameter's name within the layer.

    Args:
        layer: in evaluation mode; `has_closed_form`.
        calls: input (B, ...) and gradient of the output (B, ...) of each call of the layer in one forward pass.
    """
    own = {name for name, value in layer._parameters.items() if value is not None}
    closed_form = _CLOSED_FORMS[type(layer)]
    parts = [closed_form(layer, inputs, grad) for inputs, grad in calls]
    return {name: _added([part[name] for part in parts]) for name in parts[0] if name in own}


def bytes_per_sample(layer: nn.Module, inputs: Tensor, grad: Tensor) -> int:
    """The largest tensor that `layer_gradients` makes for one sample, or takes, in bytes."""
    sizes = [inputs[0].numel(), grad[0].numel()]
    if isinstance(layer, nn.Conv2d):
        sizes.append(grad[0, 0].numel() * layer.weight[0].numel() * layer.groups)  # the patches
    if not (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)):
        sizes += [value.numel() for value in layer.parameters()]
    return max(sizes) * inputs.element_size()


def _added(parts: list[Gradient]) -> Gradient:
    """The sum over a layer's calls."""
    if len(parts) == 1:
        return parts[0]
    outers = [part for part in parts if isinstance(part, Outer)]
    if outers:
        left = torch.cat([each.left for each in outers], dim=1)
        return Outer(left, torch.cat([each.right for each in outers], dim=1), outers[0].kernel)
    return torch.stack([part for part in parts if isinstance(part, Tensor)]).sum(dim=0)


def _linear(_: nn.Linear, inputs: Tensor, grad: Tensor) -> dict[str, Gradient]:
    """(B, ..., I) and (B, ..., O)."""
    left, right = (value.reshape(len(value), -1, value.shape[-1]) for value in (grad, inputs))
    return {"weight": Outer(left, right), "bias": left.sum(dim=1)}


def _convolution(layer: nn.Conv2d, inputs: Tensor, grad: Tensor) -> dict[str, Gradient]:
    """(B, I, H, W) and (B, O, H', W')."""
    left = grad.permute(0, 2, 3, 1).flatten(1, 2)  # (B, L, O), a view in channels_last
    patches = _patches(layer, inputs, height=grad.shape[2], width=grad.shape[3])
    rows, columns = layer.kernel_size
    if layer.groups == 1:
        weight: Gradient = Outer(left, patches, (rows, columns))
    else:
        weight = _of_groups(left, patches, layer)
    return {"weight": weight, "bias": grad.sum(dim=(2, 3))}


def _of_groups(left: Tensor, patches: Tensor, layer: nn.Conv2d) -> Tensor:
    """(B, O, I / groups, Kh, Kw): one product of matrices for each group."""
    left, right = (
        value.unflatten(2, (layer.groups, -1)).transpose(1, 2).flatten(0, 1) for value in (left, patches)
    )  # (B * groups, L, ...)
    rows, columns = layer.kernel_size
    return Outer(left, right, (rows, columns)).formed.reshape(len(patches), *layer.weight.shape)


def _patches(layer: nn.Conv2d, inputs: Tensor, *, height: int, width: int) -> Tensor:
    """What each position of the output sees: (B, L, groups * Kh * Kw * I / groups).

    Written in channels_last, where every pixel of a patch is one copy of contiguous memory.
    """
    batch, channels, rows, columns = inputs.shape
    assert not isinstance(layer.padding, str)
    (pad_rows, pad_columns), (kernel_rows, kernel_columns) = layer.padding, layer.kernel_size
    padded = inputs.new_zeros(batch, rows + 2 * pad_rows, columns + 2 * pad_columns, channels)
    padded[:, pad_rows : pad_rows + rows, pad_columns : pad_columns + columns] = inputs.permute(0, 2, 3, 1)
    of_sample, of_row, of_column, _ = padded.stride()
    windows = padded.as_strided(
        (batch, height, width, kernel_rows, kernel_columns, channels),
        (
            of_sample,
            of_row * layer.stride[0],
            of_column * layer.stride[1],
            of_row * layer.dilation[0],
            of_column * layer.dilation[1],
            1,
        ),
    )
    if layer.groups > 1:
        windows = windows.unflatten(5, (layer.groups, -1)).movedim(5, 3)
    return windows.reshape(batch, height * width, -1)


def _batch_norm(layer: nn.BatchNorm2d, inputs: Tensor, grad: Tensor) -> dict[str, Gradient]:
    """(B, D, H, W) twice; the running statistics are constants."""
    normalised = F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)
    return {"weight": (grad * normalised).sum(dim=(2, 3)), "bias": grad.sum(dim=(2, 3))}


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, grad: Tensor) -> dict[str, Gradient]:
    """(B, D) or (B, D, ...) twice."""
    normalised = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    return {
        name: value.reshape(*value.shape[:2], -1).sum(dim=2)
        for name, value in (("weight", grad * normalised), ("bias", grad))
    }


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, grad: Tensor) -> dict[str, Gradient]:
    """(B, ..., *normalized_shape) twice."""
    shape = list(layer.normalized_shape)
    normalised = F.layer_norm(inputs, shape, eps=layer.eps)
    return {
        name: value.reshape(len(value), -1, *shape).sum(dim=1)
        for name, value in (("weight", grad * normalised), ("bias", grad))
    }


def _norm_relu_pool(layer: NormReluPool, inputs: Tensor, grad: Tensor) -> dict[str, Gradient]:
    """(B, D, H, W) and, pooled, (B, D, H // 2, W // 2); a few samples at a time, which stay in a core's cache."""
    rows = max(1, _CACHED_BYTES // (inputs[0].numel() * inputs.element_size()))
    blocks = zip(inputs.split(rows), grad.split(rows), strict=True)
    parts = [_norm_relu_pool_block(layer, *block) for block in blocks]
    weight, bias = (torch.cat(each) for each in zip(*parts, strict=True))
    return {"weight": weight, "bias": bias}


def _norm_relu_pool_block(layer: NormReluPool, inputs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients (B, D) of weight and bias.

    Each pixel of a 2 x 2 square gets a quarter of the square's gradient where its activation is positive. A last row
    or column that pooling leaves out gets none.
    """
    batch, channels, height, width = grad.shape
    normalised = _pooled_pixels(_normalised_pixels(inputs, layer.eps), height, width)
    activation = torch.addcmul(layer.bias, normalised.view(-1, channels), layer.weight).view_as(normalised)
    quarter = (grad / 4).permute(0, 2, 3, 1)
    # Along W the gradient is written out twice, so that the product below runs over whole rows.
    row = torch.stack((quarter, quarter), dim=3).reshape(batch, height, 1, 2 * width * channels)
    before = torch.ops.aten.threshold_backward(row.expand_as(activation), activation, 0)
    product = torch.mul(before, normalised, out=activation)
    weight, bias = (_sum_of_pixels(each.view(batch, -1, channels)) for each in (product, before))
    return weight.squeeze(1), bias.squeeze(1)


def _normalised_pixels(inputs: Tensor, eps: float) -> Tensor:
    """(B, D, H, W) -> (B, H, W, D) with mean 0 and variance 1 (less eps) over each sample's pixels."""
    pixels = inputs.permute(0, 2, 3, 1).flatten(1, 2)
    count = pixels.shape[1]
    centred = pixels - _sum_of_pixels(pixels) / count
    variance = _sum_of_pixels(centred * centred) / count
    return centred.mul_((variance + eps).rsqrt_()).unflatten(1, inputs.shape[2:])


def _pooled_pixels(pixels: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, D) -> (B, height, 2, 2 * width * D), without what pooling leaves out."""
    return pixels[:, : 2 * height, : 2 * width].contiguous().view(len(pixels), height, 2, -1)


def _sum_of_pixels(values: Tensor) -> Tensor:
    """(B, pixels, D) -> (B, 1, D); a product with ones is several times faster than sum."""
    return torch.bmm(values.new_ones(1, 1, values.shape[1]).expand(len(values), -1, -1), values)


_CLOSED_FORMS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], dict[str, Gradient]]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    InstanceNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    NormReluPool: _norm_relu_pool,
}
