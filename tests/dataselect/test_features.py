"""The space in which selectors measure: pixels or a network's layer, and what is trained for it, and when."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dataselect.gradmatch import GradMatch
from dataselect.herding import Herding
from dataselect.kcenter import KCenter
from dataselect.simcore import SimCore
from dataselect.space import FeatureSpace
from dataselect.space_config import SpaceConfig
from distill.cache import Gradients
from distill.cache.teachers import train_teacher
from distill.contracts import Context, Selection, Source
from distill.data import with_target
from distill.errors import InputError, RecipeErrors
from distill.recipe import make_recipe

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 1, "batch_size": 16}}


def config(**options: object) -> SpaceConfig:
    network = {} if options.get("features") == "pixels" else {"network": NETWORK}
    return SpaceConfig.model_validate({"ipc": 2, **network, **options})


def space_of(context: Context, source: Source, chosen: SpaceConfig) -> FeatureSpace:
    return KCenter(chosen).space(context, source)


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        ({"features": "pixels", "network": NETWORK}, "network"),
        ({"features": "pixels", "layer": "classifier"}, "layer"),
        ({"features": "pixels", "network": NETWORK, "layer": "classifier"}, "network and layer"),
        ({"features": "gradients", "layer": "classifier"}, "layer"),
        ({"features": "network", "projection": {"dim": 8}}, "projection"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, object], ignored: str) -> None:
    with pytest.raises(RecipeErrors) as caught:
        make_recipe({"data": {"name": "digits"}, "steps": [{"kcenter": {"ipc": 2, **options}}]})
    (problem,) = caught.value.problems
    assert problem.what == f"{ignored} would be ignored: features: {options['features']} is not made from it"
    assert problem.fix == f"remove {ignored}, or set features to what uses it"


def test_gradients_are_those_of_the_cache_centred(
    make_context: Callable[..., Context], source: Source
) -> None:
    samples = np.array([5, 0, 11])
    chosen = config(features="gradients", projection={"dim": 8})
    context = make_context()
    found = space_of(context, source, chosen).take(samples)
    network = train_teacher(context, source, chosen.network, name="again")
    rows = context.cache.gradients(source.train, network, Gradients(chosen.projection)).take(samples)
    torch.testing.assert_close(found, rows - rows.mean(dim=0))
    assert found.shape == (3, 8)
    assert found.abs().max() > 0


def test_directions_or_gradients_of_several_checkpoints(
    make_context: Callable[..., Context], source: Source
) -> None:
    """What matches gradients wants their mean; what measures distances wants no checkpoint to decide alone."""
    context, samples = make_context(), np.array([5, 0, 11])
    network = {**NETWORK, "train": {"epochs": 2, "batch_size": 16}}
    options = {"ipc": 2, "features": "last_layer", "checkpoints": 2, "network": network}
    matched = GradMatch(GradMatch.Config.model_validate(options)).space(context, source)
    measured = KCenter(KCenter.Config.model_validate(options)).space(context, source)
    parts = [
        context.cache.last_layer_gradients(source.train, each).take(samples) for each in matched.networks
    ]
    assert len(parts) == 2 and not torch.equal(*parts)
    torch.testing.assert_close(matched.raw(samples), torch.stack(parts).mean(dim=0))
    unit = torch.stack([torch.nn.functional.normalize(part, dim=1) for part in parts]).mean(dim=0)
    torch.testing.assert_close(measured.raw(samples), unit)


def test_a_network_that_would_learn_one_class_of_a_target_is_refused(
    make_source: Callable[..., Source],
) -> None:
    lonely = with_target(make_source(), make_source((8,)))
    with pytest.raises(InputError, match="one class to tell apart") as caught:
        SimCore(SimCore.Config(count=5)).check(lonely, None)
    assert "encoder" in str(caught.value.fix)
    SimCore(SimCore.Config(count=5, trained_on="source")).check(lonely, None)


def test_the_merged_options_of_pixels_are_read_back() -> None:
    """A merged recipe names every default, the network's too."""
    chosen = config(features="pixels")
    assert SpaceConfig.model_validate_json(chosen.model_dump_json()) == chosen


def forbid_training(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a network was trained")

    monkeypatch.setattr(context.engine, "train", refuse)


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_centred_and_scaled_by_channel(
    make_source: Callable[..., Source], make_context: Callable[..., Context], channels: int
) -> None:
    source = make_source(channels=channels)
    samples = np.array([3, 0, 11])
    found = space_of(make_context(), source, config(features="pixels")).take(samples)
    pixels = source.train.images.numpy()[samples] / 255 / np.array(source.std)[:, None, None]
    wanted = pixels.reshape(3, -1) - pixels.reshape(3, -1).mean(axis=0)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)


def test_network_features_are_the_layer_of_the_trained_network(
    source: Source, make_context: Callable[..., Context]
) -> None:
    context, samples = make_context(), np.array([5, 2, 20, 7])
    chosen = config()
    found = space_of(context, source, chosen).take(samples)
    network = train_teacher(context, source, chosen.network, name="features")
    rows = context.cache.features(source.train, network).take(samples)
    np.testing.assert_allclose(found.numpy(), rows - rows.mean(axis=0), atol=1e-5)
    assert found.std() > 0


def test_another_layer_gives_other_features(source: Source, make_context: Callable[..., Context]) -> None:
    context, samples = make_context(), np.arange(6)
    penultimate, logits = (
        space_of(context, source, config(**layer)).take(samples) for layer in ({}, {"layer": "classifier"})
    )
    assert penultimate.shape == (6, 4 * 2 * 2)
    assert logits.shape == (6, len(source.classes))


def test_an_unknown_layer_is_named_with_what_there_is(
    source: Source, make_context: Callable[..., Context]
) -> None:
    with pytest.raises(InputError, match=r"clasifier") as caught:
        space_of(make_context(), source, config(layer="clasifier")).take(np.arange(2))
    assert "classifier" in str(caught.value.fix)


@pytest.mark.parametrize("method", [KCenter, Herding])
def test_an_unknown_layer_is_refused_before_any_step_runs(
    method: type[KCenter | Herding], source: Source
) -> None:
    def check(layer: str) -> None:
        options = {"ipc": 2, "network": NETWORK, "layer": layer}
        method(method.Config.model_validate(options)).check(source, None)

    check("body.0")
    with pytest.raises(InputError, match=r"bodyy\.0") as caught:
        check("bodyy.0")
    assert "body.0" in str(caught.value.allowed)


def test_pixels_train_nothing(
    source: Source, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context()
    forbid_training(context, monkeypatch)
    chosen = KCenter(KCenter.Config(ipc=2, features="pixels")).run(context, source, None)
    assert len(chosen.indices) == 6


@pytest.mark.parametrize("method", [KCenter, Herding])
def test_a_budget_beyond_the_selection_before_is_refused_before_training(
    method: type[KCenter | Herding],
    source: Source,
    make_context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The source could give 4 of each class; the selection before kept 3."""
    context = make_context()
    forbid_training(context, monkeypatch)
    labels = source.train.labels.numpy()
    kept = np.concatenate([np.flatnonzero(labels == number)[:3] for number in range(3)])
    before = Selection(kept, np.ones(9, np.float32), np.zeros(9, np.float32))
    with pytest.raises(InputError, match="4 images per class"):
        method(method.Config.model_validate({"ipc": 4, "network": NETWORK})).run(context, source, before)


@pytest.mark.parametrize("method", [KCenter, Herding])
def test_picks_class_by_class_in_the_feature_space(
    method: type[KCenter | Herding], source: Source, make_context: Callable[..., Context]
) -> None:
    context = make_context()
    selector = method(method.Config.model_validate({"ipc": 3, "network": NETWORK}))
    found = selector.run(context, source, None)
    space = space_of(context, source, selector.config)
    for number in range(3):
        samples = np.flatnonzero(source.train.labels.numpy() == number)
        rows, scores, _ = selector.pick(space.take(samples), 3, seed=0)
        own = slice(3 * number, 3 * number + 3)
        assert found.indices[own].tolist() == samples[rows.numpy()].tolist()
        np.testing.assert_array_equal(found.scores[own], scores.numpy())
    assert found.meta == {"score": method.score}


def test_estimate_counts_the_network_and_its_rows() -> None:
    estimate = KCenter(config()).estimate(train=24, classes=3, before=None)
    assert (estimate.images, estimate.features, len(estimate.trainings)) == (6, 24, 1)
    assert estimate.trainings[0].samples == 24
    assert estimate.trainings[0].train.epochs == 1
    pixels = KCenter(config(features="pixels")).estimate(train=24, classes=3, before=None)
    assert (pixels.images, pixels.features, pixels.trainings) == (6, 0, ())


def test_features_are_float32_on_the_device_of_the_run(
    source: Source, make_context: Callable[..., Context]
) -> None:
    found = space_of(make_context(), source, config(features="pixels")).take(np.arange(4))
    assert (found.dtype, found.device) == (torch.float32, torch.device("cpu"))
    assert float(found.mean(dim=0).abs().max()) < 1e-5
