"""Instance normalisation as the field's ConvNet uses it (GroupNorm with one channel a group), fast on a CPU.

    y = weight * (x - mean) / sqrt(var + eps) + bias,  mean and variance over H and W of each image and channel.

Convolutions and pooling on a CPU are about twice as fast in channels_last, but there torch's own backward of
GroupNorm takes several times its forward. So it is written out here, from sums over H*W, which in that layout run
along contiguous channels. With g = dL/dy, xhat = (x - mean) * rstd, and means over H*W:

    dL/dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))
    dL/dweight = sum(g * xhat),  dL/dbias = sum(g)

`NormReluPool` takes ReLU and 2 x 2 average pooling along, whose backward passes are then one.
`python tools/bench/norm.py` prints the times of both beside torch's.

Where the backward is itself differentiated (trajectory matching), it is computed through torch's own operations, so
second derivatives are exact. Other layouts, other devices and torch.func transforms use torch's operations throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of x and of weight; in bfloat16, sums are taken in float32.
_FAST_DTYPES = {
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
}

# Below this many pixels torch's forward in channels_last takes another way, which is the slower one by far: (100, 32,
# 28, 28) takes it 19.8 ms and the passes written out here 6.0 ms, on one thread; at 32 x 32 it is 3.0 and 9.1 ms.
_NATIVE_PIXELS = 1024


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation with affine parameters; the same state dict as nn.GroupNorm(channels, channels)."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__(channels, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H, W)."""
        if _is_fast(x, self.weight):
            return _Normalise.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class NormReluPool(InstanceNorm):
    """Instance normalisation, ReLU and 2 x 2 average pooling: the second half of the ConvNet's block."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D, H // 2, W // 2)."""
        even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0
        if even and _is_fast(x, self.weight):
            return _NormaliseReluPool.apply(x, self.weight, self.bias, self.eps)
        return F.avg_pool2d(F.relu(super().forward(x)), 2)


def _is_fast(x: Tensor, weight: Tensor) -> bool:
    """Whether the hand-written backward applies, and is the faster one."""
    return (
        x.device.type == "cpu"
        and (x.dtype, weight.dtype) in _FAST_DTYPES
        and not torch._C._are_functorch_transforms_active()  # first: vmap knows no channels_last
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


class _Normalise(torch.autograd.Function):
    """x (B, D, H, W) in channels_last, weight and bias (D,) -> (B, D, H, W)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward(_plain_norm, x, weight, bias, ctx.eps, grad), None)
        return (*_norm_backward(x, weight, mean, rstd, _pixels_first(grad)), None)


class _NormaliseReluPool(torch.autograd.Function):
    """x (B, D, H, W) in channels_last with H and W even, weight and bias (D,) -> (B, D, H / 2, W / 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, eps)
        y = y.relu_()
        ctx.save_for_backward(x, weight, bias, mean, rstd, y)
        ctx.eps = eps
        return F.avg_pool2d(y, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, y = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_differentiable_backward(_plain_block, x, weight, bias, ctx.eps, grad), None)
        return (*_norm_backward(x, weight, mean, rstd, _relu_pool_backward(y, grad)), None)


def _forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised x in channels_last, and mean and 1 / std (B, D)."""
    batch, channels, height, width = x.shape
    pixels = height * width
    if pixels >= _NATIVE_PIXELS:
        return torch.native_group_norm(x, weight, bias, batch, channels, pixels, channels, eps)
    flat = _pixels_first(x).to(weight.dtype)
    mean = flat.mean(dim=1, keepdim=True)  # (B, 1, D)
    centred = flat - mean
    rstd = ((centred * centred).mean(dim=1, keepdim=True) + eps).rsqrt_()
    y = torch.addcmul(bias, centred, rstd * weight).to(x.dtype)
    return y.view(batch, height, width, channels).permute(0, 3, 1, 2), mean, rstd


def _pixels_first(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H*W, D), a view where x is in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def _relu_pool_backward(y: Tensor, grad: Tensor) -> Tensor:
    """Gradient (B, H*W, D) before ReLU and pooling, from y (B, D, H, W) between them and grad (B, D, H / 2, W / 2).

    Each pixel of a 2 x 2 square gets a quarter of the square's gradient where its activation is positive.
    """
    batch, channels, height, width = y.shape
    quarter = (grad / 4).permute(0, 2, 3, 1)  # (B, H / 2, W / 2, D)
    # Along W the gradient is written out twice, so that the product below runs over whole rows.
    row = torch.stack((quarter, quarter), dim=3).reshape(batch, height // 2, 1, width * channels)
    rows = y.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width * channels)
    before = torch.ops.aten.threshold_backward(row.expand_as(rows), rows, 0)
    return before.reshape(batch, height * width, channels)


def _norm_backward(
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, D, H, W), weight (D,) and bias (D,) from that of the output, grad (B, H*W, D)."""
    batch, channels, height, width = x.shape
    pixels = height * width
    grad = grad.to(mean.dtype)
    flat = _pixels_first(x).to(mean.dtype)
    mean, rstd = mean.view(batch, 1, channels), rstd.view(batch, 1, channels)
    sum_g = grad.sum(dim=1, keepdim=True)  # (B, 1, D)
    sum_gx = (grad * flat).sum(dim=1, keepdim=True)
    sum_ghat = (sum_gx - mean * sum_g) * rstd  # sum of g * xhat, without writing xhat out
    # dL/dx = a g + b x + c
    a = rstd * weight
    b = -a * rstd * sum_ghat / pixels
    c = -a * sum_g / pixels - b * mean
    grad_x = torch.addcmul(c, grad, a).addcmul_(flat, b).to(x.dtype)
    grad_x = grad_x.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return grad_x, sum_ghat.sum(dim=(0, 1)), sum_g.sum(dim=(0, 1))


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.group_norm(x, x.shape[1], weight, bias, eps)


def _plain_block(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.avg_pool2d(F.relu(_plain_norm(x, weight, bias, eps)), 2)


def _differentiable_backward(
    function: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    grad: Tensor,
) -> tuple[Tensor, ...]:
    """The backward of `function` through torch's operations, for second derivatives."""
    # Views cut the graph here: were weight computed from x, its part must not be counted in x's gradient.
    x, weight, bias = (
        each.view_as(each) if each.requires_grad else each.detach().requires_grad_()
        for each in (x, weight, bias)
    )
    y = function(x, weight, bias, eps)
    return torch.autograd.grad(y, (x, weight, bias), grad, create_graph=True)
