"""Gradients that look for flat minima: GSAM.

With g the gradient at the weights w, in the adaptive form that expert trajectories use,

    e = rho w^2 g / ||  |w| g  ||,    g_p = the gradient of the same batch at w + e,
    u = g - (g . g_p) g_p / ||g_p||^2,    and the step goes along g_p - alpha u.

Sources: Zhuang et al., "Surrogate Gap Minimization Improves Sharpness-Aware Training", ICLR 2022; the
adaptive e of Kwon et al., ICML 2021; both as in the released code of Du et al., CVPR 2023, for experts.
Norms and products are those of one network: of a stack, each has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LEAST = 1e-12  # of a norm that is divided by


@torch.no_grad()
def replace_gradients(
    parameters: Sequence[Tensor],
    backward: Callable[[], object],
    *,
    rho: float,
    alpha: float,
    stacked: bool,
) -> None:
    """Put GSAM's gradients in the place of those that the parameters hold.

    Args:
        parameters: with the gradients of a batch; each (K, ...) where K networks are stacked.
        backward: computes the same batch's gradients again, at the weights as they then are.
        rho: how far the weights are moved.
        alpha: weight of the part of g that is orthogonal to g_p.
        stacked: whether the first dimension counts networks.
    """
    plain = [_gradient(parameter).clone() for parameter in parameters]
    before = [parameter.clone() for parameter in parameters]
    scaled = [weight.abs() * grad for weight, grad in zip(before, plain, strict=True)]
    factor = rho / _dot(scaled, scaled, stacked).sqrt().clamp(min=_LEAST)
    for parameter, weight, grad in zip(parameters, before, plain, strict=True):
        parameter.add_(weight.square() * grad * _like(factor, grad, stacked))
    with torch.enable_grad():
        backward()
    for parameter, weight in zip(parameters, before, strict=True):
        parameter.copy_(weight)
    moved = [_gradient(parameter) for parameter in parameters]
    share = _dot(plain, moved, stacked) / _dot(moved, moved, stacked).clamp(min=_LEAST**2)
    for grad, own in zip(plain, moved, strict=True):
        orthogonal = grad - _like(share, own, stacked) * own
        own.sub_(orthogonal, alpha=alpha)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a backward pass went before"
    return parameter.grad


def _dot(a: Sequence[Tensor], b: Sequence[Tensor], stacked: bool) -> Tensor:
    """Product of each network's tensors, (K,), or of the one network's, (1,)."""
    parts = [
        (x * y).flatten(1).sum(dim=1) if stacked else (x * y).sum()[None] for x, y in zip(a, b, strict=True)
    ]
    return torch.stack(parts).sum(dim=0)


def _like(values: Tensor, tensor: Tensor, stacked: bool) -> Tensor:
    """(K,) shaped so that it multiplies (K, ...); (1,) multiplies anything."""
    return values.view(-1, *[1] * (tensor.ndim - 1)) if stacked else values
