"""GSAM's gradients against the paper's formulas, written out for one network in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distill.training.gsam import replace_gradients
from distill.training.job import Job
from distill.training.loop import train

MakeJob = Callable[..., Job]
RHO, ALPHA = 0.05, 0.3
NETWORKS = 3


def loss_of(matrix: Tensor, vector: Tensor, x: Tensor) -> Tensor:
    """Of one network; not quadratic, so that the gradient moves in every direction."""
    return (torch.tanh(x @ matrix) @ vector).exp().sum()


def expected(matrix: Tensor, vector: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    w = torch.cat([matrix.reshape(-1), vector])

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(loss_of(at[:12].view(4, 3), at[12:], x), at)[0]

    g = gradient(w)
    e = RHO * w**2 * g / (w.abs() * g).norm()
    g_p = gradient(w + e)
    cos = (g @ g_p) / (g.norm() * g_p.norm())
    u = g - cos * g.norm() * g_p / g_p.norm()
    step = g_p - ALPHA * u
    return step[:12].view(4, 3), step[12:]


@pytest.fixture
def stack() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw(NETWORKS, 4, 3), draw(NETWORKS, 3), draw(NETWORKS, 5, 4)


def test_one_network(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    matrix, vector, x = (part[0].clone() for part in stack)
    before = matrix.clone()
    wanted = expected(matrix, vector, x)
    parameters = [matrix.requires_grad_(), vector.requires_grad_()]

    def backward() -> None:
        matrix.grad = vector.grad = None
        loss_of(matrix, vector, x).backward()

    backward()
    replace_gradients(parameters, backward, rho=RHO, alpha=ALPHA, stacked=False)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=0)
    assert torch.equal(matrix, before), "the weights are put back"


def test_each_network_of_a_stack_has_its_own(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    matrix, vector, x = stack
    wanted = [expected(*parts) for parts in zip(matrix, vector, x, strict=True)]
    parameters = [matrix.requires_grad_(), vector.requires_grad_()]

    def backward() -> None:
        matrix.grad = vector.grad = None
        torch.vmap(loss_of)(matrix, vector, x).sum().backward()

    backward()
    replace_gradients(parameters, backward, rho=RHO, alpha=ALPHA, stacked=True)
    for place, parameter in enumerate(parameters):
        gradients = torch.stack([gradient[place] for gradient in wanted])
        torch.testing.assert_close(parameter.grad, gradients, rtol=1e-10, atol=0)


def test_small_gradients_are_treated_as_great_ones(stack: tuple[Tensor, Tensor, Tensor]) -> None:
    """The square of this gradient's norm lies below the least norm that is divided by; the norm itself does not."""
    matrix, vector, x = (part[0].clone() for part in stack)
    wanted = expected(matrix, vector, x)
    parameters = [matrix.requires_grad_(), vector.requires_grad_()]

    def backward() -> None:
        matrix.grad = vector.grad = None
        (loss_of(matrix, vector, x) * 1e-9).backward()

    backward()
    replace_gradients(parameters, backward, rho=RHO, alpha=ALPHA, stacked=False)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient * 1e-9, rtol=1e-10, atol=0)


def test_a_gradient_of_zero_stays_zero() -> None:
    parameter = torch.ones(3, requires_grad=True)

    def backward() -> None:
        parameter.grad = torch.zeros(3)

    backward()
    replace_gradients([parameter], backward, rho=RHO, alpha=ALPHA, stacked=False)
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.zeros(3))


def test_training_uses_it(make_job: MakeJob) -> None:
    cpu = torch.device("cpu")
    plain, flat = (train([make_job(gsam_rho=rho)], device=cpu, dtype=torch.float32)[0] for rho in (0.0, 0.05))
    alone = [
        train([make_job(gsam_rho=0.05, seed=seed)], device=cpu, dtype=torch.float32)[0] for seed in (0, 1)
    ]
    stacked = train([make_job(gsam_rho=0.05, seed=seed) for seed in (0, 1)], device=cpu, dtype=torch.float32)
    assert flat.loss != plain.loss
    assert [each.loss for each in stacked] == pytest.approx([each.loss for each in alone], abs=1e-4)
