"""ZCA against its definition, and the way back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distill import whitening as whitening_module
from distill.cache.identity import preprocessing_parts
from distill.errors import InputError, MemoryExhaustedError
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


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_threads_do_not_change_it() -> None:
    """One bit in it, and experts that are kept would be trained again. Of this size, two threads round otherwise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (300, 3, 12, 12), generator=generator, dtype=torch.uint8)
    two = fit_zca(images)
    assert torch.get_num_threads() == 2, "put back"
    torch.set_num_threads(1)
    one = fit_zca(images)
    assert preprocessing_parts(two) == preprocessing_parts(one)
    assert two.zca_inverse is not None and one.zca_inverse is not None
    assert two.zca_inverse.tobytes() == one.zca_inverse.tobytes()


@pytest.mark.parametrize(("count", "found"), [(0, "0 training images"), (1, "1 training image")])
def test_too_few_images_are_refused(count: int, found: str, images: torch.Tensor) -> None:
    with pytest.raises(InputError, match="ZCA whitening needs the covariance") as caught:
        fit_zca(images[:count])
    assert caught.value.found == found
    assert caught.value.allowed == "2 training images or more"
    assert "leave zca out" in str(caught.value)


def test_two_images_are_enough(images: torch.Tensor) -> None:
    made = fit_zca(images[:2])
    assert made.zca is not None and torch.from_numpy(made.zca).isfinite().all()


@pytest.mark.usefixtures("two_threads")
def test_images_that_are_too_large_for_the_memory() -> None:
    """The covariance of 3 x 1024 x 1024 pixel values is 72 TiB."""
    images = torch.zeros(1, dtype=torch.uint8).expand(2, 3, 1024, 1024)
    with pytest.raises(MemoryExhaustedError, match="ZCA whitening to images of 3 x 1024 x 1024 px") as caught:
        fit_zca(images)
    assert "lower data.resize" in str(caught.value)
    assert torch.get_num_threads() == 2


def test_other_errors_of_the_decomposition_pass(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(matrix: torch.Tensor) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    with pytest.raises(RuntimeError, match="something else"):
        fit_zca(images)
