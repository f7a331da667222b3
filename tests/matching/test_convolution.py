"""The convolution of inner steps against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distill.matching.convolution import Convolution, Inner, with_second_derivative

LAYERS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 2, "dilation": (2, 1), "padding": (1, 0)},
    "groups": {"kernel_size": 1, "groups": 2},
}


def pair(options: dict[str, object]) -> tuple[nn.Conv2d, nn.Conv2d, Inner]:
    """torch's convolution, and the same made ours."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = nn.Conv2d(4, 6, **options).double()  # type: ignore[arg-type]
    ours = nn.Conv2d(4, 6, **options).double()  # type: ignore[arg-type]
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, with_second_derivative(ours)


def draw(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian_products(layer: nn.Conv2d, x: Tensor, *, of_input: bool) -> list[Tensor]:
    """Derivatives of <first derivatives, fixed directions> with respect to everything."""
    parameters = list(layer.parameters())
    inner = [x, *parameters] if of_input else parameters
    found = torch.autograd.grad(layer(x).square().sum(), inner, create_graph=True)
    product = sum((part * draw(part.shape, 5 + k)).sum() for k, part in enumerate(found))
    assert isinstance(product, Tensor)
    return [*found, *torch.autograd.grad(product, [x, *parameters])]


@pytest.mark.parametrize("options", LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("of_input", [False, True])
def test_both_derivatives_are_those_of_torch(options, layout, of_input) -> None:
    theirs, ours, _ = pair(options)
    assert type(ours) is Convolution
    x = draw((3, 4, 7, 6), 1).contiguous(memory_format=layout).requires_grad_()
    assert torch.equal(ours(x), theirs(x))
    for got, expected in zip(
        hessian_products(ours, x, of_input=of_input),
        hessian_products(theirs, x, of_input=of_input),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", LAYERS.values(), ids=list(LAYERS))
def test_without_values_the_product_is_kept(options) -> None:
    theirs, ours, inner = pair(options)
    x = draw((3, 4, 7, 6), 1).requires_grad_()
    wanted = torch.autograd.grad(theirs(x).square().sum(), list(theirs.parameters()), create_graph=True)
    directions = [draw(part.shape, 5 + k) for k, part in enumerate(wanted)]
    inner.values = False
    found = torch.autograd.grad(ours(x).square().sum(), list(ours.parameters()), create_graph=True)
    assert not any(part.any() for part in found)
    got = torch.autograd.grad(found, [x, *ours.parameters()], directions)
    expected = torch.autograd.grad(wanted, [x, *theirs.parameters()], directions)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    product = sum((part * way).sum() for part, way in zip(wanted, directions, strict=True))
    torch.testing.assert_close(inner.take(), product.detach(), rtol=1e-12, atol=1e-12)
    assert inner.take() == 0.0


def test_the_networks_input_gets_no_gradient_of_an_inner_step() -> None:
    """But that of the graph, and that of a single backward pass, it gets."""
    theirs, ours, inner = pair(LAYERS["plain"])
    x = draw((2, 4, 5, 5), 1).requires_grad_()
    inner.input = x
    y = ours(x)
    inner.input = None
    assert torch.autograd.grad(y.square().sum(), x, create_graph=True, allow_unused=True)[0] is None
    (once,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(once, torch.autograd.grad(theirs(x).square().sum(), x)[0])
    (gradient,) = torch.autograd.grad(y.square().sum(), ours.weight, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), x)
    (plain,) = torch.autograd.grad(theirs(x).square().sum(), theirs.weight, create_graph=True)
    torch.testing.assert_close(again, torch.autograd.grad(plain.sum(), x)[0])


def test_what_it_does_not_know_stays_torchs() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"), nn.ConvTranspose2d(2, 2, 3), nn.Linear(2, 2))
    kinds = [type(part) for part in layers]
    with_second_derivative(layers)
    assert [type(part) for part in layers] == kinds


def test_other_padding_modes_and_transforms_take_torchs_way() -> None:
    layer = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular").double()
    x = draw((2, 1, 4, 4), 1)
    expected = layer(x)
    with_second_derivative(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(torch.vmap(layer)(x[:, None])[:, 0], expected)
