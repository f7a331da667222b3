"""Convolutions of frozen networks on small maps, on a CPU, with a third of the multiplications.

A 3 x 3 convolution computes 4 x 4 pixels of its output from 6 x 6 of its input d with 36 multiplications a pair of
channels instead of 144 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016, equation 12,
F(4 x 4, 3 x 3)):

    y = A^T [ (G g G^T) * (B^T d B) ] A.

The products are 36 matrix products over all tiles; the weights of a frozen network are transformed once. Maps here are
so small that a tile's transforms, with its place on the map and the padding around it, are one dense matrix each: T_t
(36 x HW) and S_t (HW x 36) for tile t, and

    y = sum_t S_t [ U * (T_t x) ],    dx = sum_t T_t^T [ U^T * (S_t^T dy) ],

so that the way back is the way there with other matrices. On larger maps the transforms would cost more than they save
(`saves` counts), and there, on other devices and in other numbers than float32 the convolution stays what it was.
Rounding errors are about five times those of a direct convolution: some 1e-5 of the output's deviation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_TILE, _PATCH = 4, 6
_B_T = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A_T = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class SmallMapConv(nn.Module):
    """A frozen convolution that takes the way of fewer multiplications where a map is small enough.

    Args:
        conv: one that `is_plain`; its weights do not change from here on.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._kernels: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, E, H, W)."""
        if not self._takes(x):
            return self.conv(x)
        if self._kernels is None:
            self._kernels = transformed(self.conv.weight)
        y = _Walk.apply(x, self._kernels)
        return y if self.conv.bias is None else y + self.conv.bias[:, None, None]

    def _takes(self, x: Tensor) -> bool:
        height, width = x.shape[2:]
        return (
            x.device.type == "cpu"
            and x.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and saves(height, width, self.conv.in_channels, self.conv.out_channels)
        )


def with_small_maps(module: nn.Module) -> None:
    """Put `SmallMapConv`, in place, where a frozen network has convolutions for it."""
    for name, part in list(module.named_modules()):
        if isinstance(part, nn.Conv2d) and is_plain(part):
            module.set_submodule(name, SmallMapConv(part))


def is_plain(conv: nn.Conv2d) -> bool:
    """Whether it is a dense 3 x 3 convolution of stride 1 with a border of zeros."""
    return (
        conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.groups == 1
    )


def saves(height: int, width: int, inputs: int, outputs: int) -> bool:
    """Whether the multiplications of an image, with the transforms, are less than half of the direct way's."""
    pixels = height * width
    tiles = -(-height // _TILE) * -(-width // _TILE)
    walk = tiles * _PATCH**2 * (pixels * (inputs + outputs) + inputs * outputs)
    return 2 * walk < 9 * pixels * inputs * outputs


def transformed(weight: Tensor) -> Tensor:
    """U = G g G^T of each pair of channels: (E, D, 3, 3) -> (36, D, E)."""
    g = torch.tensor(_G, dtype=torch.float64)
    kernels = torch.einsum("ka,edab,jb->kjde", g, weight.detach().double(), g)
    return kernels.flatten(0, 1).to(weight.dtype).contiguous()


@lru_cache(maxsize=64)
def _transforms(height: int, width: int) -> tuple[Tensor, Tensor]:
    """T (tiles, 36, H*W) and S (tiles, H*W, 36)."""
    (rows_in, rows_out), (columns_in, columns_out) = _of_axis(height), _of_axis(width)
    tiles, pixels = len(rows_in) * len(columns_in), height * width
    there = torch.einsum("akh,bjw->abkjhw", rows_in, columns_in).reshape(tiles, _PATCH**2, pixels)
    back = torch.einsum("ahk,bwj->abhwkj", rows_out, columns_out).reshape(tiles, pixels, _PATCH**2)
    return there.float(), back.float()


def _of_axis(length: int) -> tuple[Tensor, Tensor]:
    """B^T (tiles, 6, length) and A (tiles, length, 6), each tile at its place, zero beyond the border."""
    tiles = -(-length // _TILE)
    there = torch.zeros(tiles, _PATCH, length, dtype=torch.float64)
    back = torch.zeros(tiles, length, _PATCH, dtype=torch.float64)
    b_t, a_t = torch.tensor(_B_T, dtype=torch.float64), torch.tensor(_A_T, dtype=torch.float64)
    for tile in range(tiles):
        first = _TILE * tile
        for place in range(_PATCH):
            if 0 <= first - 1 + place < length:
                there[tile, :, first - 1 + place] = b_t[:, place]
        for place in range(min(_TILE, length - first)):
            back[tile, first + place] = a_t[place]
    return there, back


class _Walk(torch.autograd.Function):
    """x (B, D, H, W) and U (36, D, E) -> (B, E, H, W), in channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: Tensor) -> Tensor:
        ctx.save_for_backward(kernels)
        return _walk(x, kernels, *_transforms(x.shape[2], x.shape[3]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_y: Tensor) -> tuple[Tensor, None]:
        (kernels,) = ctx.saved_tensors
        there, back = _transforms(to_y.shape[2], to_y.shape[3])
        return _walk(to_y, kernels.transpose(1, 2), back.transpose(1, 2), there.transpose(1, 2)), None


def _walk(x: Tensor, kernels: Tensor, there: Tensor, back: Tensor) -> Tensor:
    """sum_t back_t [ kernels * (there_t x) ].

    Args:
        x: (B, D, H, W).
        kernels: (36, D, E).
        there: (tiles, 36, H*W).
        back: (tiles, H*W, 36).
    """
    batch, inputs, height, width = x.shape
    tiles, outputs = len(there), kernels.shape[2]
    flat = x.permute(0, 2, 3, 1).reshape(batch, height * width, inputs)
    patches = torch.bmm(there.reshape(tiles * _PATCH**2, -1).expand(batch, -1, -1), flat)
    patches = patches.view(batch * tiles, _PATCH**2, inputs).transpose(0, 1)
    products = torch.bmm(patches, kernels).view(_PATCH**2, batch, tiles, outputs).permute(2, 1, 0, 3)
    y = torch.bmm(back[0].expand(batch, -1, -1), products[0])
    for of_tile, product in zip(back[1:], products[1:], strict=True):
        torch.baddbmm(y, of_tile.expand(batch, -1, -1), product, out=y)
    return y.view(batch, height, width, outputs).permute(0, 3, 1, 2)
