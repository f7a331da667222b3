"""TRAK and LESS: against their formulas in float64, TRAK against leaving samples out, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import spearmanr
from torch import Tensor

from dataselect.influence import Less, Trak, checkpoint_rates, class_cosines, less_scores, trak_kernel
from distill.cache import Gradients, Loss
from distill.cache.rows import HeldRows
from distill.cache.teachers import TeacherConfig, train_teacher
from distill.contracts import Context, Source, Split
from distill.errors import InputError
from distill.training.config import learning_rate

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 4, "batch_size": 16}}
OPTIONS = {"count": 6, "network": NETWORK, "projection": {"dim": 16}, "checkpoints": 2}


def rows(seed: int, count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def targeted(source: Source, part: slice = slice(None, None, 3)) -> Source:
    """The source with some of its own images for a target."""
    train = Split(source.train.images[part], source.train.labels[part], fingerprint=f"part {part}")
    return replace(source, target=replace(source, train=train))


# --- the formulas


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(40, 7), (1, 3), (5, 20)])
@pytest.mark.parametrize("block", [2048, 3])
def test_trak_equals_its_formula(
    seed: int, shape: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with fewer samples than dimensions, where the ridge alone gives the inverse."""
    monkeypatch.setattr("dataselect.influence._BLOCK", block)
    phi, samples = rows(seed, *shape), np.arange(shape[0])[::2]
    goal = rows(seed + 9, 1, shape[1])[0].double()
    own = phi[samples].double().numpy()
    gram = own.T @ own
    ridge = 0.01 * np.trace(gram) / shape[1] * np.eye(shape[1])
    wanted = own @ np.linalg.inv(gram + ridge) @ goal.numpy()
    found = trak_kernel(HeldRows(phi), samples, goal, ridge=0.01)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [2048, 3])
def test_less_equals_its_formula(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataselect.influence._BLOCK", block)
    own = [rows(seed + number, 11, 5) for number in range(3)]
    theirs = [rows(seed + 50 + number, 8, 5) for number in range(3)]
    own[1][4] = 0  # samples without finite gradients
    theirs[2][3] = 0
    labels, rates, samples = torch.tensor([4, 1, 1, 4, 9, 1, 4, 4]), [0.5, 0.2, 0.01], np.array([9, 4, 0, 2])
    wanted = []
    for sample in samples:
        per_class = []
        for number in (1, 4, 9):
            total = 0.0
            for rate, x, t in zip(rates, own, theirs, strict=True):
                g = x[sample].double().numpy()
                cosines = [
                    g @ h / max(np.linalg.norm(g) * np.linalg.norm(h), 1e-30)
                    for h in t[labels == number].double().numpy()
                    if h.any()
                ]
                total += rate * np.mean(cosines)
            per_class.append(total)
        wanted.append(max(per_class))
    classes = labels.unique()
    parts = [
        (HeldRows(x), class_cosines(HeldRows(t), labels, classes)) for x, t in zip(own, theirs, strict=True)
    ]
    np.testing.assert_allclose(less_scores(parts, samples, rates).numpy(), wanted, rtol=1e-7, atol=1e-9)


def test_learning_rates_are_means_of_the_epochs_before_each_checkpoint() -> None:
    network = TeacherConfig.model_validate({"train": {"epochs": 6, "lr": 0.1, "schedule": "cosine"}})
    rates = checkpoint_rates(network, 3)
    wanted = [
        (learning_rate(network.train, e + 0.5) + learning_rate(network.train, e + 1.5)) / 2 for e in (0, 2, 4)
    ]
    assert rates == pytest.approx(wanted)
    constant = TeacherConfig.model_validate({"train": {"epochs": 6, "lr": 0.1, "schedule": "constant"}})
    assert checkpoint_rates(constant, 1) == pytest.approx([0.1])


# --- what the scores mean


def fitted(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights of a logistic regression with labels +1 and -1, and a little weight decay."""

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        margins = y * (x @ w)
        value = np.logaddexp(0, -margins).sum() + 5e-3 * w @ w
        return float(value), -(x.T @ (y * expit(-margins))) + 1e-2 * w

    return minimize(loss, np.zeros(x.shape[1]), jac=True, method="BFGS", options={"gtol": 1e-9}).x


@pytest.mark.parametrize("seed", range(3))
def test_trak_ranks_samples_as_leaving_them_out_does(seed: int) -> None:
    """A logistic regression: the margin of sample (x, y) is y <w, x>, its gradient y x, and each sample is left out and
    the rest fitted anew. The largest score is that of the sample without which the target's margin falls most."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=5) / 2  # no sample is certain: TRAK leaves p (1 - p) out of the Hessian
    x, t = rng.normal(size=(60, 5)), rng.normal(size=(8, 5)) + 1
    y, s = (np.where(expit(each @ truth) > rng.random(len(each)), 1.0, -1.0) for each in (x, t))
    w = fitted(x, y)

    def margin(weights: np.ndarray) -> float:
        return float((s * (t @ weights)).mean())

    falls = [margin(w) - margin(fitted(np.delete(x, i, axis=0), np.delete(y, i))) for i in range(60)]
    phi = torch.from_numpy(y[:, None] * x).float()
    goal = torch.from_numpy((s[:, None] * t).mean(axis=0))
    kernel = trak_kernel(HeldRows(phi), np.arange(60), goal, ridge=1e-6).numpy()
    scores = kernel * expit(-y * (x @ w))  # 1 - p
    assert spearmanr(scores, falls).statistic > 0.9
    assert falls[int(scores.argmax())] > 0 > falls[int(scores.argmin())]


# --- the methods


def test_trak_reads_the_margin_and_the_doubt_of_every_checkpoint(
    source: Source, make_context: Callable[..., Context]
) -> None:
    context, source = make_context(), targeted(source)
    method = Trak(Trak.Config.model_validate(OPTIONS))
    found = method.run(context, source, None)
    assert source.target is not None
    last = train_teacher(context, source, method.config.network, name="again", checkpoints=(2,))
    asked = Gradients(method.config.projection, of="margin")
    kernels, doubts = [], []
    for network in (*last.checkpoints(), last):
        phi, goals = (
            context.cache.gradients(split, network, asked).take(np.arange(len(split))).double().numpy()
            for split in (source.train, source.target.train)
        )
        gram = phi.T @ phi
        inverse = np.linalg.inv(gram + 1e-3 * np.trace(gram) / 16 * np.eye(16))
        kernels.append(phi @ inverse @ goals.mean(axis=0))
        loss = context.cache.request(source.train, network, [Loss()])[Loss()].read(slice(None))[:, 0]
        doubts.append(1 - np.exp(-loss.double().numpy()))
    wanted = np.mean(kernels, axis=0) * np.mean(doubts, axis=0)
    best = np.argsort(-wanted.astype(np.float32), kind="stable")[:6]
    assert found.indices.tolist() == best.tolist()
    np.testing.assert_allclose(found.scores, wanted[best], rtol=1e-4)


@pytest.mark.parametrize("features", ["gradients", "last_layer"])
def test_less_prefers_the_class_of_the_target(
    features: str, make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    whole = make_source((20, 20, 20))
    own = (whole.train.labels == 1).nonzero()[:5, 0]
    part = Split(whole.train.images[own], whole.train.labels[own], fingerprint="ones")
    source = replace(whole, target=replace(whole, train=part))
    projection = {"projection": {"dim": 64}} if features == "gradients" else {}
    options = {"count": 10, "network": NETWORK, "checkpoints": 2, "features": features, **projection}
    found = Less(Less.Config.model_validate(options)).run(make_context(), source, None)
    assert (whole.train.labels[torch.from_numpy(found.indices)] == 1).sum() >= 9
    assert (np.diff(found.scores) <= 0).all()


@pytest.mark.parametrize("method", [Trak, Less])
def test_samples_that_are_alike_come_by_row_number(
    method: type[Trak | Less], source: Source, make_context: Callable[..., Context]
) -> None:
    images = source.train.images[:1].repeat(len(source.train), 1, 1, 1)
    train = Split(images, torch.zeros_like(source.train.labels), fingerprint="alike")
    alike = targeted(replace(source, train=train))
    found = method(method.Config.model_validate(OPTIONS)).run(make_context(), alike, None)
    assert found.indices.tolist() == list(range(6))


def test_gradients_that_do_not_span_their_space_need_a_ridge() -> None:
    phi = torch.cat([rows(0, 9, 2), torch.zeros(9, 1)], dim=1)
    with pytest.raises(InputError, match="9 images do not span the 3 dimensions") as caught:
        trak_kernel(HeldRows(phi), np.arange(9), torch.ones(3, dtype=torch.float64), ridge=0.0)
    assert caught.value.where == "ridge"
    nothing = trak_kernel(
        HeldRows(torch.zeros(9, 3)), np.arange(9), torch.ones(3, dtype=torch.float64), ridge=0.0
    )
    assert not nothing.any()


@pytest.mark.parametrize("method", [Trak, Less])
def test_a_budget_above_the_data_an_empty_target_and_spaces_without_gradients_are_refused(
    method: type[Trak | Less], source: Source
) -> None:
    with pytest.raises(InputError, match="25 images are asked for, and there are 24"):
        method(method.Config.model_validate({**OPTIONS, "count": 25})).check(targeted(source), None)
    with pytest.raises(InputError, match="the target has no training images"):
        method(method.Config.model_validate(OPTIONS)).check(targeted(source, slice(0, 0)), None)
    with pytest.raises(ValueError, match="features"):
        method.Config.model_validate({"count": 5, "features": "pixels"})
    with pytest.raises(ValueError, match="checkpoints are asked for"):
        method.Config.model_validate({**OPTIONS, "checkpoints": 5})


@pytest.mark.parametrize("method", [Trak, Less])
def test_data_of_one_class_are_refused(method: type[Trak | Less], make_source: Callable[..., Source]) -> None:
    """Every gradient is 0, and the first rows would be picked."""
    with pytest.raises(InputError, match="one class: the gradients of the loss are 0") as caught:
        method(method.Config.model_validate(OPTIONS)).check(targeted(make_source((9,))), None)
    assert caught.value.where == "features"


@pytest.mark.gpu
def test_gpu_scores_what_the_cpu_scores() -> None:
    phi, goal = rows(0, 300, 32), rows(1, 1, 32)[0].double()
    here, there = (
        trak_kernel(HeldRows(phi.to(device)), np.arange(300), goal.to(device), ridge=1e-3)
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(there.cpu(), here)
