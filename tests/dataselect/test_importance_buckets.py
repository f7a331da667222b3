"""The density ratio by counts in buckets: plain forms, the angles of hashes, the fitted scale, and bounded memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from dataselect import standard_features
from dataselect.bucket_ratio import BucketRatio, Cells, Signs, cells, signs
from dataselect.clustering import kmeans
from distill.errors import InputError
from tests.dataselect.largest import Largest

CPU = torch.device("cpu")


def normal(count: int, width: int, *, seed: int, mean: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + mean


def plain_codes(planes: np.ndarray, bits: int, row: np.ndarray) -> list[int]:
    """The bucket of a row in each table, bit by bit."""
    out = []
    for table in range(planes.shape[1] // bits):
        code = 0
        for bit in range(bits):
            code += 2**bit * int(row @ planes[:, table * bits + bit] > 0)
        out.append(code)
    return out


def plain_sums(
    source: list[list[int]],
    target: list[list[int]],
    of: list[int],
    *,
    size: int,
    smoothing: float,
    drop: str = "",
) -> float:
    """sum over tables of ln p - ln q, sample by sample; `drop` leaves the sample itself out of a side."""
    total = 0.0
    for table, bucket in enumerate(of):
        own = sum(codes[table] == bucket for codes in target) - (drop == "target")
        rest = sum(codes[table] == bucket for codes in source) - (drop == "source")
        q = rest / (len(source) - (drop == "source"))
        pseudo = smoothing * size
        p = (own + pseudo * q) / (len(target) - (drop == "target") + pseudo)
        total += math.log(p + 1e-8) - math.log(q + 1e-8)
    return total


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_hashed_log_weights_are_those_of_a_plain_form(bits: int, smoothing: float) -> None:
    source, target = normal(40, 5, seed=1), normal(15, 5, seed=2, mean=0.6)
    tables = signs(5, tables=4, bits=bits, seed=3, device=CPU)
    planes = tables.planes.numpy()
    mine, own = (
        [plain_codes(planes, bits, row) for row in part.double().numpy()] for part in (source, target)
    )
    options = {"size": 2**bits, "smoothing": smoothing}
    wanted = [plain_sums(mine, own, codes, **options) for codes in mine]  # type: ignore[arg-type]
    ratio = BucketRatio(tables, source, target, smoothing=smoothing, combine="sum")
    np.testing.assert_allclose(ratio.log_weights(source), wanted, rtol=1e-9, atol=1e-12)
    mean = BucketRatio(tables, source, target, smoothing=smoothing, combine="mean")
    np.testing.assert_allclose(mean.log_weights(source), np.array(wanted) / 4, rtol=1e-9, atol=1e-12)
    for counts, codes in ((ratio.source, mine), (ratio.target, own)):
        wanted_counts = [np.bincount(table, minlength=2**bits) for table in np.array(codes).T]
        assert counts.tolist() == np.array(wanted_counts).tolist()


@pytest.mark.parametrize("bits", [1, 4])
def test_the_fitted_scale_is_the_slope_that_tells_left_out_samples_apart(bits: int) -> None:
    """Counts without the sample, one by one; and the best slope of a search, with the best intercept for each."""
    source, target = normal(150, 6, seed=4), normal(60, 6, seed=5, mean=0.3)
    tables = signs(6, tables=12, bits=bits, seed=6, device=CPU)
    planes = tables.planes.numpy()
    mine, own = (
        [plain_codes(planes, bits, row) for row in part.double().numpy()] for part in (source, target)
    )
    options = {"size": 2**bits, "smoothing": 0.2}
    of_source = np.array([plain_sums(mine, own, codes, drop="source", **options) for codes in mine])  # type: ignore[arg-type]
    of_target = np.array([plain_sums(mine, own, codes, drop="target", **options) for codes in own])  # type: ignore[arg-type]

    def loss(slope: float) -> float:
        """By Platt's targets: every sample on both sides, by shares that are its own side's."""

        def at(intercept: float) -> float:
            a, b = intercept + slope * of_source, intercept + slope * of_target
            from_source = (151 * np.logaddexp(0, a) + np.logaddexp(0, -a)).sum() / 152
            return float(from_source + (np.logaddexp(0, b) + 61 * np.logaddexp(0, -b)).sum() / 62)

        return float(minimize_scalar(at, options={"xtol": 1e-12}).fun)

    wanted = minimize_scalar(loss, bounds=(0, 1), method="bounded", options={"xatol": 1e-9}).x
    found = BucketRatio(tables, source, target, smoothing=0.2, combine="fitted")
    assert found.scale == pytest.approx(wanted, abs=1e-5)
    assert 0.05 < found.scale < 0.9, "neither bound"
    summed = BucketRatio(tables, source, target, smoothing=0.2, combine="sum")
    np.testing.assert_allclose(
        found.log_weights(source), found.scale * summed.log_weights(source), rtol=1e-12
    )
    np.testing.assert_allclose(found.target_log_weights(target), found.scale * of_target, rtol=1e-9)


def test_the_same_table_many_times_says_what_it_says_once() -> None:
    source, target = normal(900, 4, seed=7), normal(300, 4, seed=8, mean=0.5)
    once = signs(4, tables=1, bits=5, seed=9, device=CPU)
    often = Signs(once.planes.repeat(1, 10), 5)
    one, ten = (
        BucketRatio(tables, source, target, smoothing=0.1, combine="fitted") for tables in (once, often)
    )
    assert one.scale == pytest.approx(10 * ten.scale, rel=1e-4)
    np.testing.assert_allclose(one.log_weights(source), ten.log_weights(source), rtol=1e-4)


def test_a_target_like_the_source_weighs_all_about_alike() -> None:
    source, target = normal(2000, 16, seed=10), normal(200, 16, seed=11)
    tables = signs(16, tables=64, bits=6, seed=12, device=CPU)
    fitted, summed = (
        BucketRatio(tables, source, target, smoothing=0.01, combine=combine).log_weights(source).std()
        for combine in ("fitted", "sum")
    )
    assert float(fitted) < 0.3 and float(summed) > 10


@pytest.mark.parametrize("degrees", [10.0, 60.0, 90.0, 150.0])
def test_samples_share_a_bucket_as_often_as_their_angle_says(degrees: float) -> None:
    """(1 - a / pi)^bits of 20,000 tables, within 4 standard deviations."""
    bits, count = 3, 20_000
    tables = signs(2, tables=count, bits=bits, seed=13, device=CPU)
    angle = math.radians(degrees)
    pair = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    first, second = tables.codes(pair)
    chance = (1 - angle / math.pi) ** bits
    assert float((first == second).double().mean()) == pytest.approx(
        chance, abs=4 * math.sqrt(chance * (1 - chance) / count)
    )


def test_cells_have_the_shares_of_a_mixture_that_is_known() -> None:
    """Three clusters far apart with shares (0.6, 0.3, 0.1) and (0.1, 0.2, 0.7)."""
    centres = 20 * torch.eye(3)
    sizes = {"source": (600, 300, 100), "target": (20, 40, 140)}
    sides = [
        torch.cat(
            [centres[k] + normal(count, 3, seed=20 + k + 3 * side) for k, count in enumerate(sizes[name])]
        )
        for side, name in enumerate(sizes)
    ]
    found = cells(sides[0], sides[1], 3, seed=0, iterations=25)
    ratio = BucketRatio(found, sides[0], sides[1], smoothing=0.0)
    logs = ratio.log_weights(sides[0]).numpy()
    wanted = np.log([0.1 / 0.6, 0.2 / 0.3, 0.7 / 0.1])
    np.testing.assert_allclose(logs, np.repeat(wanted, sizes["source"]), atol=1e-6)
    # A sample of the target meets its bucket without itself.
    own = np.log(np.array([19, 39, 139]) / 199 / [0.6, 0.3, 0.1])
    np.testing.assert_allclose(ratio.target_log_weights(sides[1]), np.repeat(own, sizes["target"]), atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.01, 0.5, 10.0])
def test_pseudo_counts_draw_all_ratios_towards_one_alike(smoothing: float) -> None:
    source, target = normal(300, 3, seed=30), normal(40, 3, seed=31, mean=0.8)
    found = cells(source, target, 12, seed=0, iterations=25)
    bare, spread = (
        np.exp(BucketRatio(found, source, target, smoothing=s).log_weights(source).numpy())
        for s in (0.0, smoothing)
    )
    share = smoothing * 12 / (40 + smoothing * 12)
    np.testing.assert_allclose(spread, (1 - share) * bare + share, rtol=1e-4)
    assert spread.mean() == pytest.approx(bare.mean() * (1 - share) + share, rel=1e-4)


def test_a_row_has_the_cell_of_its_nearest_centroid() -> None:
    source, target = normal(200, 4, seed=32), normal(90, 4, seed=33, mean=1.0)
    found = cells(source, target, 9, seed=1, iterations=25)
    distances = (source.double()[:, None] - found.centroids).square().sum(dim=2)
    assert found.codes(source.double())[:, 0].tolist() == distances.argmin(dim=1).tolist()
    whole = kmeans(torch.cat([source, target]), 9, seed=1, iterations=25)
    assert torch.equal(found.centroids, whole.centroids.double()), "few rows are all asked"


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = normal(200, 6, seed=34), normal(50, 6, seed=35, mean=0.5)
    found: dict[int, list[list[float]]] = {}
    for rows in (4096, 200, 7, 1):
        monkeypatch.setattr(standard_features, "_ROWS", rows)
        for tables in (
            signs(6, tables=5, bits=3, seed=0, device=CPU),
            cells(source, target, 20, seed=0, iterations=9),
        ):
            ratio = BucketRatio(tables, source, target, smoothing=0.1, combine="fitted")
            found.setdefault(rows, []).append(ratio.log_weights(source).tolist())
    assert all(each == found[4096] for each in found.values())


def test_features_are_never_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie in a file larger than memory; k-means sees 64 rows of each side for every cell."""
    monkeypatch.setattr(standard_features, "_NUMBERS", 1 << 12)
    source, target = normal(12_000, 64, seed=36), normal(300, 64, seed=37)
    with Largest() as made:
        found = cells(source, target, 4, seed=0, iterations=3)
        BucketRatio(found, source, target, smoothing=0.1)
        hashes = signs(64, tables=8, bits=3, seed=0, device=CPU)
        BucketRatio(hashes, source, target, smoothing=0.1, combine="fitted")
    rows = 8 * 64 * 2 * 64 * 4
    assert made.bytes <= max(rows, 8 * 12_000) < source.nbytes / 10


def test_what_cannot_be_counted_is_refused() -> None:
    source, target = normal(30, 2, seed=38), normal(10, 2, seed=39)
    with pytest.raises(InputError, match="40 images of the data and the target cannot be cut into 41") as few:
        cells(source, target, 41, seed=0, iterations=2)
    assert few.value.allowed == "at most 40"
    with pytest.raises(InputError, match="2 buckets takes 320 bytes") as wide:
        cells(source, target, 2, seed=0, iterations=2, memory=319)
    assert wide.value.allowed == "at least 320 bytes"
    apart = Cells(torch.tensor([[0.0, 0.0], [100.0, 100.0]], dtype=torch.float64))
    for smoothing in (0.0, 1.0):
        with pytest.raises(InputError, match="no image of the data shares a bucket") as none:
            BucketRatio(apart, source, target + 100, smoothing=smoothing)
        assert none.value.found == "1 buckets of the target, 1 of the data"


def test_one_sample_of_a_side_has_finite_weights() -> None:
    """Left out, it leaves nothing to count."""
    tables = signs(3, tables=6, bits=2, seed=0, device=CPU)
    rows = normal(8, 3, seed=40)
    for source, target in ((rows[:1], rows[:1]), (rows, rows[:1]), (rows[:1], rows)):
        for smoothing in (0.0, 0.1):
            ratio = BucketRatio(tables, source, target, smoothing=smoothing, combine="fitted")
            assert torch.isfinite(ratio.log_weights(source)).all()
            assert 0 <= ratio.scale <= 1
