"""GradMatch: which gradient is matched, in which units the weights are, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from dataselect import gradmatch
from dataselect.gradients import DenseGradients
from dataselect.gradmatch import GradMatch
from distill.cache.teachers import train_teacher
from distill.contracts import Context, Selection, Source, Split
from distill.errors import InputError, RecipeErrors
from distill.recipe import make_recipe

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 2, "batch_size": 16}}


def selector(**options: object) -> GradMatch:
    return GradMatch(GradMatch.Config.model_validate({"ipc": 3, "network": NETWORK, **options}))


def gradients(method: GradMatch, context: Context, source: Source, split: Split) -> np.ndarray:
    """float64 (N, P): all of a split, from the cache."""
    network = train_teacher(context, source, method.config.network, name="again")
    closed = method.config.features == "last_layer"
    read = context.cache.last_layer_gradients if closed else context.cache.gradients
    return read(split, network).take(np.arange(len(split))).double().numpy()


@pytest.mark.parametrize("against", ["train", "valid"])
@pytest.mark.parametrize("features", ["last_layer", "gradients"])
def test_weights_are_the_optimum_for_the_gradient_of_each_class(
    features: str, against: str, source: Source, make_context: Callable[..., Context]
) -> None:
    context, method = make_context(), selector(features=features, against=against)
    found = method.run(context, source, None)
    own, other = (gradients(method, context, source, split) for split in (source.train, source.valid))
    parts = []
    for number in range(3):
        rows = found.indices[3 * number : 3 * number + 3]
        mine = source.train.labels.numpy() == number
        assert mine[rows].all()
        if against == "train":
            target = own[mine].sum(axis=0)
        else:
            target = other[source.valid.labels.numpy() == number].mean(axis=0) * mine.sum()
        ridge = 0.5 * (own[mine] ** 2).sum(axis=1).mean()
        system = np.concatenate([own[rows].T, np.sqrt(ridge) * np.eye(3)])
        parts.append(nnls(system, np.concatenate([target, np.zeros(3)]))[0])
        error = np.linalg.norm(np.append(parts[-1] @ own[rows] - target, np.sqrt(ridge) * parts[-1]))
        assert found.scores[3 * number + 2] == pytest.approx(error / np.linalg.norm(target), rel=1e-4)
    weights = np.concatenate(parts)
    np.testing.assert_allclose(found.weights, weights / weights.mean(), rtol=1e-4, atol=1e-6)


def test_all_classes_together_match_the_whole_gradient(
    source: Source, make_context: Callable[..., Context]
) -> None:
    context = make_context()
    method = selector(ipc=None, count=8, per_class=False, ridge=0.0)
    found = method.run(context, source, None)
    own = gradients(method, context, source, source.train)
    weights, left = nnls(own[found.indices].T, own.sum(axis=0))
    np.testing.assert_allclose(found.weights, weights / weights.mean(), rtol=1e-3, atol=1e-5)
    assert found.scores[-1] == pytest.approx(left / np.linalg.norm(own.sum(axis=0)), rel=1e-3, abs=1e-6)
    assert (np.diff(found.scores) <= 1e-6).all()


def test_the_whole_of_a_class_is_kept_with_exactly_the_budget(
    source: Source, make_context: Callable[..., Context]
) -> None:
    for ridge in (0.0, 0.5):
        found = selector(ipc=8, ridge=ridge).run(make_context(), source, None)
        assert sorted(found.indices.tolist()) == list(range(24))
        assert found.weights.mean() == pytest.approx(1)


def test_alike_images_without_ridge_leave_weights_of_zero(
    source: Source, make_context: Callable[..., Context]
) -> None:
    """One image matches the gradient of its class: the others are there for the budget."""
    alike = Split(torch.full_like(source.train.images, 7), source.train.labels, fingerprint="all alike")
    found = selector(ridge=0.0).run(make_context(), replace(source, train=alike, std=(1.0,)), None)
    assert found.weights.reshape(3, 3).tolist() == [[3, 0, 0]] * 3


def test_a_class_without_gradients_counts_by_its_size(
    source: Source, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to match: any samples will do, each for as many."""

    def read(space: object, split: Split, samples: np.ndarray) -> DenseGradients:
        first = split.labels[torch.from_numpy(samples)][0] == 0
        return DenseGradients(torch.zeros(len(samples), 4) if first else torch.ones(len(samples), 4))

    monkeypatch.setattr(gradmatch, "gradients_of", read)
    found = selector(ridge=0.0).run(make_context(), source, None)
    assert found.indices[:3].tolist() == np.flatnonzero(source.train.labels.numpy() == 0)[:3].tolist()
    np.testing.assert_allclose(found.weights, np.array([8 / 3] * 3 + [8, 0, 0] * 2) * 9 / 24, rtol=1e-6)


def test_several_checkpoints_are_matched_in_the_mean(
    source: Source, make_context: Callable[..., Context]
) -> None:
    one, two = (selector(checkpoints=number).run(make_context(), source, None) for number in (1, 2))
    assert one.weights.tolist() != two.weights.tolist()
    assert len(two.indices) == 9


def test_behind_a_selection_its_gradient_is_matched(
    source: Source, make_context: Callable[..., Context]
) -> None:
    context = make_context()
    kept = np.concatenate([np.flatnonzero(source.train.labels.numpy() == number)[:4] for number in range(3)])
    before = Selection(kept, np.ones(12, np.float32), np.zeros(12, np.float32))
    method = selector(ridge=0.0)
    found = method.run(context, source, before)
    own = gradients(method, context, source, source.train)
    weights = [
        nnls(own[found.indices[part]].T, own[np.sort(kept[part_kept])].sum(axis=0))[0]
        for part, part_kept in zip(np.arange(9).reshape(3, 3), np.arange(12).reshape(3, 4), strict=True)
    ]
    wanted = np.concatenate(weights)
    np.testing.assert_allclose(found.weights, wanted / wanted.mean(), rtol=1e-3, atol=1e-4)


def test_validation_images_of_every_class_are_asked_for_before_any_work(
    source: Source, make_source: Callable[..., Source]
) -> None:
    with pytest.raises(InputError, match="needs validation images of every class") as caught:
        selector(against="valid").check(make_source(valid=0), None)
    assert caught.value.found == "none"
    some = source.valid.labels != 1
    part = Split(source.valid.images[some], source.valid.labels[some], fingerprint="two classes")
    with pytest.raises(InputError) as caught:
        selector(against="valid").check(replace(source, valid=part), None)
    assert caught.value.found == "none of one"
    whole = selector(ipc=None, count=4, per_class=False, against="valid")
    whole.check(replace(source, valid=part), None)


def test_a_budget_whose_matrix_has_no_room_is_refused_before_any_work(
    make_source: Callable[..., Source],
) -> None:
    source = make_source((170, 170))
    options: dict[str, object] = {"ipc": None, "count": 300, "memory": "1MiB", "per_class": False}
    with pytest.raises(InputError, match="need a matrix of 1440000 bytes") as caught:
        selector(**options).check(source, None)
    assert "at most 256 picks" in str(caught.value.allowed)
    selector(**{**options, "per_class": True}).check(source, None)
    selector(**{**options, "count": 256}).check(source, None)


@pytest.mark.parametrize("options", [{"features": "network"}, {"ridge": -0.1}, {"against": "test"}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeErrors):
        make_recipe({"data": {"name": "digits"}, "steps": [{"gradmatch": {"ipc": 2, **options}}]})
