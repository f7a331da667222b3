"""The fast norm against torch's own operations, over dtypes, layouts and orders of differentiation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import distill.models.norm as norm
from distill.models.norm import InstanceNorm, NormReluPool

TOLERANCE = {
    torch.float64: {"atol": 1e-12, "rtol": 1e-10},
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 4e-2, "rtol": 4e-2},
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]
LAYERS = [InstanceNorm, NormReluPool]


def reference(layer: type[nn.Module]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch's operations in NCHW."""

    def normalise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.group_norm(x.contiguous(), x.shape[1], weight, bias)
        return F.avg_pool2d(F.relu(y), 2) if layer is NormReluPool else y

    return normalise


def make(layer: type[nn.GroupNorm], channels: int, dtype: torch.dtype = torch.float32) -> nn.GroupNorm:
    """A layer whose parameters are not 1 and 0."""
    module = layer(channels).to(dtype)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        module.weight.copy_(torch.randn(channels, generator=draw))
        module.bias.copy_(torch.randn(channels, generator=draw))
    return module


def images(*shape: int, dtype: torch.dtype = torch.float32, layout: torch.memory_format) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 2 + 0.5
    return x.to(dtype).contiguous(memory_format=layout).requires_grad_()


@pytest.fixture
def fast_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often the hand-written backward ran: one entry a call."""
    calls: list[int] = []
    written_out = norm._norm_backward

    def counted(*args: Tensor) -> tuple[Tensor, ...]:
        calls.append(1)
        return written_out(*args)

    monkeypatch.setattr(norm, "_norm_backward", counted)
    return calls


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [(8, 8), (6, 4), (7, 5), (2, 2)])
def test_forward_and_backward_equal_torch(layer, layout, dtype, side, fast_calls) -> None:
    module = make(layer, 5, torch.float32 if dtype == torch.bfloat16 else dtype)
    x = images(3, 5, *side, dtype=dtype, layout=layout)
    y = module(x)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = torch.autograd.grad(y, (x, module.weight, module.bias), upstream)

    exact = [each.detach().double().requires_grad_() for each in (x, module.weight, module.bias)]
    wanted = reference(layer)(*exact)
    expected = torch.autograd.grad(wanted, exact, upstream.double())
    assert y.dtype == dtype
    assert [each.dtype for each in got] == [dtype, module.weight.dtype, module.bias.dtype]
    torch.testing.assert_close(y.double(), wanted, **TOLERANCE[dtype])
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **TOLERANCE[dtype])
    assert len(fast_calls) == (layout == torch.channels_last)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradient_in_another_layout(layer) -> None:
    """A sum's gradient is expanded from one number, and a flatten's is NCHW."""
    module, x = make(layer, 4), images(2, 4, 6, 6, layout=torch.channels_last)
    plain = reference(layer)(x, module.weight, module.bias)
    ours, theirs = (
        torch.autograd.grad((y.sum() + y.flatten(1).square().sum()), x)[0] for y in (module(x), plain)
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layer", LAYERS)
def test_large_mean(layer) -> None:
    """Pixels far from 0: the sums cancel, and still agree with float64."""
    module, x = make(layer, 3), images(2, 3, 8, 8, layout=torch.channels_last)
    x = (x.detach() + 30).requires_grad_()
    exact = [each.detach().double().requires_grad_() for each in (x, module.weight, module.bias)]
    ours = torch.autograd.grad(module(x).square().sum(), x)[0]
    theirs = torch.autograd.grad(reference(layer)(*exact).square().sum(), exact[0])[0]
    torch.testing.assert_close(ours.double(), theirs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layer", LAYERS)
def test_gradcheck_of_both_orders(layer, fast_calls) -> None:
    module = make(layer, 2, torch.float64)
    x = images(2, 2, 4, 2, dtype=torch.float64, layout=torch.channels_last)

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(
            module, {"weight": weight, "bias": bias}, (x.contiguous(memory_format=torch.channels_last),)
        )

    assert gradcheck(call, (x, module.weight, module.bias))
    assert fast_calls
    assert gradgradcheck(call, (x, module.weight, module.bias))


@pytest.mark.parametrize("layer", LAYERS)
def test_second_derivative_where_the_weight_comes_from_the_image(layer) -> None:
    """Each input's gradient holds its own part alone, though one is computed from the other."""
    x = images(2, 3, 4, 4, dtype=torch.float64, layout=torch.channels_last)
    module = make(layer, 3, torch.float64)

    def penalty(normalise: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        weight = x.mean(dim=(0, 2, 3)).exp()
        (slope,) = torch.autograd.grad(normalise(x, weight, module.bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), x)[0]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional_call(module, {"weight": weight, "bias": bias}, (x,))

    torch.testing.assert_close(penalty(ours), penalty(reference(layer)))


@pytest.mark.parametrize("layer", LAYERS)
def test_only_some_inputs_want_gradients(layer) -> None:
    module = make(layer, 3, torch.float64)
    x = images(2, 3, 4, 4, dtype=torch.float64, layout=torch.channels_last).detach()
    module.bias.requires_grad_(False)
    slopes = [
        torch.autograd.grad(
            f(x, module.weight, module.bias).square().sum(), module.weight, create_graph=True
        )[0]
        for f in (lambda x, weight, bias: module(x), reference(layer))
    ]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(*(torch.autograd.grad(s.sum(), module.weight)[0] for s in slopes))


@pytest.mark.parametrize("layer", LAYERS)
def test_bfloat16_autocast(layer, fast_calls) -> None:
    """Under autocast, as training has it: a bfloat16 convolution before, float32 parameters."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 5, 3, padding=1).to(memory_format=torch.channels_last)
    module, x = make(layer, 5), torch.randn(4, 3, 8, 8)
    plain = reference(layer)
    results = []
    for call in (module, lambda y: plain(y, module.weight, module.bias)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = call(convolution(x))
        assert y.dtype == torch.bfloat16
        results.append(
            torch.autograd.grad(y.float().square().sum(), [*convolution.parameters(), *module.parameters()])
        )
    assert fast_calls
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm() + 0.5


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_vmap_of_grad(layer, layout) -> None:
    """Per-sample gradients by torch.func equal a loop; both of the image and of the layer's parameters."""
    module = make(layer, 4)
    x = images(3, 4, 6, 6, layout=layout).detach()
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return (
            functional_call(module, parameters, (image[None].contiguous(memory_format=layout),))
            .square()
            .sum()
        )

    mapped = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for k in range(3):
        image = x[k : k + 1].contiguous(memory_format=layout)
        one = torch.autograd.grad(module(image).square().sum(), (module.weight, module.bias))
        for name, expected in zip(("weight", "bias"), one, strict=True):
            torch.testing.assert_close(mapped[name][k], expected, atol=1e-4, rtol=1e-4)


def test_grad_of_the_parameters_alone() -> None:
    """The image is an ordinary tensor in channels_last while the parameters belong to a transform."""
    module, x = make(InstanceNorm, 3), images(2, 3, 4, 4, layout=torch.channels_last).detach()
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    found = grad(lambda p: functional_call(module, p, (x,)).square().sum())(parameters)
    expected = torch.autograd.grad(module(x).square().sum(), module.weight)[0]
    torch.testing.assert_close(found["weight"], expected, atol=1e-4, rtol=1e-4)


def test_state_dict_is_that_of_group_norm() -> None:
    state = nn.GroupNorm(4, 4).state_dict()
    for layer in LAYERS:
        layer(4).load_state_dict(state)
        assert list(layer(4).state_dict()) == list(state)


def test_output_keeps_channels_last() -> None:
    for layer in LAYERS:
        x = images(2, 4, 6, 6, layout=torch.channels_last)
        y = layer(4)(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
