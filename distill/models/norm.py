"""Instance normalisation as the field's ConvNet uses it (GroupNorm with one channel a group), fast on a CPU.

    y = weight * (x - mean) / sqrt(var + eps) + bias,  mean and variance over H and W of each image and channel.

Convolutions and pooling on a CPU are about twice as fast in channels_last, but there torch's own backward of
GroupNorm takes several times its forward. So it is written out here, from sums over H*W, which in that layout run
along contiguous channels. With g = dL/dy, xhat = (x - mean) * rstd, and means over H*W:

    dL/dx = weight * rstd * (g - mean(g) - xhat * mean(g * xhat))
    dL/dweight = sum(g * xhat),  dL/dbias = sum(g)

`NormReluPool` takes ReLU and 2 x 2 average pooling along, whose backward passes are then one.
`python tools/bench/norm.py` prints the times of both beside torch's.

Where the backward is itself differentiated (trajectory matching), its derivative is written out as well. With u, p, q
the gradients of a loss s with respect to dL/dx, dL/dweight and dL/dbias, means over H*W as above, n = H*W, h = mean(g *
xhat), k = mean(u * xhat) and E = sum(u * g) - n mean(u) mean(g) - n h k:

    ds/dg = weight * rstd * (u - mean(u) - k * xhat) + p * xhat + q
    ds/dweight = sum over images of rstd * E
    ds/dx = rstd * (z - mean(z) - xhat * mean(z * xhat)) - weight * rstd^2 * E * xhat / n,
            z = (p - weight * rstd * k) * g - weight * rstd * h * u

Other layouts, other devices and torch.func transforms use torch's operations throughout.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        return (*_Backward.apply(grad, x, weight, mean, rstd, None), None)


class _NormaliseReluPool(torch.autograd.Function):
    """x (B, D, H, W) in channels_last with H and W even, weight and bias (D,) -> (B, D, H / 2, W / 2)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, eps)
        y = y.relu_()
        ctx.save_for_backward(x, weight, mean, rstd, y)
        return F.avg_pool2d(y, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd, y = ctx.saved_tensors
        return (*_Backward.apply(grad, x, weight, mean, rstd, y), None)


class _Backward(torch.autograd.Function):
    """Gradients of x, weight and bias from that of the output; y is the activation before pooling, None without one."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, y: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(grad, x, weight, mean, rstd, y)
        return _norm_backward(x, weight, mean, rstd, _before_pool(grad, y))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, weight, mean, rstd, y = ctx.saved_tensors
        g = _before_pool(grad, y)
        to_g, to_x, to_weight = _second_backward(x, weight, mean, rstd, g, _pixels_first(u), p, q)
        return (_after_pool(to_g.to(grad.dtype), y, x), to_x, to_weight, None, None, None)


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


def _second_backward(
    x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, g: Tensor, u: Tensor, p: Tensor, q: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of g (B, H*W, D), x (B, D, H, W) and weight (D,): the formulas at the head of the file.

    Args:
        x: (B, D, H, W).
        mean, rstd: of x, (B, D).
        g: gradient of the norm's output, (B, H*W, D).
        u, p, q: gradients of dL/dx (B, H*W, D), dL/dweight (D,) and dL/dbias (D,).
    """
    batch, channels, height, width = x.shape
    n = height * width
    g, u, flat = g.to(mean.dtype), u.to(mean.dtype), _pixels_first(x).to(mean.dtype)
    mean, rstd = mean.view(batch, 1, channels), rstd.view(batch, 1, channels)
    mean_g, mean_u = g.mean(dim=1, keepdim=True), u.mean(dim=1, keepdim=True)  # (B, 1, D)
    h = ((g * flat).mean(dim=1, keepdim=True) - mean * mean_g) * rstd
    k = ((u * flat).mean(dim=1, keepdim=True) - mean * mean_u) * rstd
    e = (u * g).mean(dim=1, keepdim=True) - mean_u * mean_g - h * k  # E / n
    wr = weight * rstd
    of_xhat = p - wr * k
    # to_g = wr u + of_xhat xhat + constant
    slope = of_xhat * rstd
    to_g = torch.addcmul(q - wr * mean_u - slope * mean, u, wr).addcmul_(flat, slope)
    # z = of_xhat g + of_u u;  to_x = rstd z + of_x x + constant
    of_u = -wr * h
    mean_z, z_xhat = of_xhat * mean_g + of_u * mean_u, of_xhat * h + of_u * k
    of_x = -(z_xhat + wr * e) * rstd * rstd
    to_x = torch.addcmul(-rstd * mean_z - of_x * mean, g, rstd * of_xhat)
    to_x = to_x.addcmul_(u, rstd * of_u).addcmul_(flat, of_x).to(x.dtype)
    to_x = to_x.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return to_g, to_x, (n * rstd * e).sum(dim=(0, 1))


def _before_pool(grad: Tensor, y: Tensor | None) -> Tensor:
    """The norm's output gradient (B, H*W, D), from that of the norm, or of norm, ReLU and pooling."""
    return _pixels_first(grad) if y is None else _relu_pool_backward(y, grad)


def _after_pool(to_g: Tensor, y: Tensor | None, x: Tensor) -> Tensor:
    """The transpose of `_before_pool`: (B, H*W, D) -> (B, D, H, W), or (B, D, H / 2, W / 2)."""
    batch, channels, height, width = x.shape
    image = to_g.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return image if y is None else F.avg_pool2d(torch.ops.aten.threshold_backward(image, y, 0), 2)
