"""Convolutions whose gradient is differentiated once more: both derivatives in four convolutions' time.

With y = conv(x, w) + b, g = dL/dy, and `*` for what a convolution's backward pass does with its two arguments:

    dL/dx = g *in w,    dL/dw = g *weight x,    dL/db = sum(g)

and with u, v, q the gradients of a loss s with respect to these three,

    ds/dg = conv(u, w) + conv(x, v) + q,    ds/dx = g *in v,    ds/dw = g *weight u.

torch's own second derivative computes the same by convolutions with exchanged dimensions, whose filters are as large
as images; on a CPU it takes 1.3 to 2.3 times as long (measured on the ConvNet's three, width 128, batch 32).

Two things that a network cannot know of itself and that trajectory matching does not need are left out, see `Inner`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(eq=False)
class Inner:
    """What the convolutions of one network must know of the inner step that they are computed in.

    An inner step's gradient is that of the parameters. It needs no gradient of the network's input, though a gradient
    of the input may be wanted of the graph later. And where only products with the Hessian are wanted of it, the
    value of the convolutions' part is not; what they would have told of beta, sum of gradient * v, is collected.

    Args:
        input: what the network was given, None outside of a call.
        values: whether the gradient's value is wanted.
        product: sum over the convolutions of <dL/dw, v> + <dL/db, q>, where values were not wanted; ().
    """

    input: Tensor | None = None
    values: bool = True
    product: Tensor | None = None

    def add(self, product: Tensor) -> None:
        self.product = product if self.product is None else self.product + product

    def take(self) -> Tensor | float:
        """The sum so far, which begins anew."""
        product, self.product = self.product, None
        return 0.0 if product is None else product


class Convolution(nn.Conv2d):
    """The same convolution, parameters and all, within inner steps."""

    inner: Inner

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, D', H', W')."""
        if self.padding_mode != "zeros" or torch._C._are_functorch_transforms_active():
            return super().forward(x)
        padding = self.padding
        assert not isinstance(padding, str), "a padding in words is refused by `with_second_derivative`"
        options = _Options(self.stride, padding, self.dilation, self.groups, x is self.inner.input)
        return _Convolve.apply(x, self.weight, self.bias, options, self.inner)


def with_second_derivative(module: nn.Module) -> Inner:
    """Turn the module's convolutions, in place, into ones that are differentiated twice at less cost."""
    inner = Inner()
    for part in module.modules():
        if type(part) is nn.Conv2d and not isinstance(part.padding, str):
            part.__class__ = Convolution
            part.inner = inner  # type: ignore[assignment]
    return inner


@dataclass(frozen=True)
class _Options:
    """Of a convolution; `outer` where its input is the network's."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    outer: bool

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.conv2d(x, w, b, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, g: Tensor, x: Tensor, w: Tensor, wanted: tuple[bool, bool, bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of x, w and the bias, those that are `wanted`."""
        return torch.ops.aten.convolution_backward(
            *(g, x, w, [len(w)], self.stride, self.padding, self.dilation, False, [0, 0], self.groups),
            list(wanted),
        )


class _Convolve(torch.autograd.Function):
    """x (B, D, H, W), w (D', D, h, w), b (D',) or None -> (B, D', H', W')."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, options: _Options, inner: Inner) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.options, ctx.inner = options, inner
        return options.forward(x, w, b)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        wanted, values = ctx.needs_input_grad[:3], True
        if torch.is_grad_enabled():  # the gradient of an inner step, which is differentiated later
            wanted = (wanted[0] and not ctx.options.outer, *wanted[1:])
            values = ctx.inner.values
        return (*_Backward.apply(g, x, w, wanted, values, ctx.options, ctx.inner), None, None)


class _Backward(torch.autograd.Function):
    """Gradients of x, w and b, or None."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        x: Tensor,
        w: Tensor,
        wanted: tuple[bool, bool, bool],
        values: bool,
        options: _Options,
        inner: Inner,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.inner, ctx.values = options, inner, values
        if values:
            return options.backward(g, x, w, wanted)
        to_x, _, _ = options.backward(g, x, w, (wanted[0], False, False))
        absent = torch.zeros((), dtype=w.dtype, device=w.device)
        return to_x, absent.expand_as(w) if wanted[1] else None, absent.expand(len(w)) if wanted[2] else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None, q: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, w = ctx.saved_tensors
        options: _Options = ctx.options
        assert q is None or v is not None, "of a layer's filters and bias both are parameters"
        to_g = to_x = to_w = None
        if v is not None:
            to_g = options.forward(x, v, q)
            if not ctx.values:
                ctx.inner.add(_dot(g, to_g))
            to_x, _, _ = options.backward(g, x, v, (True, False, False))
        if u is not None:
            part = options.forward(u, w)
            to_g = part if to_g is None else to_g.add_(part)
            _, to_w, _ = options.backward(g, u, w, (False, True, False))
        return to_g, to_x, to_w, None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two (B, D, H, W), of which a need not lie as b does; ()."""
    return torch.dot(b.permute(0, 2, 3, 1).reshape(-1), a.permute(0, 2, 3, 1).reshape(-1))
