"""The density ratio by a classifier: a closed form, scikit-learn's optimum, held-out scores, and bounded memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from dataselect import calibration, standard_features
from dataselect import logistic_ratio as module
from dataselect.logistic_ratio import logistic_ratio
from dataselect.standard_features import standardise
from distill.errors import InputError
from tests.dataselect.largest import Largest


def normal(count: int, width: int, *, seed: int, mean: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + mean


def exact(candidates: Tensor, target: Tensor, *, ridge: float) -> LogisticRegression:
    """scikit-learn's classifier in float64, to its last digits."""
    rows = torch.cat([candidates, target]).double().numpy()
    sides = np.repeat([0, 1], [len(candidates), len(target)])
    found = LogisticRegression(C=1 / ridge, solver="newton-cholesky", tol=1e-13, max_iter=1000)
    return found.fit(rows, sides)


@pytest.mark.parametrize("counts", [(6000, 6000), (12_000, 1500)])
def test_two_gaussians_have_the_closed_form(counts: tuple[int, int]) -> None:
    """ln p / q = <m, x> - ||m||^2 / 2 for N(m, I) and N(0, I), whatever the shares of the two."""
    mean = torch.tensor([0.8, -0.5, 0.3])
    source, target = normal(counts[0], 3, seed=1), normal(counts[1], 3, seed=2) + mean
    wanted = source.double() @ mean.double() - float(mean @ mean) / 2
    standardise(source, target)
    found = logistic_ratio(source, target, regularisation=1e-3, folds=5, seed=0)
    assert float((found.candidates - wanted).square().mean().sqrt()) < 0.12
    divergence = float(mean @ mean) / 2
    assert float(found.target.mean()) == pytest.approx(divergence, abs=0.06)
    assert float(found.candidates.mean()) == pytest.approx(-divergence, abs=0.06)


@pytest.mark.parametrize("regularisation", [1e-6, 0.1, 30.0])
@pytest.mark.parametrize("shape", [(50, 7, 3), (300, 40, 60), (40, 30, 90)])
def test_the_optimum_is_scikit_learns(regularisation: float, shape: tuple[int, int, int]) -> None:
    """More samples than features and fewer; with next to no regularisation the last are told apart without fail."""
    n, m, width = shape
    source, target = normal(n, width, seed=3), normal(m, width, seed=4, mean=0.2)
    slow = exact(source, target, ridge=regularisation * width)
    found = logistic_ratio(source, target, regularisation=regularisation, folds=1, seed=0)
    for part, side in ((source, found.candidates), (target, found.target)):
        wanted = slow.decision_function(part.double().numpy()) - np.log(m / n)
        np.testing.assert_allclose(side.numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_each_fold_is_scored_by_what_learnt_from_the_others() -> None:
    source, target = normal(61, 9, seed=5), normal(24, 9, seed=6, mean=0.4)
    found = logistic_ratio(source, target, regularisation=0.2, folds=4, seed=7)
    cut = [module._cut(count, 4, 7, side) for side, count in enumerate((61, 24))]
    assert [torch.bincount(folds).tolist() for folds in cut] == [[16, 15, 15, 15], [6, 6, 6, 6]]
    plain = [np.empty(61), np.empty(24)]
    for fold in range(4):
        learnt, own = source[cut[0] != fold], target[cut[1] != fold]
        slow = exact(learnt, own, ridge=0.2 * 9)
        prior = np.log(len(own) / len(learnt))
        for side, (part, folds) in enumerate(zip((source, target), cut, strict=True)):
            held = part[folds == fold].double().numpy()
            plain[side][folds == fold] = slow.decision_function(held) - prior
    scores = np.concatenate(plain)[:, None]
    shares = np.repeat([1 / 63, 25 / 26], [61, 24])  # Platt's targets: every sample on both sides
    slope = LogisticRegression(C=1e10, solver="newton-cholesky", tol=1e-13)
    both = np.concatenate([shares, 1 - shares])
    slope.fit(np.tile(scores, (2, 1)), np.repeat([1, 0], 85), sample_weight=both)
    assert found.scale == pytest.approx(slope.coef_[0, 0], rel=1e-4)
    for side, wanted in zip(found[:2], plain, strict=True):
        calibrated = slope.decision_function(wanted[:, None]) - np.log(shares.sum() / (85 - shares.sum()))
        np.testing.assert_allclose(side.numpy(), calibrated, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]
    losses = [np.logaddexp(0, found.candidates.numpy()).mean(), np.logaddexp(0, -found.target.numpy()).mean()]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-12)


def test_folds_keep_a_sample_from_deciding_its_own_weight() -> None:
    """Source and target are one distribution, and features are as many as there are samples of the target."""
    source, target = normal(400, 100, seed=8), normal(100, 100, seed=9)
    together, apart = (
        logistic_ratio(source, target, regularisation=0.01, folds=folds, seed=0) for folds in (1, 5)
    )
    assert float(together.target.mean() - together.candidates.mean()) > 1.5
    assert abs(float(apart.target.mean() - apart.candidates.mean())) < 0.1
    assert together.loss < 0.55 and apart.loss == pytest.approx(np.log(2), abs=0.01)
    assert (together.scale, apart.scale < 0.3) == (1.0, True)


def test_regularisation_decides_how_well_samples_rank_and_little_else() -> None:
    """Held-out logits are brought to the scale of log ratios, whatever the prior drew them to."""
    source, target = normal(2000, 5, seed=18), normal(300, 5, seed=19, mean=0.4)
    found = [
        logistic_ratio(source, target, regularisation=strength, folds=5, seed=0)
        for strength in (0.001, 1.0, 100.0)
    ]
    spreads = [float(each.candidates.std()) for each in found]
    assert max(spreads) < 1.1 * min(spreads)
    assert found[2].scale > 3 and found[0].scale == pytest.approx(1.0, abs=0.1)
    assert max(each.loss for each in found) < min(each.loss for each in found) + 0.01


def test_a_target_that_is_told_apart_without_fail_has_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are what so many samples can tell, and not what the optimiser's tolerance lets them become."""
    source, target = normal(400, 20, seed=20), normal(100, 20, seed=21, mean=8 / 20**0.5)
    standardise(source, target)
    found = []
    for tolerance in (1e-6, 1e-10, 1e-12):
        monkeypatch.setattr(calibration, "_EXACT", {"ftol": 0.0, "gtol": tolerance, "maxiter": 1000})
        found.append(logistic_ratio(source, target, regularisation=0.3, folds=5, seed=0))
    assert float(found[0].candidates.max()) < float(found[0].target.min()), "told apart without fail"
    scales = [each.scale for each in found]
    assert max(scales) < 1.001 * min(scales) < 2.0
    weights = found[0].candidates.exp()
    assert float(weights.sum().square() / weights.square().sum()) > 40, "no few samples have all the weight"


def test_what_preconditions_and_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = normal(300, 20, seed=10), normal(50, 20, seed=11, mean=0.5)
    source[:, 1:4], target[:, 1:4] = source[:, :1] + 1e-3 * source[:, 1:4], target[:, :1]  # all but the same
    options = {"regularisation": 0.01, "folds": 3, "seed": 1}
    passes: list[int] = []
    wanted = logistic_ratio(source, target, advance=lambda: passes.append(1), **options)  # type: ignore[arg-type]
    assert len(passes) < 150
    monkeypatch.setattr(standard_features, "_ROWS", 7)
    by_rows = logistic_ratio(source, target, **options)  # type: ignore[arg-type]
    by_diagonal = logistic_ratio(source, target, memory=1000, **options)  # type: ignore[arg-type]
    for found in (by_rows, by_diagonal):
        for a, b in zip(found[:2], wanted[:2], strict=True):
            assert float((a - b).abs().max()) < 1e-7  # type: ignore[union-attr]
        assert found.loss == pytest.approx(wanted.loss, rel=1e-9)


def test_features_are_never_held_in_float64_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may lie in a file larger than memory."""
    monkeypatch.setattr(standard_features, "_NUMBERS", 1 << 12)
    source, target = normal(2000, 64, seed=12), normal(100, 64, seed=13, mean=0.2)
    with Largest() as made:
        standardise(source, target)
        logistic_ratio(source, target, regularisation=1.0, folds=2, seed=0)
    assert made.bytes <= max(8 * 65 * 65, 8 * 65 * 64) < source.nbytes / 15


def test_features_without_variance_are_without_say() -> None:
    source, target = normal(60, 4, seed=14), normal(30, 4, seed=15, mean=1.0)
    alone = (source[:, :3].clone(), target[:, :3].clone())
    source[:, 3] = target[:, 3] = 4.1
    for parts in (alone, (source, target)):
        standardise(*parts)
    assert not source[:, 3].any() and not target[:, 3].any()
    # Both have the prior of their own number of features.
    few, more = (
        logistic_ratio(*parts, regularisation=0.3 / parts[0].shape[1], folds=2, seed=0)
        for parts in (alone, (source, target))
    )
    np.testing.assert_allclose(few.candidates, more.candidates, atol=1e-9)


def test_features_that_are_all_alike_weigh_alike() -> None:
    source, target = torch.zeros(12, 5), torch.zeros(6, 5)
    found = logistic_ratio(source, target, regularisation=0.1, folds=3, seed=0)
    assert float(found.candidates.abs().max()) < 1e-12
    assert found.loss == pytest.approx(np.log(2))


def test_standard_features_have_mean_0_and_variance_1_over_both() -> None:
    source, target = 1e3 + 5 * normal(500, 6, seed=16), 1e3 + normal(80, 6, seed=17, mean=9.0)
    slow = torch.cat([source, target]).double()
    slow = (slow - slow.mean(dim=0)) / slow.std(dim=0, correction=0)
    standardise(source, target)
    np.testing.assert_allclose(torch.cat([source, target]).numpy(), slow.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n", "m", "name"), [(4, 9, "data"), (9, 4, "target")])
def test_fewer_samples_than_folds_are_refused(n: int, m: int, name: str) -> None:
    with pytest.raises(InputError, match=f"4 images of the {name} cannot be cut into 5 folds") as caught:
        logistic_ratio(normal(n, 2, seed=0), normal(m, 2, seed=1), regularisation=1.0, folds=5, seed=0)
    assert caught.value.allowed == "at most 4"
