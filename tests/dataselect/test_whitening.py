"""Whitening: white where it can be, against numpy in float64; and what becomes of features that leave no choice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dataselect.whitening import whiten
from distill.errors import InputError


def drawn(seed: int, *, rows: int = 300, width: int = 6, target: int = 80) -> tuple[Tensor, Tensor]:
    """Correlated features of very different scales, off the origin; float32."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.logspace(0, 2, width)
    both = (rng.normal(size=(rows + target, width)) @ mixing + 20).astype(np.float32)
    return torch.from_numpy(both[:rows].copy()), torch.from_numpy(both[rows:].copy())


def slow(
    candidates: Tensor, target: Tensor, eps: float, *, relative: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """L^{-1} x row by row in float64, not yet of length 1; and of length 1."""
    rows = torch.cat([candidates, target]).double().numpy()
    rows = rows - rows.mean(axis=0)
    covariance = rows.T @ rows / len(rows)
    ridge = eps * np.trace(covariance) / len(covariance) if relative else eps
    factor = np.linalg.cholesky(covariance + ridge * np.eye(len(covariance)))
    white = np.stack([np.linalg.inv(factor) @ row for row in rows])
    return white, white / np.linalg.norm(white, axis=1, keepdims=True)


def whitened(candidates: Tensor, target: Tensor, **options: object) -> np.ndarray:
    candidates, target = candidates.clone(), target.clone()
    whiten(candidates, target, **{"eps": 1e-4, **options})  # type: ignore[arg-type]
    return torch.cat([candidates, target]).double().numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(300, 6, 80), (1, 3, 1), (5, 20, 4), (5000, 3, 2)])
@pytest.mark.parametrize("relative", [True, False])
def test_equals_the_formula_in_float64(seed: int, shape: tuple[int, int, int], relative: bool) -> None:
    parts = drawn(seed, rows=shape[0], width=shape[1], target=shape[2])
    found = whitened(*parts, eps=1e-3, unit="variance" if relative else "absolute")
    np.testing.assert_allclose(found, slow(*parts, 1e-3, relative=relative)[1], atol=2e-5)


def test_the_covariance_before_lengths_is_the_identity() -> None:
    """Directions are those of white rows: their lengths given back, the covariance is the identity. The release's
    transposed factor leaves it far from that."""
    parts = drawn(0)
    white, _ = slow(*parts, 0)
    lengths = np.linalg.norm(white, axis=1, keepdims=True)
    found = whitened(*parts, eps=0.0) * lengths
    np.testing.assert_allclose(found.T @ found / len(found), np.eye(6), atol=1e-4)
    rows = torch.cat(parts).double().numpy()
    rows -= rows.mean(axis=0)
    transposed = rows @ np.linalg.inv(np.linalg.cholesky(rows.T @ rows / len(rows)))
    assert np.abs(transposed.T @ transposed / len(rows) - np.eye(6)).max() > 1


@pytest.mark.parametrize("seed", range(3))
def test_distances_do_not_change_under_an_invertible_linear_map(seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    turn, stretch = np.linalg.qr(rng.normal(size=(6, 6)))[0], np.diag([1.0, 2, 4, 8, 16, 32])
    through = torch.from_numpy(turn @ stretch @ np.linalg.qr(rng.normal(size=(6, 6)))[0])
    parts = [torch.from_numpy(rng.normal(size=(rows, 6))).float() for rows in (300, 80)]
    mapped = [(part.double() @ through).float() for part in parts]

    def distances(rows: np.ndarray) -> np.ndarray:
        return np.linalg.norm(rows[:, None] - rows[None, :40], axis=2)

    gaps = [
        np.abs(distances(whitened(*parts, eps=eps)) - distances(whitened(*mapped, eps=eps))).max()
        for eps in (1e-1, 1e-3, 1e-9)
    ]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2], "as eps goes to 0"
    assert gaps[2] < 1e-4


def test_a_rank_deficient_covariance_is_whitened_where_it_has_a_rank() -> None:
    parts = drawn(1)
    lifted = tuple(torch.cat([part, part[:, :2] - part[:, 2:4]], dim=1) for part in parts)
    found = whitened(*lifted, eps=1e-6)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)


def test_a_singular_covariance_without_eps_is_refused() -> None:
    candidates, target = torch.eye(3), torch.eye(3)[:1]  # centred, they span two of three dimensions
    candidates = torch.cat([candidates, torch.zeros(3, 2)], dim=1)
    target = torch.cat([target, torch.zeros(1, 2)], dim=1)
    with pytest.raises(InputError, match="cannot be inverted") as caught:
        whiten(candidates, target, eps=0.0)
    assert (caught.value.where, caught.value.fix) == ("eps", "raise eps")


def test_features_that_are_constant_have_no_say() -> None:
    parts = drawn(2)
    wider = tuple(torch.cat([part, torch.full((len(part), 1), 7.3)], dim=1) for part in parts)
    found = whitened(*wider, eps=1e-9)
    assert np.abs(found[:, 6]).max() < 1e-6
    np.testing.assert_allclose(found[:, :6], whitened(*parts, eps=1e-9), atol=1e-4)


@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_rows_that_are_all_alike_become_zero(value: float, eps: float) -> None:
    """0.1 has no exact mean: what is left of it must not be blown up to length 1."""
    assert not whitened(torch.full((7, 3), value), torch.full((2, 3), value), eps=eps).any()


def test_duplicates_stay_duplicates() -> None:
    candidates, target = drawn(3)
    candidates[7] = candidates[200]
    target[0] = candidates[200]
    found = whitened(candidates, target)
    np.testing.assert_array_equal(found[7], found[200])
    np.testing.assert_allclose(found[len(candidates)], found[200], atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_features_that_are_not_finite_are_refused(bad: float, place: int) -> None:
    parts = drawn(0)
    parts[place][3, 1] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        whiten(*parts, eps=1e-4)


def test_more_features_than_memory_takes_are_refused() -> None:
    with pytest.raises(InputError, match="whitening 6 features takes 864 bytes") as caught:
        whiten(*drawn(0), eps=1e-4, memory=800)
    assert caught.value.allowed == "at least 864 bytes"


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = drawn(4)
    wanted = whitened(*parts)
    monkeypatch.setattr("dataselect.whitening._BLOCK", 7)
    np.testing.assert_allclose(whitened(*parts), wanted, atol=1e-6)


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    parts = drawn(5)
    on_gpu = [part.cuda() for part in parts]
    whiten(*on_gpu, eps=1e-4)
    np.testing.assert_allclose(torch.cat(on_gpu).cpu().double().numpy(), whitened(*parts), atol=1e-5)
