"""Herding: the argmin of its docstring, the rate that makes it worth its name, and the fault it must not have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dataselect.herding import herd


def slow_herding(features: np.ndarray, count: int, *, wrong: bool = False) -> list[int]:
    """argmin_x || t mu - (sum_{s in S} f(s) + f(x)) ||_2 over the samples not yet picked; `wrong` takes the argmax."""
    mu = features.mean(axis=0)
    picks: list[int] = []
    for t in range(1, count + 1):
        left = [row for row in range(len(features)) if row not in picks]
        residuals = [np.linalg.norm(t * mu - (features[picks].sum(axis=0) + features[x])) for x in left]
        picks.append(left[int(np.argmax(residuals) if wrong else np.argmin(residuals))])
    return picks


def centred(features: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(features - features.mean(axis=0)).float()


def mean_errors(features: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Distance of the mean of the first t picks to the mean of all, t = 1..len(picks)."""
    sums = (features[picks] - features.mean(axis=0)).cumsum(axis=0)
    return np.linalg.norm(sums, axis=1) / np.arange(1, len(picks) + 1)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(1, 2), (30, 1), (25, 6), (40, 33)])
def test_equals_the_slow_argmin(shape: tuple[int, int], seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=shape) + 5
    count = min(len(features), 15)
    picks, errors = herd(centred(features), count)
    assert picks.tolist() == slow_herding(features, count)
    wanted = mean_errors(features, picks.numpy())
    np.testing.assert_allclose(errors.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_all_rows_make_the_mean_itself() -> None:
    features = np.random.default_rng(1).normal(size=(50, 4))
    picks, errors = herd(centred(features), 50)
    assert sorted(picks.tolist()) == list(range(50))
    assert float(errors[-1]) == pytest.approx(0, abs=1e-6)


def test_constant_features_never_give_a_row_twice() -> None:
    picks, errors = herd(torch.zeros(6, 3), 6)
    assert picks.tolist() == list(range(6))
    assert errors.tolist() == [0.0] * 6


def test_the_mean_error_falls_like_one_over_t_and_at_random_like_its_root() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 16))
    picks, _ = herd(centred(features), 256)
    herded = mean_errors(features, picks.numpy())
    drawn = np.mean([mean_errors(features, rng.permutation(4000)[:256]) for _ in range(40)], axis=0)
    times = np.arange(1, 257)
    settled = times >= 8
    slopes = [np.polyfit(np.log(times[settled]), np.log(e[settled]), 1)[0] for e in (herded, drawn)]
    assert -1.1 < slopes[0] < -0.85
    assert -0.6 < slopes[1] < -0.4
    # The sum of the residuals stays within one sample's length, however many are picked.
    assert (herded * times).max() < np.linalg.norm(features, axis=1).max()


def test_the_mean_error_of_100_of_2000_gaussians() -> None:
    """In 16 dimensions about .02 by the argmin, .37 at random and 2.3 by DeepCore's argmax of || t mu - sum - x ||."""
    features = np.random.default_rng(0).normal(size=(2000, 16))
    picks, errors = herd(centred(features), 100)
    drawn = [
        mean_errors(features, np.random.default_rng(seed).permutation(2000)[:100])[-1] for seed in range(20)
    ]
    assert float(errors[-1]) == pytest.approx(mean_errors(features, picks.numpy())[-1], abs=1e-5)
    assert 0.01 < float(errors[-1]) < 0.04
    assert 0.3 < np.mean(drawn) < 0.5


@settings(deadline=None, max_examples=60)
@given(
    half=arrays.arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 3)), elements=st.integers(-3, 3)),
    data=st.data(),
)
def test_ties_go_to_the_lowest_row(half: np.ndarray, data: st.DataObject) -> None:
    """On whole numbers every tie is exact; x and -x together have the mean 0."""
    features = np.concatenate([half, -half]).astype(np.float64)
    count = data.draw(st.integers(1, len(features)))
    picks, _ = herd(torch.from_numpy(features).float(), count)
    assert picks.tolist() == slow_herding(features, count)


@pytest.mark.parametrize("seed", range(3))
def test_of_duplicates_the_lowest_row_comes_first(seed: int) -> None:
    """Rounding must not tell twins apart: 7 points, each four times, in 37 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    features = (torch.randn(7, 37, generator=generator) * 3).repeat(4, 1)
    picks, _ = herd(features - features.mean(dim=0), 28)
    assert sorted(picks.tolist()) == list(range(28))
    for point in range(7):
        own = [row for row in picks.tolist() if row % 7 == point]
        assert own == sorted(own)


def test_golden_ranking() -> None:
    """Worked by hand: the middle; then what undoes the last sum, where nothing does the nearest to 0."""
    points = torch.tensor(
        [[4.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, 0.0], [-4.0, 0.0], [0.0, -2.0]]
    )
    picks, errors = herd(points, 7)
    assert picks.tolist() == [4, 1, 2, 3, 6, 0, 5]
    assert errors.tolist() == pytest.approx([0, 1 / 2, 0, 2 / 4, 0, 4 / 6, 0])


def test_does_not_have_the_fault_of_the_argmax() -> None:
    """DeepCore's herding takes the sample that drives the mean away."""
    features = np.random.default_rng(3).normal(size=(60, 4))
    picks, errors = herd(centred(features), 10)
    wrong = slow_herding(features, 10, wrong=True)
    assert set(picks.tolist()) != set(wrong)
    assert float(errors[-1]) < 0.1 * mean_errors(features, np.array(wrong))[-1]


@pytest.mark.gpu
def test_gpu_picks_what_the_cpu_picks() -> None:
    features = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    features -= features.mean(dim=0)
    on_cpu, on_gpu = herd(features, 50), herd(features.cuda(), 50)
    assert on_gpu[0].cpu().tolist() == on_cpu[0].tolist()
    torch.testing.assert_close(on_gpu[1].cpu(), on_cpu[1], rtol=1e-4, atol=1e-5)
