"""Importance resampling of images: how often each is drawn, what the draw hangs on, what is told, and bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dataselect import importance_choice, logistic_ratio, standard_features
from dataselect.importance_choice import Importance, draw, nearer
from distill.contracts import Context, Selection, Source
from distill.data.statistics import channel_statistics, split_of
from distill.errors import InputError
from distill.progress import NullProgress

RATIOS: dict[str, dict[str, Any]] = {
    "logistic": {},
    "quantised": {"buckets": 24},
    "hashed": {"tables": 32},
}
SHARE = 0.3  # of the source that comes from the target's distribution
MakeContext = Callable[..., Context]


def images(count: int, kind: int, *, seed: int) -> torch.Tensor:
    """uint8 (count, 1, 6, 6): noise around one of two pictures that share most of what they show."""
    rng = np.random.default_rng(seed)
    picture = np.random.default_rng(0).uniform(60, 190, (6, 6))
    picture[1 + 2 * kind : 3 + 2 * kind, 1:4] += 45
    return torch.from_numpy(np.clip(picture + rng.normal(0, 30, (count, 1, 6, 6)), 0, 255).astype(np.uint8))


def mixture(
    count: int = 600, targets: int = 80, *, seed: int = 0, share: float = SHARE
) -> tuple[Source, np.ndarray]:
    """A source of which a part is distributed as its target is, in one class with the rest, and which part."""
    alike = np.random.default_rng(seed).permutation(count) < share * count
    rows = torch.where(
        torch.from_numpy(alike)[:, None, None, None],
        images(count, 1, seed=seed + 1),
        images(count, 0, seed=seed + 2),
    )
    target = source_of(images(targets, 1, seed=seed + 3))
    return replace(source_of(rows), target=target), alike


def source_of(pixels: torch.Tensor) -> Source:
    train = split_of(pixels, torch.zeros(len(pixels), dtype=torch.int64))
    mean, std = channel_statistics(pixels)
    empty = split_of(pixels[:0], torch.zeros(0, dtype=torch.int64))
    return Source("pictures", ("all",), train, empty, mean, std)


def selector(count: int, **options: Any) -> Importance:
    return Importance(Importance.Config.model_validate({"count": count, "features": "pixels", **options}))


def run(ctx: Context, source: Source, count: int, **options: Any) -> Selection:
    step = selector(count, **options)
    step.check(source, None)
    return step.run(ctx, source, None)


# --- draws


@pytest.mark.parametrize("count", [1, 3])
def test_images_are_drawn_as_often_as_their_weights_say(count: int) -> None:
    """Chi-square of inclusions over 4,000 seeds against the exact probabilities of draws one after the other."""
    weights, numbers, seeds = np.array([1.0, 2.0, 3.0, 5.0, 0.5]), np.array([900, 7, 31, 8, 44]), 4_000
    exact = np.zeros(5)
    for order in permutations(range(5), count):
        left, chance = weights.sum(), 1.0
        for item in order:
            chance *= weights[item] / left
            left -= weights[item]
        exact[list(order)] += chance
    drawn = np.zeros(5)
    for seed in range(seeds):
        drawn[draw(np.log(weights), numbers, count, seed=seed, noise=True, truncate=False).rows] += 1
    assert drawn.sum() == count * seeds == pytest.approx(exact.sum() * seeds)
    assert float(((drawn - exact * seeds) ** 2 / (exact * seeds)).sum()) < 30


def test_an_image_is_drawn_by_its_number_in_the_data_whatever_else_is_there() -> None:
    rng = np.random.default_rng(1)
    logs, numbers = rng.normal(size=80), rng.permutation(1000)[:80]
    every = draw(logs, numbers, 80, seed=3, noise=True, truncate=False).rows
    shuffled = rng.permutation(80)
    again = draw(logs[shuffled], numbers[shuffled], 80, seed=3, noise=True, truncate=False).rows
    assert numbers[every].tolist() == numbers[shuffled][again].tolist()
    half = np.flatnonzero(np.arange(80) % 2)
    part = draw(logs[half], numbers[half], 40, seed=3, noise=True, truncate=False).rows
    assert numbers[half][part].tolist() == [n for n in numbers[every].tolist() if n in numbers[half]]


def test_without_noise_the_greatest_are_taken_and_of_equal_ones_the_first() -> None:
    logs = np.array([0.0, 2.0, 1.0, 2.0, 1.0])
    taken = draw(logs, np.array([50, 40, 30, 20, 10]), 4, seed=0, noise=False, truncate=False)
    assert taken.rows.tolist() == [1, 3, 2, 4]


@pytest.mark.parametrize(("off", "least"), [(0.0, 1.0), (2**-23, 0.8)])
@pytest.mark.parametrize("folds", [1, 4])
def test_twins_of_one_fold_tie_and_others_are_alike(
    folds: int, off: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie in different blocks; those whose features differ in their last bits tie for the most part."""
    monkeypatch.setattr(standard_features, "_ROWS", 37)
    g = torch.Generator().manual_seed(0)
    once, target = torch.randn(150, 8, generator=g), torch.randn(80, 8, generator=g) + 0.4
    candidates = torch.cat([once, once * (1 + off)])
    assert torch.equal(candidates[:150], candidates[150:]) == (off == 0)
    standard_features.standardise(candidates, target)
    options = Importance.Config(count=1, folds=folds)
    logs = importance_choice._by_classifier(candidates, target, options, 7, lambda: None).logs
    cut = logistic_ratio._cut(300, folds, 7, 0).numpy()
    together, ties = cut[:150] == cut[150:], logs[:150] == logs[150:]
    assert together.any() and ties[together].mean() >= least
    assert not ties[~together].any(), "two classifiers"
    assert np.median(np.abs(logs[:150] - logs[150:])) < 0.2 * logs.std()


def test_no_weight_is_above_what_truncation_leaves() -> None:
    weights = np.array([1.0, 1.0, 1.0, 100.0])
    most = np.sqrt(4) * weights.mean()
    drawn = draw(np.log(weights), np.arange(4), 2, seed=0, noise=False, truncate=True)
    assert np.exp(drawn.logs) == pytest.approx([1, 1, 1, most])
    assert drawn.facts["truncated"] == 1
    assert drawn.facts["effective_size"] == pytest.approx((3 + most) ** 2 / (3 + most**2))
    bare = draw(np.log(weights), np.arange(4), 2, seed=0, noise=False, truncate=False)
    assert bare.facts == {"effective_size": pytest.approx(103**2 / (3 + 100**2))}


@pytest.mark.parametrize(("k", "m", "levels"), [(500, 500, 16), (500, 33, 6), (24, 500, 4), (3, 500, 2)])
def test_nearness_is_measured_over_levels_that_hold_as_many_of_the_target(
    k: int, m: int, levels: int
) -> None:
    """Against loops over levels; cells of source and selection have half a count more."""
    rng = np.random.default_rng(2)
    logs, target = rng.normal(size=900), rng.normal(1.0, size=m)
    rows = np.argsort(-logs + rng.normal(size=900))[:k]
    found = nearer(logs, target, rows)
    ranks = np.sort(target)
    bounds = [-np.inf, *(np.quantile(ranks, level / levels) for level in range(1, levels)), np.inf]

    def plain(others: np.ndarray) -> float:
        total = 0.0
        for low, high in pairwise(bounds):
            p = ((target >= low) & (target < high)).mean()
            q = (((others >= low) & (others < high)).sum() + 0.5) / (len(others) + levels / 2)
            total += p * np.log(p / q)
        return total

    assert found["kl_levels"] == levels
    assert found["kl_source"] == pytest.approx(plain(logs), abs=1e-6)
    assert found["kl_reduction"] == pytest.approx(plain(logs) - plain(logs[rows]), abs=1e-6)


# --- selections


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_like_the_target_is_drawn_from_a_mixture(
    ratio: str, seed: int, make_context: MakeContext
) -> None:
    """Of the source 30% are; of what is drawn most are, and of the greatest weights nearly all."""
    source, alike = mixture(seed=10 * seed)
    options = {"ratio": ratio, **RATIOS[ratio]}
    drawn = run(make_context(seed=seed), source, 60, **options)
    greatest = run(make_context(seed=seed), source, 60, **options, noise=False)
    assert alike[drawn.indices].mean() > 2 * SHARE
    assert alike[greatest.indices].mean() > 0.9
    assert (np.diff(greatest.scores) <= 0).all()
    for found in (drawn, greatest):
        assert found.weights.tolist() == [1.0] * 60
        assert found.meta["ratio"] == ratio and found.meta["score"] == Importance.score
        assert 20 < found.meta["effective_size"] < 450
    assert 0.3 * drawn.meta["kl_source"] < drawn.meta["kl_reduction"] < drawn.meta["kl_source"]


@pytest.mark.parametrize("ratio", RATIOS)
def test_all_images_drawn_are_the_source_and_no_nearer_to_the_target(
    ratio: str, make_context: MakeContext
) -> None:
    source, _ = mixture(90, 30)
    found = run(make_context(), source, 90, ratio=ratio, **RATIOS[ratio])
    assert sorted(found.indices.tolist()) == list(range(90))
    assert found.meta["kl_reduction"] == 0


@pytest.mark.parametrize("ratio", RATIOS)
def test_neither_blocks_nor_threads_matter(
    ratio: str, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = mixture()
    options = {"ratio": ratio, **RATIOS[ratio]}
    wanted = run(make_context(), source, 200, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(standard_features, "_ROWS", 37)
        found = run(make_context(), source, 200, **options, memory=1 << 20)
    finally:
        torch.set_num_threads(threads)
    assert found.indices.tolist() == wanted.indices.tolist()
    np.testing.assert_allclose(found.scores, wanted.scores, atol=1e-5)


def test_features_in_a_file_give_the_same(make_context: MakeContext) -> None:
    """600 x 36 float32 are more than the least memory that k-means' rows leave."""
    source, _ = mixture(9000, 80)
    inside, mapped = (
        run(make_context(), source, 100, ratio="hashed", tables=8, memory=memory)
        for memory in (1 << 30, 1 << 20)
    )
    assert 4 * 9000 * 36 > 1 << 20
    assert inside.indices.tolist() == mapped.indices.tolist()


def test_the_order_of_the_data_does_not_matter_to_hashes(make_context: MakeContext) -> None:
    """Rows as they were found come with the images: the same are drawn from the data in another order."""
    source, _ = mixture()
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    moved = source_of(source.train.images[order])
    shuffled = replace(moved, train=replace(moved.train, rows=order), target=source.target)
    options = {"ratio": "hashed", **RATIOS["hashed"]}
    wanted = run(make_context(), source, 50, **options)
    found = run(make_context(), shuffled, 50, **options)
    assert order[found.indices].tolist() == wanted.indices.tolist()


@pytest.mark.parametrize("truncate", [False, True])
def test_truncation_is_told(truncate: bool, make_context: MakeContext) -> None:
    """A hundredth of the source is like the target: their weights are about a hundred times the mean."""
    source, alike = mixture(share=0.01)
    found = run(make_context(), source, 4, noise=False, truncate=truncate)
    assert alike[found.indices].all()
    assert (found.meta.get("truncated", 0) > 1) == truncate
    assert (found.scores[0] == found.scores[1]) == truncate


# --- what is told


class Heard(NullProgress):
    """Keeps what is told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def note(self, text: str, **facts: Any) -> None:
        self.notes.append(text)

    def warn(self, text: str, **facts: Any) -> None:
        self.warnings.append(text)


def heard(ctx: Context, source: Source, count: int, **options: Any) -> Heard:
    progress = Heard()
    run(replace(ctx, progress=progress), source, count, **options)
    return progress


def test_a_run_tells_how_near_it_came(make_context: MakeContext) -> None:
    source, _ = mixture()
    for ratio, options in RATIOS.items():
        progress = heard(make_context(), source, 60, ratio=ratio, **options)
        assert len(progress.notes) == 1 and not progress.warnings
        assert progress.notes[0].startswith("importance: 60 of 600 images; their weights are as ")
        told = r"KL to the target, over 12 levels of log weight, falls by [01]\.\d+ from [01]\.\d+$"
        assert re.search(told, progress.notes[0])


def test_a_classifier_that_learns_nothing_is_told(make_context: MakeContext) -> None:
    """Of two samples of one distribution."""
    source, _ = mixture(200, 60)
    same = replace(
        source, target=source_of(images(60, 0, seed=90)), train=source_of(images(200, 0, seed=91)).train
    )
    progress = heard(make_context(), same, 20, regularisation=1e-3)
    assert any("hardly better than chance" in text for text in progress.warnings)


def test_fewer_samples_worth_than_asked_for_are_told(make_context: MakeContext) -> None:
    source, _ = mixture()
    progress = heard(make_context(), source, 590)
    assert any("590 images are asked for, and the weights are as " in text for text in progress.warnings)


# --- bad input


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ratio": "quantised", "folds": 3}, "folds would be ignored: ratio: quantised uses buckets"),
        (
            {"ratio": "hashed", "buckets": 9, "regularisation": 1.0},
            "buckets and regularisation would be ignored",
        ),
        ({"smoothing": 0.5}, "smoothing would be ignored: ratio: logistic uses regularisation, folds"),
        ({"ratio": "quantised", "combine": "sum"}, "combine would be ignored"),
        ({"per_class": True}, "remove per_class"),
        ({"ratio": "exact"}, "logistic"),
        ({"regularisation": 0}, "greater than 0"),
        ({"bits": 17, "ratio": "hashed"}, "less than or equal to 16"),
    ],
)
def test_options_that_do_not_belong_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        selector(5, **options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"folds": 9}, "8 images of the target cannot be cut into 9 folds"),
        ({"ratio": "quantised", "buckets": 49}, "48 images of the data and the target cannot be cut into 49"),
    ],
)
def test_parts_that_samples_do_not_fill_are_refused_before_any_work(
    options: dict[str, Any], text: str
) -> None:
    source, _ = mixture(40, 8)
    with pytest.raises(InputError, match=text):
        selector(5, **options).check(source, None)
    selector(5, ratio="hashed").check(source, None)


def test_a_step_before_that_leaves_fewer_than_folds_is_refused(make_context: MakeContext) -> None:
    source, _ = mixture(40, 8)
    few = Selection(np.arange(3), np.ones(3, np.float32), np.zeros(3, np.float32))
    with pytest.raises(InputError, match="3 images of the data cannot be cut into 5 folds"):
        selector(2).run(make_context(), source, few)
