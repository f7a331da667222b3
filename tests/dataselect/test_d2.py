"""D2: graph, messages and picks against the dense loop of the paper, and what its options mean."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dataselect.d2 import MessagePassing, forward, neighbour_graph, reverse
from dataselect.hardness import Hardness
from distill.contracts import Context, Source
from distill.errors import InputError
from distill.training.job import Job

NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 2, "batch_size": 16}}
MakeContext = Callable[..., Context]


def config(**options: object) -> MessagePassing.Config:
    return MessagePassing.Config.model_validate({"ipc": 2, "network": NETWORK, **options})


def dense_graph(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pairs are joined, bool (n, n), and their squared distances in units of the mean over the edges."""
    n = len(features)
    squares = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    joined = np.zeros((n, n), dtype=bool)
    for a in range(n):
        others = sorted((b for b in range(n) if b != a), key=lambda b: (squares[a, b], b))
        joined[a, others[:k]] = True
    joined |= joined.T
    unit = squares[joined].mean() if joined.any() else 0.0
    return joined, squares / unit if unit > 0 else squares


def slow_d2(
    features: np.ndarray,
    scores: np.ndarray,
    count: int,
    *,
    k: int,
    gammas: tuple[float, float],
    ties: np.ndarray,
) -> tuple[list[int], list[float]]:
    """The messages of the paper, pair by pair; a pick below 0 sends none."""
    n = len(features)
    joined, squares = dense_graph(features, k)
    now = [
        scores[a] + sum(np.exp(-gammas[0] * squares[a, b]) * scores[b] for b in range(n) if joined[a, b])
        for a in range(n)
    ]
    picks: list[int] = []
    values: list[float] = []
    for _ in range(count):
        pick = min((a for a in range(n) if a not in picks), key=lambda a: (-now[a], ties[a], a))
        picks.append(pick)
        values.append(now[pick])
        for b in range(n):
            if joined[pick, b]:
                now[b] -= np.exp(-gammas[1] * squares[pick, b]) * max(values[-1], 0.0)
    return picks, values


def fast_d2(
    features: np.ndarray,
    scores: np.ndarray,
    count: int,
    *,
    k: int,
    gammas: tuple[float, float],
    ties: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    graph = neighbour_graph(torch.from_numpy(features).float(), k)
    return reverse(graph, forward(graph, scores, gamma=gammas[0]), count, gamma=gammas[1], ties=ties)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gammas", [(1.0, 0.1), (0.0, 0.0), (2.0, 1.0)])
@pytest.mark.parametrize(("n", "width", "k"), [(1, 2, 5), (2, 1, 1), (6, 2, 9), (25, 3, 1), (40, 8, 5)])
def test_equals_the_dense_loop_to_the_last_sample(
    n: int, width: int, k: int, gammas: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    features, scores, ties = rng.normal(size=(n, width)), rng.exponential(size=n), rng.permutation(n)
    features = features.astype(np.float32).astype(np.float64)
    picks, values = fast_d2(features, scores, n, k=k, gammas=gammas, ties=ties)
    wanted, wanted_values = slow_d2(features, scores, n, k=k, gammas=gammas, ties=ties)
    assert picks.tolist() == wanted
    np.testing.assert_allclose(values, wanted_values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_dense_loop_among_duplicates_and_equal_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.integers(-1, 2, size=(30, 2)).astype(np.float64)
    scores, ties = rng.integers(0, 3, size=30).astype(np.float64), rng.permutation(30)
    picks, values = fast_d2(features, scores, 30, k=3, gammas=(0.0, 0.0), ties=ties)
    wanted, wanted_values = slow_d2(features, scores, 30, k=3, gammas=(0.0, 0.0), ties=ties)
    assert picks.tolist() == wanted
    np.testing.assert_allclose(values, wanted_values)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "k"), [(1, 3), (4, 7), (30, 4)])
def test_the_graph_is_the_dense_one(n: int, k: int, seed: int) -> None:
    features = np.random.default_rng(seed).normal(size=(n, 3)).astype(np.float32).astype(np.float64)
    graph = neighbour_graph(torch.from_numpy(features).float(), k)
    joined, squares = dense_graph(features, k)
    here, there = joined.nonzero()
    assert graph.starts.tolist() == np.concatenate([[0], joined.sum(axis=1).cumsum()]).tolist()
    assert graph.ends.tolist() == there.tolist()
    np.testing.assert_allclose(graph.squares, squares[here, there], rtol=1e-5)


def test_constant_features_have_edges_of_no_length() -> None:
    """Twins hear all of each other; the graph joins lowest rows first."""
    graph = neighbour_graph(torch.zeros(4, 3), 1)
    assert graph.ends.tolist() == [1, 2, 3, 0, 0, 0]
    assert not graph.squares.any()
    assert forward(graph, np.array([1.0, 2, 3, 4]), gamma=9.0).tolist() == [10, 3, 4, 5]


def test_golden_ranking() -> None:
    """Worked by hand. Two twins and two apart; all edges alike, so each message is worth exp(-gamma) = 1/2.

    u = (4 + 5/2, 5 + 4/2, 2 + 1/2, 1 + 2/2) = (6.5, 7, 2.5, 2): row 1, then 2 for 0 fell to 3 ... 6.5 - 3.5 = 3.
    """
    features = np.array([[0.0, 0], [1, 0], [50, 0], [51, 0]])
    half = float(np.log(2))
    picks, values = fast_d2(
        features, np.array([4.0, 5, 2, 1]), 4, k=1, gammas=(half, half), ties=np.arange(4)
    )
    assert picks.tolist() == [1, 0, 2, 3]
    np.testing.assert_allclose(values, [7, 3, 2.5, 0.75])


def test_a_pick_below_nothing_does_not_lift_its_neighbours() -> None:
    """On a path 0 - 1 - 2 - 3 without loss, as printed the last would be picked for being like the third.

    u = (9, 4, 3, 2): 0 takes 9 from 1, which stands at -5. Then 2 takes 3 from both: 1 at -8, 3 at -1.
    """
    graph = neighbour_graph(torch.tensor([[0.0], [1.0], [2.1], [3.3]]), 1)
    assert graph.ends.tolist() == [1, 0, 2, 1, 3, 2]
    picks, values = reverse(graph, np.array([9.0, 4, 3, 2]), 4, gamma=0.0, ties=np.arange(4))
    assert picks.tolist() == [0, 2, 3, 1]
    assert values.tolist() == [9, 3, -1, -8]


def test_equal_scores_go_by_ties_and_then_by_place() -> None:
    graph = neighbour_graph(torch.arange(5.0)[:, None] * 10, 1)
    picks, _ = reverse(graph, np.zeros(5), 5, gamma=1.0, ties=np.array([3, 1, 2, 1, 0]))
    assert picks.tolist() == [4, 1, 3, 2, 0]


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_units_of_the_features_do_not_matter(scale: float) -> None:
    rng = np.random.default_rng(0)
    features, scores, ties = rng.normal(size=(50, 6)), rng.exponential(size=50), np.arange(50)
    picks, _ = fast_d2(features, scores, 20, k=4, gammas=(1.0, 0.1), ties=ties)
    scaled, _ = fast_d2(features * scale, scores, 20, k=4, gammas=(1.0, 0.1), ties=ties)
    assert picks.tolist() == scaled.tolist()


def test_without_reach_the_hardest_are_picked_and_with_it_others_than_their_twins() -> None:
    """Ten hard samples in one spot and ten easy ones spread out."""
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(size=(10, 4)) * 0.01, rng.normal(size=(10, 4)) * 9 + 40])
    scores = np.concatenate([np.full(10, 3.0), np.full(10, 1.0)]) + rng.random(20) / 10
    far, _ = fast_d2(features, scores, 6, k=9, gammas=(1e9, 1e9), ties=np.arange(20))
    assert far.tolist() == (-scores).argsort()[:6].tolist()
    near, _ = fast_d2(features, scores, 4, k=9, gammas=(1e9, 0.1), ties=np.arange(20))
    assert near[0] == scores.argmax() and sum(near < 10) == 1


# --- the method


def test_picks_class_by_class_what_the_loop_picks(source: Source, make_context: MakeContext) -> None:
    context, chosen = make_context(), config(ipc=3, neighbours=2, mislabelled=0.25)
    method = MessagePassing(chosen)
    found = method.run(context, source, None)
    hardness = Hardness(context, source, chosen).values
    for number in range(3):
        samples = np.flatnonzero(source.train.labels.numpy() == number)
        kept = np.sort(samples[hardness[samples].argsort()[:6]])  # the two hardest of eight are left out
        features = method.space(context, source).take(kept).double().numpy()
        scores = hardness[kept] - hardness[kept].min()
        wanted, values = slow_d2(features, scores, 3, k=2, gammas=(1.0, 0.1), ties=np.zeros(6))
        own = slice(3 * number, 3 * number + 3)
        assert found.indices[own].tolist() == kept[wanted].tolist()
        np.testing.assert_allclose(found.scores[own], values, rtol=1e-4, atol=1e-5)
    assert "message passing" in found.meta["score"] and "aum" in found.meta["score"]


def test_over_all_samples_classes_have_no_say(source: Source, make_context: MakeContext) -> None:
    options = {"network": NETWORK, "count": 5, "per_class": False}
    found = MessagePassing(MessagePassing.Config.model_validate(options)).run(make_context(), source, None)
    assert len(np.unique(found.indices)) == 5


@pytest.mark.parametrize("networks", [1, 3])
def test_features_and_scores_share_the_first_network(
    source: Source, make_context: MakeContext, trained: list[Job], networks: int
) -> None:
    chosen = config(networks=networks)
    MessagePassing(chosen).run(make_context(), source, None)
    assert len(trained) == networks
    estimate = MessagePassing(chosen).estimate(train=24, classes=3, before=None)
    assert len(estimate.trainings) == networks


def test_pixels_train_the_scoring_network_alone(
    source: Source, make_context: MakeContext, trained: list[Job]
) -> None:
    """The network is no option of the pixels, and is used all the same."""
    chosen = config(features="pixels", by="entropy")
    MessagePassing(chosen).run(make_context(), source, None)
    assert len(trained) == 1
    estimate = MessagePassing(chosen).estimate(train=24, classes=3, before=None)
    assert (len(estimate.trainings), estimate.features) == (1, 24)


def test_features_of_the_target_are_another_training() -> None:
    estimate = MessagePassing(config(trained_on="target")).estimate(train=24, classes=3, before=None)
    assert len(estimate.trainings) == 2


def test_other_options_that_pixels_ignore_are_still_refused() -> None:
    with pytest.raises(ValidationError, match="layer would be ignored"):
        config(features="pixels", layer="classifier")


def test_a_cut_that_leaves_too_few_is_refused_before_any_work(source: Source) -> None:
    with pytest.raises(InputError, match="leaves 4 of the 8 samples of class zero, and 5"):
        MessagePassing(config(ipc=5, mislabelled=0.5)).check(source, None)
    MessagePassing(config(ipc=4, mislabelled=0.5)).check(source, None)


@pytest.mark.gpu
def test_gpu_picks_what_the_cpu_picks() -> None:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(400, 32))).float()
    scores, ties = rng.exponential(size=400), rng.permutation(400)
    found = []
    for each in (features, features.cuda()):
        graph = neighbour_graph(each, 5)
        found.append(reverse(graph, forward(graph, scores, gamma=1.0), 100, gamma=0.1, ties=ties))
    assert found[0][0].tolist() == found[1][0].tolist()
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
