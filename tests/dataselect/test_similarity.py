"""Similarities by blocks: the formulas, whatever the blocks; sums over half of them; rows of zeros."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from dataselect import similarity as under_test
from dataselect.similarity import (
    SimilarityKind,
    median_distance,
    refuse_non_finite,
    similarity_of,
    similarity_sums,
    spans,
)
from distill.errors import NonFiniteError

KINDS = get_args(SimilarityKind)


def rows(n: int, width: int, seed: int = 0) -> Tensor:
    """float32 (n, width), centred."""
    features = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return features - features.mean(dim=0)


def slow_similarity(features: np.ndarray, kind: str, bandwidth: float = 1.0) -> np.ndarray:
    """The table of the file's head in float64, pair by pair: (N, N)."""
    x = features.astype(np.float64)
    n = len(x)
    found = np.zeros((n, n))
    lengths = [np.sqrt((row**2).sum()) for row in x]
    for i in range(n):
        for j in range(n):
            apart = np.sqrt(((x[i] - x[j]) ** 2).sum())
            whole = lengths[i] * lengths[j]
            cosine = (x[i] * x[j]).sum() / whole if whole else 0.0
            found[i, j] = {
                "cosine": max(0.0, cosine),
                "shifted_cosine": (1 + cosine) / 2,
                "rbf": np.exp(-(apart**2) / (2 * bandwidth**2)),
                "distance": 2 * max(lengths) - apart,
            }[kind]
    return found


def options(kind: str, bandwidth: float = 1.5) -> dict[str, Any]:
    return {"bandwidth": bandwidth} if kind == "rbf" else {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 3), (20, 1), (33, 7), (50, 40)])
@pytest.mark.parametrize("seed", range(3))
def test_blocks_are_the_formula(kind: SimilarityKind, shape: tuple[int, int], seed: int) -> None:
    features = rows(*shape, seed=seed) if shape[0] > 1 else torch.ones(shape)
    wanted = slow_similarity(features.numpy(), kind, 1.5)
    found = similarity_of(features.clone(), kind, **options(kind))
    tolerance = {"atol": 2e-3 if kind == "distance" else 2e-6, "rtol": 1e-5}
    everything = found.block(slice(0, shape[0]), slice(0, shape[0]))
    np.testing.assert_allclose(everything.numpy(), wanted, **tolerance)
    np.testing.assert_allclose(found.own().numpy(), wanted.diagonal(), **tolerance)
    own = np.arange(0, shape[0], 3)
    some = torch.from_numpy(own)
    np.testing.assert_allclose(found.block(some, slice(0, 5)).numpy(), wanted[own, :5], **tolerance)
    np.testing.assert_allclose(found.between(some, some).numpy(), wanted[np.ix_(own, own)], **tolerance)
    assert (everything >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_references_are_columns(kind: SimilarityKind) -> None:
    features, some = rows(40, 6), torch.tensor([3, 8, 9, 30])
    whole = similarity_of(features.clone(), kind, **options(kind))
    part = similarity_of(features.clone(), kind, references=some, **options(kind))
    assert part.size == (40, 4)
    torch.testing.assert_close(
        part.block(slice(0, 40), slice(0, 4)), whole.block(slice(0, 40), slice(0, 40))[:, some]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_similarity_does_not_depend_on_what_is_computed_beside_it(kind: SimilarityKind) -> None:
    """To the bit: one row or many, here or in the other half of the pairs, into a buffer or not."""
    features = rows(300, 64)
    found = similarity_of(features, kind, **options(kind, 8.0))
    whole = found.block(slice(0, 300), slice(0, 300))
    assert torch.equal(whole, whole.T)
    for size in (1, 2, 7, 16, 100):
        some = torch.randperm(300, generator=torch.Generator().manual_seed(size))[:size]
        assert torch.equal(found.block(some, slice(0, 300)), whole[some])
        assert torch.equal(found.block(slice(0, 300), slice(0, size)), whole[:, :size])
        assert torch.equal(found.between(some, some), whole[some][:, some])
        buffer = torch.full((size, 300), torch.nan)
        assert torch.equal(found.block(some, slice(0, 300), out=buffer), whole[some])
        assert torch.equal(buffer, whole[some])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("references", [None, torch.arange(0, 100, 3)])
@pytest.mark.parametrize("tile", [1, 7, 64, 512])
def test_sums_and_the_matrix_are_those_of_all_pairs(
    kind: SimilarityKind, references: Tensor | None, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "_TILE", tile)
    features = rows(100, 8)
    found = similarity_of(features, kind, references=references, **options(kind))
    whole = found.block(slice(0, 100), slice(0, found.size[1]))
    out = torch.full(found.size, torch.nan)
    sums = similarity_sums(found, out=out)
    torch.testing.assert_close(sums, whole.double().sum(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(similarity_sums(found), sums, rtol=0, atol=0)
    assert torch.equal(out, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_equal_get_equal_similarities(kind: SimilarityKind) -> None:
    features = rows(60, 16)
    features[40] = features[3]
    found = similarity_of(features, kind, **options(kind))
    whole = found.block(slice(0, 60), slice(0, 60))
    assert torch.equal(whole[40], whole[3]) and torch.equal(whole[:, 40], whole[:, 3])


@pytest.mark.parametrize(
    ("kind", "alike"), [("cosine", 0.0), ("shifted_cosine", 0.5), ("rbf", 1.0), ("distance", 0.0)]
)
def test_rows_of_zeros_have_no_direction(kind: SimilarityKind, alike: float) -> None:
    found = similarity_of(torch.zeros(5, 3), kind)
    assert found.block(slice(0, 5), slice(0, 5)).unique().tolist() == [alike]
    assert found.own().tolist() == [alike] * 5


def test_median_distance_is_that_of_all_pairs_of_few_rows() -> None:
    features = rows(30, 4)
    apart = [float((a - b).norm()) for i, a in enumerate(features) for b in features[:i]]
    assert median_distance(features, seed=0) == pytest.approx(sorted(apart)[(len(apart) - 1) // 2], rel=1e-5)
    assert median_distance(features, seed=0) == pytest.approx(median_distance(features, seed=1))


def test_median_distance_leaves_equal_rows_out() -> None:
    assert median_distance(torch.tensor([[0.0], [0.0], [0.0], [2.0]]), seed=0) == 2
    assert median_distance(torch.zeros(4, 2), seed=0) == 1
    assert median_distance(torch.ones(1, 2), seed=0) == 1


def test_median_distance_of_many_rows_is_that_of_a_sample_by_the_seed() -> None:
    features = rows(3000, 4)
    found = [median_distance(features, seed=seed) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert found[0] == pytest.approx(found[2], rel=0.05)


def test_spans_cover_all_references() -> None:
    for count in (1, under_test._SPAN - 1, under_test._SPAN, under_test._SPAN + 1, 3 * under_test._SPAN):
        parts = spans(count)
        assert [each.start for each in parts] == [0, *(each.stop for each in parts[:-1])]
        assert parts[-1].stop == count


def test_features_that_are_no_numbers_are_refused() -> None:
    features = torch.zeros(5000, 2)
    refuse_non_finite(features)
    for value in (torch.nan, torch.inf):
        features[4321, 1] = value
        with pytest.raises(NonFiniteError) as caught:
            refuse_non_finite(features)
        assert caught.value.found == "row 4321 of 5000"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_equals_cpu(kind: SimilarityKind) -> None:
    features = rows(700, 32)
    on_cpu = similarity_of(features.clone(), kind, **options(kind, 8.0))
    on_gpu = similarity_of(features.cuda(), kind, **options(kind, 8.0))
    torch.testing.assert_close(similarity_sums(on_gpu).cpu(), similarity_sums(on_cpu), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("width", [769, 1000, 2048])
@pytest.mark.parametrize("kind", ["cosine", "rbf"])
def test_wide_features_have_one_similarity_whatever_is_computed_beside_it(
    width: int, kind: SimilarityKind
) -> None:
    """From some 800 features on BLAS would add up in another order for blocks of other shapes."""
    draw = torch.Generator().manual_seed(0)
    half = torch.randn(550, width, generator=draw)
    similarity = similarity_of(torch.cat([half, half]), kind)
    whole = torch.empty(1100, 1100)
    similarity_sums(similarity, out=whole)
    for rows in (slice(0, 16), slice(300, 812), slice(1090, 1100), slice(7, 8)):
        assert torch.equal(similarity.block(rows, slice(0, 1100)), whole[rows])
    assert torch.equal(whole[:550], whole[550:]), "twins are alike"
