"""Importance weights against their formula and the reference package's figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dataselect.importance import EffectiveSize, divergence, log_ratio, shares
from dataselect.ngrams import Documents, NGrams


def documents(path: Path) -> Documents:
    lines = path.read_text(encoding="utf-8").splitlines()
    return Documents.of([json.loads(line)["contents"] for line in lines])


def counted(features: NGrams, of: Documents) -> np.ndarray:
    counts = np.zeros(features.buckets, dtype=np.int64)
    features.count(of, counts)
    return counts


def test_shares_have_the_sum_one() -> None:
    counts = np.array([3, 0, 1])
    assert shares(counts).tolist() == [0.75, 0, 0.25]
    assert shares(counts, smoothing=1.0).tolist() == [4 / 7, 1 / 7, 2 / 7]
    assert shares(np.zeros(4, dtype=np.int64), smoothing=0.5).tolist() == [0.25] * 4


def test_figures_of_the_reference_package(shared_data: Path) -> None:
    """reference/selectors.md, section 2; the corpus twice has the shares of the corpus once."""
    folder = shared_data / "dsir_toy"
    features = NGrams(n=2, buckets=10_000, hash="sha256")
    corpus = documents(folder / "toy_pile_data.jsonl")
    raw = shares(counted(features, corpus))
    target_counts = counted(features, documents(folder / "toy_target_data.jsonl"))
    assert target_counts.sum() == 309 and (target_counts > 0).sum() == 217
    target = shares(target_counts)
    model = log_ratio(target, raw)
    assert model.min() == pytest.approx(-13.884786, abs=1e-6)
    assert model.max() == pytest.approx(6.154504, abs=1e-6)
    assert model.mean() == pytest.approx(-8.375072, abs=1e-6)
    (weights,), lengths = features.score(corpus, model[None])
    assert weights[:5] == pytest.approx(
        [922.262987, -1093.891704, -2284.923559, -2488.817700, -2231.351727], abs=1e-6
    )
    assert weights.argsort()[::-1][:5].tolist() == [0, 35, 748, 756, 67], "short ones among them: no filter"
    assert lengths[[0, 35]].tolist() == [155, 1]
    assert divergence(target, raw) == pytest.approx(2.984670, abs=1e-6)

    second = shares(counted(features, documents(folder / "toy_target_data_2.jsonl")))
    (weights,), _ = features.score(corpus, log_ratio(second, raw)[None])
    assert weights.argmax() == 2 and weights.max() == pytest.approx(949.554434, abs=1e-6)

    smooth = log_ratio(shares(target_counts, smoothing=1.0), raw)
    (smoothed,), _ = features.score(corpus, smooth[None])
    assert smoothed.argsort()[::-1][:3].tolist() == [862, 864, 863]


@pytest.mark.parametrize("blocks", [1, 3, 10])
def test_the_effective_size_of_weights_beyond_floats(blocks: int) -> None:
    rng = np.random.default_rng(0)
    logs = rng.normal(0, 1, 10) + 5000
    weights = np.exp(logs - 5000)
    sizes = EffectiveSize()
    for block in np.array_split(logs, blocks):
        sizes.add(block)
    sizes.add(np.array([-np.inf, -np.inf]))
    assert sizes.size == pytest.approx(weights.sum() ** 2 / (weights @ weights), rel=1e-12)


def test_the_effective_size_of_nothing_is_nothing() -> None:
    sizes = EffectiveSize()
    sizes.add(np.array([-np.inf]))
    sizes.add(np.empty(0))
    assert sizes.size == 0


def test_the_effective_size_does_not_tell_how_weights_were_cut() -> None:
    rng = np.random.default_rng(1)
    logs = rng.normal(0, 9, 200_000)
    logs[rng.random(len(logs)) < 0.1] = -np.inf
    found = set()
    for cuts in ([], [1, 2, 70_000], rng.integers(0, len(logs), 40), range(0, len(logs), 7001)):
        sizes = EffectiveSize()
        for block in np.split(logs, sorted(cuts)):
            sizes.add(block)
        found.add((sizes.size, sizes.log_sum))
    ((size, log_sum),) = found
    weights = np.exp(logs)
    assert size == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-9)
    assert log_sum == pytest.approx(np.log(weights.sum()), rel=1e-12)
