"""ZCA against its definition, and the way back."""

from __future__ import annotations

import pytest
import torch

from distill import whitening as whitening_module
from distill.preprocessing import Transform
from distill.whitening import EPS, fit_zca


@pytest.fixture
def images() -> torch.Tensor:
    """uint8 (70, 2, 4, 4) whose pixels go together."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 200, (70, 2, 4, 1), generator=generator)
    return (base + torch.randint(0, 50, (70, 2, 4, 4), generator=generator)).to(torch.uint8)


def test_against_the_singular_value_decomposition(images: torch.Tensor) -> None:
    """As kornia computes it: U diag(1 / sqrt(s + eps)) U^T of the covariance."""
    made = fit_zca(images)
    x = images.flatten(1).double() / 255
    centred = x - x.mean(dim=0)
    u, s, _ = torch.linalg.svd(centred.T @ centred / (len(x) - 1))
    wanted = u @ torch.diag((s + EPS).rsqrt()) @ u.T
    assert made.zca is not None and made.zca_mean is not None
    torch.testing.assert_close(torch.from_numpy(made.zca).double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.from_numpy(made.zca_mean).double(), x.mean(dim=0), rtol=1e-6, atol=1e-7)
    assert (made.mean, made.std) == ((0.0, 0.0), (1.0, 1.0))


def test_whitened_pixels_have_the_shrunk_identity_as_covariance(images: torch.Tensor) -> None:
    made = fit_zca(images, eps=1e-6)
    z = Transform(made)(images).flatten(1).double()
    covariance = z.T @ z / (len(z) - 1)
    torch.testing.assert_close(covariance, torch.eye(32, dtype=torch.float64), rtol=0, atol=5e-3)
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(32, dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_way_back(images: torch.Tensor) -> None:
    transform = Transform(fit_zca(images))
    torch.testing.assert_close(
        transform.pixels(transform(images)), images.float() / 255, rtol=1e-4, atol=1e-5
    )


def test_blocks_do_not_change_it(images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_zca(images)
    monkeypatch.setattr(whitening_module, "_BLOCK", 7)
    torch.testing.assert_close(fit_zca(images).zca, whole.zca, rtol=1e-6, atol=1e-7)


def test_a_pixel_that_never_changes() -> None:
    made = fit_zca(torch.full((5, 1, 2, 2), 9, dtype=torch.uint8))
    assert made.zca is not None and torch.from_numpy(made.zca).isfinite().all()
