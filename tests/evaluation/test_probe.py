"""The linear probe: features of a pretrained student are judged by a classifier that learns the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from distill import pipeline
from distill.contracts import Preprocessing, Source
from distill.data import with_target
from distill.errors import InputError
from distill.evaluation.probe import Probe
from distill.models import build, model_config

CPU = torch.device("cpu")
MODEL = model_config({"name": "convnet", "width": 4})


@pytest.fixture
def probed(make_source: Callable[..., Source]) -> Source:
    target = make_source((12, 12, 12), test=20)
    return with_target(make_source((8, 8)), replace(target, classes=("a", "b", "c")))


def probe_of(source: Source) -> Probe:
    return Probe(source, Preprocessing(source.mean, source.std), CPU)


def slow_accuracy(source: Source, state: dict[str, torch.Tensor]) -> float:
    """The regression of the file's head, minimised anew in float64."""
    assert source.target is not None
    module = build(MODEL, image_shape=source.image_shape, classes=2, seed=0).eval()
    module.load_state_dict(state)
    mean, std = torch.tensor(source.mean)[:, None, None], torch.tensor(source.std)[:, None, None]

    def features(images: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return module.features((images / 255 - mean) / std).double().numpy()

    train, test = features(source.target.train.images), features(source.target.test.images)
    centre, scale = train.mean(axis=0), train.std(axis=0)
    scale[scale == 0] = 1
    train, test = (train - centre) / scale, (test - centre) / scale
    labels, n, width = source.target.train.labels.numpy(), len(train), train.shape[1]

    def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x[: 3 * width].reshape(width, 3), x[3 * width :]

    def loss(x: np.ndarray) -> float:
        weights, bias = split(x)
        logits = torch.from_numpy(train @ weights + bias)
        cross = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
        return float(cross) + float((weights**2).sum()) / (2 * n)

    best = minimize(loss, np.zeros(3 * width + 3), method="BFGS", options={"maxiter": 200})
    weights, bias = split(best.x)
    return float(((test @ weights + bias).argmax(axis=1) == source.target.test.labels.numpy()).mean())


def test_the_accuracy_is_that_of_the_regression_in_the_files_head(probed: Source) -> None:
    for seed in range(3):
        state = build(MODEL, image_shape=probed.image_shape, classes=2, seed=seed).state_dict()
        assert probe_of(probed).accuracy(MODEL, state) == pytest.approx(
            slow_accuracy(probed, state), abs=0.02
        )


def test_features_without_information_tell_nothing(probed: Source) -> None:
    state = build(MODEL, image_shape=probed.image_shape, classes=2, seed=0).state_dict()
    blind = {name: torch.zeros_like(value) for name, value in state.items()}
    assert probe_of(probed).accuracy(MODEL, blind) == pytest.approx(1 / 3)
    assert probe_of(probed).accuracy(MODEL, state) > 0.5


def test_one_class_is_refused(make_source: Callable[..., Source]) -> None:
    with pytest.raises(InputError, match="tell classes apart") as caught:
        probe_of(with_target(make_source((8,)), make_source()))
    assert caught.value.where == "data"
    with pytest.raises(InputError) as caught:
        probe_of(with_target(make_source(), make_source((8,))))
    assert caught.value.where == "target"


def test_a_run_that_is_tested_by_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted after some students, it goes on; the target's classes are others than the data's."""
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    recipe = {
        "data": {"name": "digits", "cap": 20, "classes": [0, 1, 2, 3, 4]},
        "target": {"name": "digits", "cap": 20, "classes": [5, 6, 7]},
        "train": {"epochs": 2},
        "steps": [{"random": {"ipc": 3}}],
        "evaluate": {"students": ["mlp"], "seeds": 2, "against": ["random"], "on": "transfer"},
    }
    done = pipeline.run(recipe, out=tmp_path / "a", device="cpu", quiet=True)
    arms = {each.arm: each.accuracies for each in done.evaluation.results}
    assert set(arms) == {"set", "random"} and all(0.34 < each <= 1 for each in arms["set"])
    again = pipeline.evaluate(done.folder.set, device="cpu", quiet=True)
    assert {each.arm: each.accuracies for each in again.results} == arms
    assert "linear probe" in pipeline.dry_run(recipe, out=tmp_path / "b", device="cpu")
    with pytest.raises(InputError, match="the recipe names none"):
        pipeline.dry_run(recipe, ["target=null"], out=tmp_path / "b", device="cpu")
