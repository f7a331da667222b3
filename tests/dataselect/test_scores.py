"""Scores: each against its formula in float64, one sign for all, ties by the seed, and samples without a score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chi2
from torch import Tensor

import dataselect.hardness as hardness_module
from dataselect.hardness import (
    By,
    Hardness,
    easiest_first,
    entropies,
    least_confidences,
    probability_margins,
)
from dataselect.scores import ScoreChoice, keep
from distill.cache import Cache, Limits, Network
from distill.cache.teachers import train_teacher, train_teachers
from distill.contracts import Context, Preprocessing, Selection, Source, Split
from distill.errors import InputError
from distill.models import build, model_config
from distill.training.job import Job
from distill.training.recording import Dynamics

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 3, "batch_size": 16}}
MakeContext = Callable[..., Context]
MakeSource = Callable[..., Source]


def config(**options: object) -> ScoreChoice.Config:
    return ScoreChoice.Config.model_validate({"ipc": 2, "network": NETWORK, **options})


def hardness_of(context: Context, source: Source, **options: object) -> np.ndarray:
    return Hardness(context, source, config(**options)).values


def with_hardness(monkeypatch: pytest.MonkeyPatch, values: np.ndarray) -> None:
    """Every source's samples are that hard, and no network is trained."""
    monkeypatch.setattr(Hardness, "values", values)


def with_networks(monkeypatch: pytest.MonkeyPatch, *networks: Network) -> None:
    """These networks are what training gives."""
    monkeypatch.setattr(hardness_module, "train_teachers", lambda *_, **__: list(networks))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def slow_hardness(by: str, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The formulas, sample by sample, in float64."""
    found = []
    for p, label in zip(softmax(logits.astype(np.float64)), labels, strict=True):
        ranked = sorted(p, reverse=True)
        found.append(
            {
                "el2n": sum((p[c] - (c == label)) ** 2 for c in range(len(p))) ** 0.5,
                "entropy": -sum(q * np.log(q) for q in p if q > 0),
                "margin": -(ranked[0] - ranked[1]),
                "least_confidence": 1 - ranked[0],
                "loss": -np.log(p[label]),
            }[by]
        )
    return np.array(found)


# --- formulas

FROM_LOGITS = ["el2n", "entropy", "margin", "least_confidence", "loss"]


@pytest.mark.parametrize("classes", [2, 3, 11])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("formula", "by", "sign"),
    [
        (entropies, "entropy", 1),
        (probability_margins, "margin", -1),
        (least_confidences, "least_confidence", 1),
    ],
)
def test_uncertainties_equal_their_formulas(
    formula: Callable[[Tensor], Tensor], by: str, sign: int, classes: int, seed: int
) -> None:
    logits = np.random.default_rng(seed).normal(size=(20, classes)) * 4
    found = sign * formula(torch.from_numpy(logits)).numpy()
    np.testing.assert_allclose(found, slow_hardness(by, logits, np.zeros(20, int)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("formula", "even", "one"),
    [(entropies, np.log(4), 0), (probability_margins, 0, 1), (least_confidences, 0.75, 0)],
)
def test_uncertainties_at_their_ends(formula: Callable[[Tensor], Tensor], even: float, one: float) -> None:
    """Equal logits; logits so far apart that probabilities are 0 and 1; one class alone."""
    logits = torch.tensor([[5.0, 5, 5, 5], [0, 9e4, -9e4, 0]], dtype=torch.float64)
    assert formula(logits).tolist() == pytest.approx([even, one])
    assert formula(torch.tensor([[3.0]], dtype=torch.float64)).tolist() == [one]


@pytest.mark.parametrize("by", FROM_LOGITS)
def test_scores_of_logits_equal_their_formulas(by: By, source: Source, make_context: MakeContext) -> None:
    context = make_context()
    network = train_teacher(context, source, config().network, name="again")
    logits = context.cache.logits(source.train, network).read(slice(None)).numpy()
    wanted = slow_hardness(by, logits, source.train.labels.numpy())
    np.testing.assert_allclose(hardness_of(context, source, by=by), wanted, rtol=1e-5, atol=1e-6)


def test_grand_is_the_length_of_each_gradient(source: Source, make_context: MakeContext) -> None:
    context = make_context()
    network = train_teacher(context, source, config().network, name="again")
    module = network.module(torch.device("cpu")).double().requires_grad_(True)
    mean, std = (torch.tensor(each).double()[:, None, None] for each in (source.mean, source.std))
    wanted = []
    for image, label in zip(source.train.images, source.train.labels, strict=True):
        logits = module(((image.double() / 255 - mean) / std)[None])
        gradients = torch.autograd.grad(F.cross_entropy(logits, label[None]), list(module.parameters()))
        wanted.append(float(sum(each.square().sum() for each in gradients)) ** 0.5)
    np.testing.assert_allclose(hardness_of(context, source, by="grand"), wanted, rtol=1e-3)


def test_what_was_recorded_while_the_network_was_trained(source: Source, make_context: MakeContext) -> None:
    context = make_context()
    dynamics = train_teacher(context, source, config().network, name="again").dynamics
    assert dynamics is not None
    np.testing.assert_array_equal(hardness_of(context, source, by="aum"), -dynamics.margin.double().numpy())
    wanted = np.where(dynamics.learned, dynamics.forgetting, 3)
    np.testing.assert_array_equal(hardness_of(context, source, by="forgetting"), wanted)


def test_never_learned_is_hardest_and_finite_in_every_mean(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepCore's release counts it as 0, and so as easiest. Of 3 epochs none is forgotten more than once."""
    context = make_context()
    network = train_teacher(context, source, config().network, name="again")
    never, forgotten = torch.arange(24) == 5, torch.arange(24) % 2
    first = Dynamics(forgotten.int(), ~never, torch.zeros(24))
    second = Dynamics(torch.zeros(24).int(), torch.ones(24).bool(), torch.zeros(24))
    with_networks(monkeypatch, *(replace(network, dynamics=each) for each in (first, second)))
    found = hardness_of(context, source, by="forgetting", networks=2)
    wanted = forgotten.double().numpy() / 2
    wanted[5] = 1.5
    np.testing.assert_array_equal(found, wanted)
    chosen = ScoreChoice(config(by="forgetting", networks=2, ipc=1)).run(context, source, None)
    assert 5 in chosen.indices and np.isfinite(chosen.scores).all()


# --- one sign for all


@pytest.mark.parametrize("by", get_args(By))
def test_larger_is_harder_whatever_the_score(
    by: By, make_source: MakeSource, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One linear layer over pixels; sample 0 is sure, sample 1 in two minds, both labelled as the network thinks."""
    source = make_source((4, 4))
    images = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([250, 10, 120, 120, 120, 120, 120, 120])
    source = replace(source, train=Split(images, torch.zeros(8, dtype=torch.int64), "sure and not"))
    model = model_config({"name": "mlp", "width": 1, "depth": 1})
    module = build(model, image_shape=(1, 8, 8), classes=2, seed=0)
    state = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
    for value in state.values():
        if value.ndim == 2:
            value[0, 0] = 2.0  # the brighter the first pixel, the likelier class 0
    margin = torch.linspace(5, 1, 8)
    margin[1] = -1
    dynamics = Dynamics(torch.tensor([0, 3, 1, 1, 1, 1, 1, 1]).int(), torch.ones(8).bool(), margin)
    facts = {"data": "sure and not"}
    plain = Preprocessing((0.0,), (1.0,))
    with_networks(monkeypatch, Network(model, (1, 8, 8), 2, plain, state, facts, dynamics=dynamics))
    context = make_context()
    found = hardness_of(context, source, by=by)
    assert found[0] < found[2:].min() and found[2:].max() < found[1]
    hardest, easiest = (
        ScoreChoice(config(by=by, keep=which, ipc=None, count=1, per_class=False)).run(context, source, None)
        for which in ("hardest", "easiest")
    )
    assert (hardest.indices.tolist(), easiest.indices.tolist()) == ([1], [0])
    assert hardest.scores[0] > easiest.scores[0]


# --- networks


def test_several_networks_count_alike(source: Source, make_context: MakeContext, trained: list[Job]) -> None:
    context = make_context()
    networks = train_teachers(context, source, config().network, count=3, name="again")
    alone = []
    for network in networks:
        logits = context.cache.logits(source.train, network).read(slice(None)).numpy()
        alone.append(slow_hardness("el2n", logits, source.train.labels.numpy()))
    found = Hardness(context, source, config(networks=3))
    np.testing.assert_allclose(found.values, np.mean(alone, axis=0), rtol=1e-5)
    assert np.std(alone, axis=0).max() > 1e-3
    assert len(trained) == 3
    assert found.meaning.endswith("mean over 3 networks")


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_networks_may_be_asked_early(epoch: int, source: Source, make_context: MakeContext) -> None:
    context = make_context()
    network = train_teacher(context, source, config().network, name="again", checkpoints=(epoch,))
    logits = context.cache.logits(source.train, network.checkpoints()[0]).read(slice(None)).numpy()
    wanted = slow_hardness("loss", logits, source.train.labels.numpy())
    found = hardness_of(context, source, by="loss", epoch=epoch)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    last = hardness_of(context, source, by="loss")
    assert np.array_equal(found, last) == (epoch == 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "aum", "epoch": 1}, "epoch would be ignored: by: aum"),
        ({"by": "forgetting", "epoch": 1}, "epoch would be ignored: by: forgetting"),
        ({"epoch": 4}, "epoch 4 is beyond the 3 epochs"),
        ({"by": "aum", "network": {"train": {"mix": "mixup"}}}, "set network.train.mix to none"),
        ({"by": "forgetting", "network": {"train": {"mix": "cutmix"}}}, "set network.train.mix to none"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**options)


def test_estimate_counts_networks_and_their_rows() -> None:
    def estimate(**options: object) -> Any:
        return ScoreChoice(config(**options)).estimate(train=24, classes=3, before=None)

    assert (len(estimate(networks=4).trainings), estimate(networks=4).features) == (4, 96)
    assert estimate(by="aum").features == 0
    assert [each.checkpoints for each in (*estimate(epoch=1).trainings, *estimate().trainings)] == [2, 1]
    assert estimate().images == 6


# --- the ranking


def test_picks_class_by_class_what_the_slow_ranking_picks(source: Source, make_context: MakeContext) -> None:
    context = make_context()
    values = hardness_of(context, source)
    labels = source.train.labels.numpy()
    for which, middle in (("hardest", None), ("easiest", None), ("middle", 3.5)):
        found = ScoreChoice(config(ipc=3, keep=which)).run(context, source, None)
        for number in range(3):
            own = sorted(np.flatnonzero(labels == number), key=lambda sample: values[sample])
            ranked = {
                "hardest": own[::-1],
                "easiest": own,
                "middle": sorted(own, key=lambda sample: abs(own.index(sample) - (middle or 0))),
            }[which]
            assert found.indices[3 * number : 3 * number + 3].tolist() == ranked[:3]
        np.testing.assert_array_equal(found.scores, values[found.indices].astype(np.float32))
    assert found.meta["score"].startswith("hardness by el2n, larger is harder")


def test_over_all_samples_classes_have_no_say(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.where(source.train.labels.numpy() == 1, 10.0, 0.0) + np.arange(24) / 100
    with_hardness(monkeypatch, values)
    method = ScoreChoice(config(ipc=None, count=8, per_class=False))
    found = method.run(make_context(), source, None)
    assert found.indices.tolist() == values.argsort()[::-1][:8].tolist()
    assert set(source.train.labels.numpy()[found.indices]) == {1}


@pytest.mark.parametrize(
    ("which", "count", "wanted"),
    [
        ("hardest", 3, [4, 3, 2]),
        ("easiest", 3, [0, 1, 2]),
        ("middle", 1, [2]),
        ("middle", 4, [2, 1, 3, 0]),
        ("middle", 5, [2, 1, 3, 0, 4]),
    ],
)
def test_golden_ends_and_middle(which: Any, count: int, wanted: list[int]) -> None:
    assert keep(np.arange(5), count, which).tolist() == wanted


@given(n=st.integers(1, 30), data=st.data())
def test_the_middle_leaves_as_many_on_either_side(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n))
    kept = sorted(keep(np.arange(n), count, "middle"))
    assert kept == list(range(kept[0], kept[0] + count))
    assert abs(kept[0] - (n - 1 - kept[-1])) <= 1


def test_the_whole_budget_is_every_sample(source: Source, make_context: MakeContext) -> None:
    for which in ("hardest", "easiest", "middle"):
        found = ScoreChoice(config(ipc=8, keep=which)).run(make_context(), source, None)
        assert sorted(found.indices) == list(range(24))


# --- ties


def test_equally_hard_samples_are_picked_alike_often() -> None:
    """3 of 9 with equal scores over 400 seeds; the counts of draws without replacement are chi-square."""
    counts = np.zeros(9)
    for seed in range(400):
        counts[easiest_first(np.zeros(9), np.arange(9) + 50, seed=seed)[:3]] += 1
    expected = 400 / 3
    statistic = ((counts - expected) ** 2).sum() / (expected * (1 - 1 / 3)) * 8 / 9
    assert 0.001 < chi2.sf(statistic, 8) < 0.999


def test_ties_hang_on_the_seed_and_the_samples_numbers_alone() -> None:
    samples, grown = np.array([4, 7, 8, 30]), np.array([1, 4, 7, 8, 11, 30])
    few = samples[easiest_first(np.zeros(4), samples, seed=3)]
    many = grown[easiest_first(np.array([5.0, 0, 0, 0, 5, 0]), grown, seed=3)]
    assert many[:4].tolist() == few.tolist()
    orders = {tuple(easiest_first(np.zeros(4), samples, seed=seed)) for seed in range(20)}
    assert len(orders) > 5


def test_only_equal_ones_are_ordered_by_the_seed() -> None:
    values = np.array([2.0, 1, 2, 0, 1, 1])
    for seed in range(10):
        order = easiest_first(values, np.arange(6), seed=seed)
        assert values[order].tolist() == [0, 1, 1, 1, 2, 2]


# --- samples without a score


def test_samples_without_a_score_are_never_picked(
    source: Source, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.arange(24.0)
    values[[0, 3, 6]] = np.nan, np.inf, -np.inf
    with_hardness(monkeypatch, values)
    for which in ("hardest", "easiest", "middle"):
        method = ScoreChoice(config(ipc=None, count=21, per_class=False, keep=which))
        found = method.run(make_context(), source, None)
        assert sorted(found.indices) == sorted(set(range(24)) - {0, 3, 6})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 6}, r"6 samples of class one are asked for, and only 5 of 8 have a finite score \(el2n\)"),
        ({"ipc": None, "count": 22, "per_class": False}, "22 samples of the data .* only 21 of 24"),
    ],
)
def test_fewer_scores_than_the_budget_are_one_clear_error(
    options: dict[str, object],
    message: str,
    source: Source,
    make_context: MakeContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.arange(24.0)
    values[np.flatnonzero(source.train.labels.numpy() == 1)[:3]] = np.nan
    with_hardness(monkeypatch, values)
    with pytest.raises(InputError, match=message) as caught:
        ScoreChoice(config(**options)).run(make_context(), source, None)
    assert caught.value.found == "3 samples whose score is NaN or infinite"
    assert caught.value.fix


@pytest.mark.parametrize("by", [*FROM_LOGITS, "grand"])
def test_an_image_whose_values_are_not_finite_has_no_score(
    by: By,
    source: Source,
    make_context: MakeContext,
    nan_for_black: Callable[..., Network],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its logits read as zeros, which are those of a sample in as many minds as there are classes."""
    images = source.train.images.clone()
    images[7] = 0
    source = replace(source, train=Split(images, source.train.labels, "one black image"))
    network = nan_for_black((1, 8, 8), 3)
    with_networks(monkeypatch, network)
    context = make_context()
    cache = Cache(
        context.scratch / "cache",
        device=context.device,
        progress=context.progress,
        limits=Limits(non_finite=0.05),
    )
    context = replace(context, cache=cache)
    assert np.flatnonzero(~np.isfinite(hardness_of(context, source, by=by))).tolist() == [7]
    chosen = ScoreChoice(config(by=by, ipc=None, count=23, per_class=False)).run(context, source, None)
    assert sorted(chosen.indices) == sorted(set(range(24)) - {7})


# --- before any work


def test_a_budget_beyond_the_selection_before_is_refused_before_training(
    source: Source, make_context: MakeContext, trained: list[Job]
) -> None:
    labels = source.train.labels.numpy()
    kept = np.concatenate([np.flatnonzero(labels == number)[:3] for number in range(3)])
    before = Selection(kept, np.ones(9, np.float32), np.zeros(9, np.float32))
    with pytest.raises(InputError, match="4 images per class"):
        ScoreChoice(config(ipc=4)).run(make_context(), source, before)
    assert not trained


@pytest.mark.gpu
@pytest.mark.parametrize("formula", [entropies, probability_margins, least_confidences])
def test_gpu_equals_cpu(formula: Callable[[Tensor], Tensor]) -> None:
    logits = torch.randn(500, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    torch.testing.assert_close(formula(logits.cuda()).cpu(), formula(logits))
