"""SimCore: rounds in which every centroid takes what is most similar, the rule that ends them, and its queues."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataselect import simcore
from dataselect.clustering import kmeans, scale_to_length_one
from dataselect.simcore import SimCore, retrieve, target_centroids
from distill.contracts import Context, Selection, Source, Split
from distill.errors import InputError
from distill.progress import NullProgress


def unit(*shape: int, seed: int) -> Tensor:
    return scale_to_length_one(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + 0.3)


def circle(*degrees: float) -> Tensor:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def slow_rounds(
    features: np.ndarray, centroids: np.ndarray, count: int, *, tau: float | None, reference_round: int
) -> tuple[list[int], list[float], int]:
    """Algorithm 1 with all similarities sorted for every centroid."""
    similar = np.round(centroids @ features.T * 2**20) / 2**20  # (k, N)
    picks: list[int] = []
    scores: list[float] = []
    rounds, reference = 0, -np.inf
    while len(picks) < count:
        left = [row for row in range(len(features)) if row not in picks]
        best = [max(left, key=lambda row, own=own: (own[row], -row)) for own in similar]  # type: ignore[misc]
        value = np.mean([own[row] for own, row in zip(similar, best, strict=True)])
        if tau is not None and rounds >= reference_round and value < tau * reference:
            break
        rounds += 1
        reference = value if rounds == reference_round else reference
        gains = {row: max(own[row] for own, b in zip(similar, best, strict=True) if b == row) for row in best}
        ranked = sorted(gains, key=lambda row: (-gains[row], row))[: count - len(picks)]
        picks += ranked
        scores += [float(gains[row]) for row in ranked]
    return picks, scores, rounds


@pytest.mark.parametrize("queue", [1, 2, 5, 4096])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n", "k", "count"), [(1, 1, 1), (1, 4, 1), (40, 5, 13), (30, 7, 30), (60, 1, 20)])
def test_equals_the_slow_rounds(
    n: int, k: int, count: int, seed: int, queue: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the length of the queues, which are filled anew when used up."""
    monkeypatch.setattr(simcore, "_QUEUE", queue)
    features, centroids = unit(n, 4, seed=seed), unit(k, 4, seed=seed + 50)
    for tau in (None, 0.9, 0.99):
        for reference_round in (1, 2):
            found = retrieve(features, centroids, count, tau=tau, reference_round=reference_round)
            picks, scores, rounds = slow_rounds(
                features.double().numpy(),
                centroids.double().numpy(),
                count,
                tau=tau,
                reference_round=reference_round,
            )
            assert found.rows.tolist() == picks
            np.testing.assert_allclose(found.similarities, scores, atol=1e-9)
            assert (found.rounds, found.stopped) == (rounds, len(picks) < count)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    features, centroids = unit(300, 6, seed=1), unit(9, 6, seed=2)
    wanted = retrieve(features, centroids, 120, tau=None)
    monkeypatch.setattr(simcore, "_QUEUE", 10)
    for size in (1, 50, 1000):
        monkeypatch.setattr(simcore, "_BLOCK_NUMBERS", size)
        found = retrieve(features, centroids, 120, tau=None)
        assert found.rows.tolist() == wanted.rows.tolist()
        assert found.similarities.tolist() == wanted.similarities.tolist()


def test_passes_over_the_source_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them at least as many samples are taken as a queue is long, however alike the centroids."""
    fills: list[int] = []
    fill = simcore._Queues._fill

    def counted(self: simcore._Queues, taken: np.ndarray) -> None:
        fills.append(int(taken.sum()))
        fill(self, taken)

    monkeypatch.setattr(simcore._Queues, "_fill", counted)
    monkeypatch.setattr(simcore, "_QUEUE", 20)
    features = unit(400, 5, seed=3)
    retrieve(features, unit(1, 5, seed=4).repeat(6, 1), 200, tau=None)
    assert 1 < len(fills) <= 200 // 20 + 1


def test_golden_rounds() -> None:
    """On the circle, worked by hand: centroids at 0 and 90 degrees."""
    features = circle(10, 45, 95, 180, 200, 44.0)
    found = retrieve(features, circle(0, 90), 6, tau=None)
    # 95 and 10; then 44 and 45; then 180, the nearer one to 90, and 200.
    assert found.rows.tolist() == [2, 0, 5, 1, 3, 4]
    assert found.similarities.tolist() == pytest.approx(
        np.cos(np.deg2rad([5, 10, 44, 45, 90, 160])), abs=1e-6
    )
    assert (found.rounds, found.stopped) == (3, False)


def test_a_sample_that_two_centroids_take_counts_once_at_its_largest_cosine() -> None:
    found = retrieve(circle(40, 170, 175), circle(0, 60), 1, tau=None)
    assert found.rows.tolist() == [0]
    assert found.similarities.tolist() == pytest.approx([np.cos(np.deg2rad(20))], abs=1e-6)


def test_the_last_round_is_cut_to_its_most_similar() -> None:
    found = retrieve(circle(30, 91, 185), circle(0, 90, 180), 2, tau=None)
    assert found.rows.tolist() == [1, 2]


@pytest.mark.parametrize(("reference_round", "rounds"), [(1, 2), (2, 3), (3, 3), (4, 5)])
def test_stops_before_the_round_that_falls_below_the_reference(reference_round: int, rounds: int) -> None:
    """One centroid: 0.88 of its cosines are 0.88, 0.792, 0.704 and 0.616."""
    cosines = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.65])
    features = torch.stack([cosines, (1 - cosines.square()).sqrt()], dim=1)
    found = retrieve(features, circle(0), 5, tau=0.88, reference_round=reference_round)
    assert found.rows.tolist() == list(range(rounds))
    assert (found.rounds, found.stopped) == (rounds, rounds < 5)


def test_the_first_round_is_always_kept() -> None:
    found = retrieve(circle(180, 170), circle(0), 2, tau=1.0)
    assert found.rows.tolist() == [1] and found.stopped


def test_ties_go_to_the_lowest_row_and_zeros_are_like_nothing() -> None:
    features = torch.zeros(7, 2)
    assert retrieve(features, circle(0, 90), 7, tau=None).rows.tolist() == list(range(7))
    features[[3, 5]] = circle(20)
    found = retrieve(features, circle(0), 4, tau=None)
    assert found.rows.tolist() == [3, 5, 0, 1]
    assert found.similarities[2:].tolist() == [0.0, 0.0]


def test_as_many_centroids_as_samples_of_the_target_are_the_samples() -> None:
    target = unit(6, 3, seed=0)
    for count in (6, 100):
        torch.testing.assert_close(target_centroids(3 * target, count, seed=0, iterations=5), target)
    fewer = target_centroids(3 * target, 2, seed=0, iterations=5)
    wanted = kmeans(target, 2, seed=0, iterations=5, spherical=True).centroids
    torch.testing.assert_close(fewer, wanted)
    torch.testing.assert_close(fewer.norm(dim=1), torch.ones(2))


# --- the method

PIXELS: dict[str, Any] = {"features": "pixels", "centroids": 3}


@pytest.fixture
def aimed(make_source: Callable[..., Source]) -> Source:
    """Four classes of twelve, and a target of other images of the last two, under other numbers."""
    source, other = make_source((12,) * 4), make_source((30,) * 4)
    labels = other.train.labels.numpy()
    rows = np.concatenate([np.flatnonzero(labels == number)[12:] for number in (3, 2)])
    split = Split(
        other.train.images[rows], torch.from_numpy((labels[rows] == 2).astype(np.int64)), "other images"
    )
    return replace(source, target=replace(other, train=split, classes=("three", "two")))


def run(source: Source, context: Context, **options: Any) -> Selection:
    method = SimCore(SimCore.Config.model_validate({**PIXELS, **options}))
    method.check(source, None)
    return method.run(context, source, None)


def test_picks_what_resembles_the_target(aimed: Source, make_context: Callable[..., Context]) -> None:
    found = run(aimed, make_context(), count=16, centroids=6)
    labels = aimed.train.labels.numpy()[found.indices]
    assert (labels >= 2).mean() > 0.85, "half would be at random"
    assert found.meta["centroids"] == 6 and found.meta["stopped"] is False


def test_stops_by_itself_with_and_without_a_budget(
    aimed: Source, make_context: Callable[..., Context]
) -> None:
    free = run(aimed, make_context(), stop=True, tau=0.97)
    assert 0 < len(free.indices) < 48
    assert free.meta["stopped"] is True
    assert run(aimed, make_context(), stop=True, tau=0.97, count=48).indices.tolist() == free.indices.tolist()
    capped = run(aimed, make_context(), stop=True, tau=0.97, count=2)
    assert capped.indices.tolist() == free.indices[:2].tolist() and capped.meta["stopped"] is False


class Told(NullProgress):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, **facts: Any) -> None:
        self.notes.append(text)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"stop": True, "tau": 0.97}, "of at most 48 images: the next are less than 0.97 times as similar"),
        ({"stop": True, "tau": 0.97, "count": 2}, "with all 2 images it may keep, before similarity fell"),
    ],
)
def test_tells_what_ended_it(
    aimed: Source, make_context: Callable[..., Context], options: dict[str, Any], told: str
) -> None:
    progress = Told()
    run(aimed, replace(make_context(), progress=progress), **options)
    (note,) = progress.notes
    assert told in note


def test_a_budget_alone_needs_no_word(aimed: Source, make_context: Callable[..., Context]) -> None:
    progress = Told()
    run(aimed, replace(make_context(), progress=progress), count=2)
    assert progress.notes == []


def test_a_network_learns_the_target_alone(aimed: Source, make_context: Callable[..., Context]) -> None:
    """By default: it has the target's two classes, and the source's labels are never read."""
    network = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 1, "batch_size": 16}}
    options = {"features": "network", "network": network, "count": 5}
    blind = replace(aimed, train=replace(aimed.train, labels=torch.zeros_like(aimed.train.labels)))
    found, again = (run(each, make_context(), **options).indices.tolist() for each in (aimed, blind))
    assert found == again
    from_source = run(aimed, make_context(), **options, trained_on="source").indices.tolist()
    assert from_source != found


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"count": 3, "tau": 0.9}, "tau and reference_round say when to stop"),
        ({"count": 3, "reference_round": 2}, "tau and reference_round say when to stop"),
        ({}, "exactly one of ipc, fraction and count"),
        ({"ipc": 1}, "ipc counts images of each class"),
        ({"count": 1, "per_class": True}, "the target decides"),
        ({"count": 1, "features": "gradients"}, "a network trained on the target gives features: network"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        SimCore.Config.model_validate(options)


def test_the_merged_options_are_read_back() -> None:
    chosen = SimCore.Config.model_validate({"count": 2, "features": "pixels"})
    assert SimCore.Config.model_validate_json(chosen.model_dump_json()) == chosen


def test_a_budget_above_the_source_is_refused(aimed: Source, make_context: Callable[..., Context]) -> None:
    with pytest.raises(InputError, match="49 images are asked for, and there are 48"):
        run(aimed, make_context(), count=49, stop=True)


@pytest.mark.gpu
def test_gpu_picks_what_the_cpu_picks() -> None:
    features, centroids = unit(2000, 32, seed=0), unit(20, 32, seed=1)
    on_cpu = retrieve(features, centroids, 150, tau=None)
    for source in (features, features.cuda()):
        on_gpu = retrieve(source, centroids.cuda(), 150, tau=None)
        assert on_gpu.rows.tolist() == on_cpu.rows.tolist()
        np.testing.assert_allclose(on_gpu.similarities, on_cpu.similarities, atol=2e-6)
