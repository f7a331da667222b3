"""Facility location and graph cut: their definitions in float64, brute force, and what selectors make of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataselect import facility, greedy
from dataselect import similarity as similarity_module
from dataselect.costs import CostConfig, read_costs
from dataselect.facility import FacilityLocation, assignment_sizes, facility_location
from dataselect.graph_cut import GraphCut
from dataselect.greedy import Costs, Objective, lazy_greedy, stochastic_greedy
from dataselect.similarity import Similarity, SimilarityKind, similarity_of
from dataselect.space import FeatureSpace
from dataselect.submodular import EPSILON, FacilityLocationSelector, GraphCutSelector, SubmodularSelector
from distill.contracts import Context, Selection, Source, Split
from distill.errors import DamagedDataError, InputError, NonFiniteError
from distill.portable import without_paths
from distill.recipe import make_recipe

KINDS = get_args(SimilarityKind)
OBJECTIVES: dict[str, Callable[[Similarity], Objective]] = {
    "facility": FacilityLocation,
    "cut": lambda similarity: GraphCut(similarity, relevance=2.0),
    "cut, not monotone": lambda similarity: GraphCut(similarity, relevance=0.5),
}
each_objective = pytest.mark.parametrize("name", OBJECTIVES)


def clustered(n: int, width: int = 16, *, seed: int = 0, clusters: int = 12) -> Tensor:
    """float32 (n, width), centred: clusters of unequal size and spread."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    own = torch.randint(0, clusters, (n,), generator=generator) * torch.rand(n, generator=generator)
    features = centres[own.long()] + 0.5 * torch.randn(n, width, generator=generator)
    return features - features.mean(dim=0)


def matrix(found: Similarity) -> np.ndarray:
    """All similarities in float64: (N, R)."""
    n, r = found.size
    return found.block(slice(0, n), slice(0, r)).double().numpy()


def facility_value(s: np.ndarray, rows: list[int] | tuple[int, ...]) -> float:
    """sum_i max(0, max_{j in S} s_ij); the empty set is worth 0."""
    return float(np.maximum(s[list(rows)].max(axis=0), 0).sum()) if len(rows) else 0.0


def cut_value(s: np.ndarray, rows: list[int] | tuple[int, ...], relevance: float = 2.0) -> float:
    """lambda sum_{i in V, j in S} s_ij - sum_{i, j in S} s_ij."""
    chosen = list(rows)
    return float(relevance * s[chosen].sum() - s[np.ix_(chosen, chosen)].sum())


VALUES: dict[str, Callable[..., float]] = {
    "facility": facility_value,
    "cut": cut_value,
    "cut, not monotone": lambda s, rows: cut_value(s, rows, 0.5),
}


def assert_greedy(value: Callable[..., float], s: np.ndarray, rows: list[int], gains: Tensor) -> None:
    """Each pick's gain is the greatest there was, by whole values of the function; equal but for rounding is equal."""
    assert sorted(set(rows)) == sorted(rows)
    for turn in range(len(rows)):
        worth = value(s, rows[:turn]) if turn else 0.0
        left = [other for other in range(len(s)) if other not in rows[:turn]]
        best = max(value(s, [*rows[:turn], other]) for other in left) - worth
        own = value(s, rows[: turn + 1]) - worth
        assert own == pytest.approx(best, rel=1e-5, abs=1e-5)
        assert float(gains[turn]) == pytest.approx(own, rel=1e-5, abs=1e-5)


@each_objective
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 7, 12])
@pytest.mark.parametrize("seed", range(4))
def test_equals_brute_force_greedy(name: str, kind: SimilarityKind, n: int, seed: int) -> None:
    features = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    found = similarity_of(features, kind)
    picked = lazy_greedy(OBJECTIVES[name](found), n)
    assert_greedy(VALUES[name], matrix(found), picked.rows.tolist(), picked.gains)


@pytest.mark.parametrize("name", ["facility", "cut"])
@pytest.mark.parametrize("seed", range(6))
def test_the_value_is_at_least_its_share_of_the_optimum(name: str, seed: int) -> None:
    features = torch.randn(10, 3, generator=torch.Generator().manual_seed(seed))
    found = similarity_of(features, "rbf")
    s, value = matrix(found), VALUES[name]
    for count in (1, 2, 4):
        best = max(value(s, rows) for rows in combinations(range(10), count))
        rows = lazy_greedy(OBJECTIVES[name](found), count).rows.tolist()
        assert (1 - 1 / math.e) * best <= value(s, rows) <= best * (1 + 1e-6)


def test_a_small_ranking_is_golden() -> None:
    """Unit vectors at 0, 10, 30, 90, 105 and 150 degrees, s = max(0, cos of the angle between)."""
    angles = np.radians([0, 10, 30, 90, 105, 150])
    features = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], axis=1)).float()
    picked = facility_location(similarity_of(features.clone(), "cosine"), 3)
    assert picked.rows.tolist() == [2, 4, 5]
    np.testing.assert_allclose(picked.gains.numpy(), [3.56454, 1.91421, 0.29289], atol=1e-5)
    cut = lazy_greedy(GraphCut(similarity_of(features.clone(), "cosine"), relevance=2.0), 3)
    assert cut.rows.tolist() == [2, 4, 1]
    np.testing.assert_allclose(cut.gains.numpy(), [6.12907, 4.34607, 3.31691], atol=1e-5)


@each_objective
@pytest.mark.parametrize("seed", range(5))
def test_lazy_is_exact_greedy_on_clusters(name: str, seed: int) -> None:
    """Against greedy in float64 over the whole matrix; value within 1e-5."""
    n, count = 300, 40
    found = similarity_of(clustered(n, seed=seed), "cosine")
    s = matrix(found)
    rows = slow_greedy(name, s, count)
    picked = lazy_greedy(OBJECTIVES[name](found), count)
    value = VALUES[name]
    assert value(s, picked.rows.tolist()) == pytest.approx(value(s, rows), rel=1e-5)
    assert picked.rows.tolist() == rows
    assert float(picked.gains.sum()) == pytest.approx(value(s, rows), rel=1e-5)


def slow_greedy(name: str, s: np.ndarray, count: int) -> list[int]:
    """Every gain, every time, by the formulas of gains in float64."""
    rows: list[int] = []
    relevance = {"cut": 2.0, "cut, not monotone": 0.5}.get(name, 0.0)
    for _ in range(count):
        if name == "facility":
            served = s[rows].max(axis=0) if rows else np.zeros(s.shape[1])
            found = np.maximum(s - served, 0).sum(axis=1)
        else:
            found = relevance * s.sum(axis=1) - 2 * s[rows].sum(axis=0) - s.diagonal()
        found[rows] = -np.inf
        rows.append(int(found.argmax()))
    return rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("references", [None, 90])
def test_what_is_kept_and_how_it_is_cut_does_not_matter(
    kind: SimilarityKind, references: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the matrix whole, in part or not at all; few rows at once or many."""
    n = 400
    columns = None if references is None else torch.randperm(n)[:references].sort().values
    found = similarity_of(clustered(n), kind, references=columns)
    wanted = facility_location(found, 60, matrix_bytes=1 << 30)
    for matrix_bytes in (0, 4 * found.size[1] - 1, 4 * found.size[1] * 37, 4 * found.size[1] * n):
        again = facility_location(found, 60, matrix_bytes=matrix_bytes)
        assert again.rows.tolist() == wanted.rows.tolist()
        assert torch.equal(again.gains, wanted.gains)
    for rows, tile, span in ((1, 16, 64), (7, 50, 100), (400, 1000, 1 << 20)):
        monkeypatch.setattr(facility, "_ROWS", rows)
        monkeypatch.setattr(facility, "_COMPUTED", 3 * rows)
        monkeypatch.setattr(similarity_module, "_TILE", tile)
        monkeypatch.setattr(similarity_module, "_SPAN", span)
        for matrix_bytes in (0, 1 << 30):
            again = facility_location(found, 60, matrix_bytes=matrix_bytes)
            assert again.rows.tolist() == wanted.rows.tolist()
            torch.testing.assert_close(again.gains, wanted.gains, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["facility", "cut"])
def test_no_more_similarities_are_computed_at_once_than_blocks_hold(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing grows with N x R: the memory of a million candidates is that of their features."""
    monkeypatch.setattr(similarity_module, "_TILE", 64)
    monkeypatch.setattr(similarity_module, "_SPAN", 256)
    monkeypatch.setattr(facility, "_COMPUTED", 32)
    sizes = []
    products = similarity_module._products

    def counted(left: Tensor, right: Tensor, out: Tensor | None) -> Tensor:
        sizes.append(len(left) * len(right))
        return products(left, right, out)

    monkeypatch.setattr(similarity_module, "_products", counted)
    found = similarity_of(clustered(3000), "cosine")
    objective: Objective = (
        FacilityLocation(found, matrix_bytes=0) if name == "facility" else OBJECTIVES[name](found)
    )
    lazy_greedy(objective, 50)
    objective.clear()
    stochastic_greedy(objective, 50, size=3000, epsilon=0.5, generator=torch.Generator())
    limit = 32 * 256 if name == "facility" else greedy._LARGEST_BATCH * 50
    assert max(sizes) <= max(limit, 64 * 64)


@pytest.mark.parametrize("picks", [1, 7, 1024])
def test_graph_cut_does_not_depend_on_when_it_looks(picks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains asked for late, early or in parts are the same."""
    from dataselect import graph_cut

    monkeypatch.setattr(graph_cut, "_PICKS", picks)
    found = similarity_of(clustered(80), "rbf")
    objective = GraphCut(found, relevance=1.5)
    s, rows = matrix(found), [3, 70, 12, 13, 40]
    for turn, row in enumerate(rows):
        objective.gains(torch.arange(0, 80, turn + 2))
        objective.add(row)
    wanted = 1.5 * s.sum(axis=1) - 2 * s[rows].sum(axis=0) - s.diagonal()
    np.testing.assert_allclose(objective.gains(torch.arange(80)).numpy(), wanted, rtol=1e-5, atol=1e-5)
    objective.clear()
    np.testing.assert_allclose(
        objective.gains(torch.arange(80)).numpy(), 1.5 * s.sum(axis=1) - s.diagonal(), rtol=1e-5
    )


@pytest.mark.parametrize("seed", range(4))
def test_stochastic_has_995_of_1000_of_the_value(seed: int) -> None:
    """With more picks than clusters; the price of a bad centre, drawn early, is greater with fewer."""
    found = similarity_of(clustered(1500, 32, seed=seed, clusters=20), "cosine")
    exact = facility_location(found, 150)
    drawn = stochastic_greedy(
        FacilityLocation(found),
        150,
        size=1500,
        epsilon=EPSILON,
        generator=torch.Generator().manual_seed(seed),
    )
    assert 0.995 <= float(drawn.gains.sum()) / float(exact.gains.sum()) <= 1 + 1e-6


def test_facility_location_gains_fall_and_are_never_negative() -> None:
    gains = facility_location(similarity_of(clustered(200), "cosine"), 200).gains
    assert (gains[1:] <= gains[:-1]).all() and (gains >= 0).all()
    assert float(gains.sum()) == pytest.approx(200, rel=1e-5), "everything serves itself"


def test_references_estimate_the_function_of_all() -> None:
    features = clustered(2000, 32, clusters=60)
    whole = similarity_of(features.clone(), "cosine")
    some = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:500].sort().values
    part = similarity_of(features.clone(), "cosine", references=some)
    s = matrix(whole)
    exact, estimated = (
        facility_value(s, facility_location(each, 50).rows.tolist()) for each in (whole, part)
    )
    assert 0.98 * exact < estimated <= exact
    everything = similarity_of(features.clone(), "cosine", references=torch.arange(2000))
    assert facility_location(everything, 50).rows.tolist() == facility_location(whole, 50).rows.tolist()


def test_graph_cut_scales_a_sample_of_references_to_all() -> None:
    features = clustered(400)
    some = torch.arange(0, 400, 2)
    found = similarity_of(features.clone(), "rbf", references=some)
    s = matrix(similarity_of(features.clone(), "rbf"))
    bounds = GraphCut(found, relevance=2.0).bounds().numpy()
    np.testing.assert_allclose(
        bounds, 2 * 2 * matrix(found).sum(axis=1) - s.diagonal(), rtol=1e-2
    )  # the bandwidth is drawn from all rows alike


@each_objective
def test_constant_features_give_the_lowest_rows(name: str) -> None:
    for kind in KINDS:
        picked = lazy_greedy(OBJECTIVES[name](similarity_of(torch.zeros(30, 4), kind)), 30)
        assert picked.rows.tolist() == list(range(30))


def test_duplicates_are_picked_once_while_anything_is_left() -> None:
    features = clustered(20, seed=4)
    twice = torch.cat([features, features])
    picked = facility_location(similarity_of(twice, "rbf", bandwidth=1.0), 40).rows.tolist()
    assert sorted(picked[:20]) == list(range(20)), "the lower row of each pair"
    assert sorted(picked[20:]) == list(range(20, 40))


def test_rank_deficient_features_serve() -> None:
    features = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) @ torch.ones(1, 8)
    found = similarity_of(features, "cosine")
    picked = facility_location(found, 3)
    assert float(picked.gains[:2].sum()) == pytest.approx(50, rel=1e-5), "two directions serve all"
    assert picked.rows[0] in (0, 1, 2) or float(picked.gains[2]) == pytest.approx(0, abs=1e-4)


def test_a_beginning_counts_and_gives_its_gains() -> None:
    found = similarity_of(clustered(100), "cosine")
    picked = facility_location(found, 10, initial=torch.tensor([50, 3]))
    assert picked.rows[:2].tolist() == [50, 3]
    s = matrix(found)
    values = [facility_value(s, picked.rows[:size].tolist()) for size in range(11)]
    np.testing.assert_allclose(picked.gains.numpy(), np.diff(values), rtol=1e-4)


def test_costs_are_kept() -> None:
    found = similarity_of(clustered(100), "cosine")
    costs = np.random.default_rng(0).uniform(0.5, 2, 100)
    picked = facility_location(found, 100, costs=Costs(torch.from_numpy(costs), 12.0))
    assert costs[picked.rows.numpy()].sum() <= 12 < costs[picked.rows.numpy()].sum() + 2


@pytest.mark.parametrize("seed", range(5))
def test_gains_are_known_to_fall_by_no_more_than_they_do(seed: int) -> None:
    """Bounds stay above all gains, and once they have followed a pick by no more than what it gained."""
    found = similarity_of(clustered(300, seed=seed), "cosine")
    objective = FacilityLocation(found)
    bounds, everything = objective.bounds(), torch.arange(300)
    picked = facility_location(found, 60)
    followed = 0
    for row, gain in zip(picked.rows.tolist(), picked.gains.tolist(), strict=True):
        fallen = objective.add(row)
        gains = objective.gains(everything)
        if fallen is not None:
            followed += 1
            bounds -= fallen
            assert (bounds - gains).max() < gain * 1.001 + 0.001
        assert (bounds >= gains).all()
    assert 20 < followed < 60


def test_assignment_sizes_count_whom_each_pick_serves() -> None:
    found = similarity_of(clustered(300), "distance")
    rows = facility_location(found, 40).rows
    sizes = assignment_sizes(found, rows)
    wanted = np.bincount(matrix(found)[rows].argmax(axis=0), minlength=40)
    assert sizes.tolist() == wanted.tolist() and int(sizes.sum()) == 300


def test_of_equal_servers_the_earliest_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facility, "_ROWS", 2)
    monkeypatch.setattr(similarity_module, "_SPAN", 4)
    found = similarity_of(torch.zeros(9, 2), "rbf")
    assert assignment_sizes(found, torch.tensor([4, 8, 0, 1, 2])).tolist() == [9, 0, 0, 0, 0]


# --- the selectors

METHODS: list[type[SubmodularSelector]] = [FacilityLocationSelector, GraphCutSelector]
each_method = pytest.mark.parametrize("method", METHODS)
PIXELS = {"features": "pixels"}


def build(method: type[SubmodularSelector], **options: Any) -> Any:
    return method(method.Config.model_validate_json(json.dumps({**PIXELS, **options})))


def selected(
    method: type[SubmodularSelector],
    ctx: Context,
    source: Source,
    previous: Selection | None = None,
    **options: Any,
) -> Selection:
    selector = build(method, **options)
    selector.check(source, None if previous is None else "selector")
    return selector.run(ctx, source, previous)


def before(indices: list[int]) -> Selection:
    ones = np.ones(len(indices), np.float32)
    return Selection(np.array(indices), ones, 0 * ones)


@pytest.mark.parametrize("per_class", [True, False])
def test_picks_by_class_or_among_all(
    source: Source, make_context: Callable[..., Context], per_class: bool
) -> None:
    ctx = make_context()
    chosen = selected(FacilityLocationSelector, ctx, source, count=6, per_class=per_class)
    space = build(FacilityLocationSelector, count=6).space(ctx, source)
    groups = (
        [np.flatnonzero(source.train.labels.numpy() == number) for number in range(3)]
        if per_class
        else [np.arange(24)]
    )
    wanted = []
    for samples in groups:
        picked = facility_location(similarity_of(space.take(samples), "cosine"), 6 // len(groups))
        wanted += samples[picked.rows.numpy()].tolist()
    assert chosen.indices.tolist() == wanted
    assert (chosen.scores > 0).all()


@each_method
@pytest.mark.parametrize("per_class", [True, False])
def test_extend_keeps_the_selection_before(
    method: type[SubmodularSelector], source: Source, make_context: Callable[..., Context], per_class: bool
) -> None:
    labels = source.train.labels.numpy()
    first = [int(np.flatnonzero(labels == number)[5]) for number in range(3)]
    chosen = selected(
        method, make_context(), source, before(first), count=9, per_class=per_class, extend=True
    )
    assert len(chosen.indices) == 9 and set(first) < set(chosen.indices.tolist())
    if per_class:
        assert [chosen.indices[place] for place in (0, 3, 6)] == first, "first of their class"
    else:
        assert chosen.indices[:3].tolist() == first
    narrowed = selected(method, make_context(), source, before(first), count=3, per_class=per_class)
    assert sorted(narrowed.indices.tolist()) == sorted(first)


def test_extend_needs_a_step_before_and_room(source: Source, make_context: Callable[..., Context]) -> None:
    selector = build(FacilityLocationSelector, ipc=2, extend=True)
    with pytest.raises(InputError, match="there is none"):
        selector.check(source, None)
    labels = source.train.labels.numpy()
    crowded = before(np.flatnonzero(labels == 1)[:3].tolist())
    with pytest.raises(InputError, match="kept 3 images of class one, more than the budget"):
        selector.run(make_context(), source, crowded)
    whole = build(FacilityLocationSelector, count=2, per_class=False, extend=True)
    with pytest.raises(InputError, match="kept 3 images, more than the budget"):
        whole.run(make_context(), source, crowded)
    assert selector.estimate(train=24, classes=3, before=3).images == 6


@pytest.mark.parametrize(("kept", "told"), [(6, "60 images of the step before"), (5, None)])
def test_a_full_budget_is_refused_before_any_work(kept: int, told: str | None, tmp_path: Path) -> None:
    from distill import pipeline

    steps = [{"random": {"ipc": kept}}, {"facility_location": {"count": 60, "extend": True, **PIXELS}}]
    recipe = {"data": {"name": "digits", "cap": 60}, "steps": steps, "evaluate": {"on": "nothing"}}
    if told is None:
        pipeline.dry_run(recipe, out=tmp_path / "out", device="cpu")
        return
    with pytest.raises(InputError, match="no room in the budget") as caught:
        pipeline.dry_run(recipe, out=tmp_path / "out", device="cpu")
    assert str(caught.value.found).startswith(told)


def test_a_step_that_finds_its_size_may_leave_room(tmp_path: Path) -> None:
    """Its greatest size is above the budget; how many it keeps is not known before."""
    from distill import pipeline

    steps = [
        {"semdedup": {"epsilon": 0.5, **PIXELS}},
        {"facility_location": {"count": 60, "extend": True, "per_class": False, **PIXELS}},
    ]
    recipe = {"data": {"name": "digits", "cap": 60}, "steps": steps, "evaluate": {"on": "nothing"}}
    assert "would run 2 steps" in pipeline.dry_run(recipe, out=tmp_path / "out", device="cpu")


def test_extend_cannot_keep_what_has_no_features(
    source: Source, make_context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FeatureSpace, "finite", lambda self, samples: samples[samples != 7])
    with pytest.raises(InputError, match="1 images of the step before have NaN or infinite features"):
        selected(FacilityLocationSelector, make_context(), source, before([7, 3]), ipc=2, extend=True)
    chosen = selected(FacilityLocationSelector, make_context(), source, before([3]), ipc=2, extend=True)
    assert 3 in chosen.indices and 7 not in chosen.indices


def test_extend_in_a_recipe_goes_beyond_the_step_before(tmp_path: Path) -> None:
    from distill import pipeline

    steps = [
        {"kcenter": {"ipc": 1, **PIXELS}},
        {"facility_location": {"ipc": 3, "extend": True, **PIXELS}},
    ]
    recipe = {"data": {"name": "digits", "cap": 60}, "steps": steps, "evaluate": {"on": "nothing"}}
    text = pipeline.dry_run(recipe, out=tmp_path / "out", device="cpu")
    assert "30" in text


# --- costs


def costs_file(folder: Path, costs: np.ndarray) -> str:
    path = folder / "costs.npy"
    np.save(path, costs)
    return str(path)


def split(samples: int, rows: Tensor | None = None) -> Split:
    return Split(torch.zeros(samples, 1, 8, 8, dtype=torch.uint8), torch.zeros(samples).long(), "", rows)


def test_a_cost_is_that_of_the_samples_number_in_the_data(tmp_path: Path) -> None:
    """Whatever was cut off for validation, capped or left out."""
    file = costs_file(tmp_path, np.arange(1, 31))
    config = CostConfig(file=file, limit=100.0)
    assert read_costs(config, split(4)).tolist() == [1, 2, 3, 4]
    assert read_costs(config, split(3, torch.tensor([7, 2, 29]))).tolist() == [8, 3, 30]
    with pytest.raises(InputError) as caught:
        read_costs(config, split(3, torch.tensor([7, 2, 30])))
    assert caught.value.allowed == "one number for each sample of the data as they were found, at least 31"


@each_method
def test_costs_limit_the_selection(
    method: type[SubmodularSelector], source: Source, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    each = np.random.default_rng(0).uniform(1, 3, 24)
    costs = {"file": costs_file(tmp_path, each), "limit": 9.0}
    chosen = selected(method, make_context(), source, costs=costs, per_class=False)
    assert each[chosen.indices].sum() <= 9 < each[chosen.indices].sum() + 3
    assert chosen.meta["cost"] == pytest.approx(each[chosen.indices].sum())
    few = selected(method, make_context(), source, costs=costs, per_class=False, count=2)
    assert len(few.indices) == 2
    begun = selected(
        method, make_context(), source, before([7, 3]), costs=costs, per_class=False, extend=True
    )
    assert begun.indices[:2].tolist() == [7, 3] and each[begun.indices].sum() <= 9


def test_costs_that_cannot_be_kept_are_refused(
    source: Source, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    file = costs_file(tmp_path, np.arange(1.0, 25.0))
    ctx = make_context()
    options: dict[str, Any] = {"costs": {"file": file, "limit": 4.0}, "per_class": False}
    with pytest.raises(InputError, match="the cheapest image costs more than the limit"):
        selected(FacilityLocationSelector, ctx, source, before([20, 21]), **options)
    with pytest.raises(InputError, match="the images of the step before cost more than the limit"):
        selected(FacilityLocationSelector, ctx, source, before([1, 2]), extend=True, **options)
    with pytest.raises(InputError, match="as cheap as the limit") as caught:
        selected(FacilityLocationSelector, ctx, source, costs={"file": file, "limit": 0.5}, per_class=False)
    assert caught.value.allowed == "at least 1, the least cost"


@pytest.mark.parametrize(
    ("costs", "told"),
    [
        (np.ones(23), "float64 of shape (23,)"),
        (np.ones((24, 1)), "float64 of shape (24, 1)"),
        (np.full(24, "a"), "<U1 of shape (24,)"),
        (np.array([1.0] * 23 + [0.0]), "0 for sample 23"),
        (np.array([np.nan] + [1.0] * 23), "nan for sample 0"),
    ],
)
def test_a_file_that_holds_no_costs_is_refused(costs: np.ndarray, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_costs(CostConfig(file=costs_file(tmp_path, costs), limit=3.0), split(24))
    assert told in str(caught.value.found) and caught.value.where == "costs.file"


def test_a_damaged_or_absent_file_of_costs_is_told(tmp_path: Path) -> None:
    path = tmp_path / "costs.npy"
    with pytest.raises(InputError, match="no such file"):
        read_costs(CostConfig(file=str(path), limit=3.0), split(24))
    with pytest.raises(InputError, match="not named"):
        read_costs(CostConfig(sha256="0" * 64, limit=3.0), split(24))
    for content in (b"", b"no numbers", b"\x93NUMPY\x01\x00"):
        path.write_bytes(content)
        with pytest.raises(DamagedDataError, match=r"no \.npy file"):
            read_costs(CostConfig(file=str(path), limit=3.0), split(24))
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DamagedDataError):
        read_costs(CostConfig(file=str(path), limit=3.0), split(1))
    np.save(path, np.ones(24))
    with pytest.raises(DamagedDataError, match="another"):
        read_costs(CostConfig(file=str(path), sha256="0" * 64, limit=3.0), split(24))


def test_a_set_carries_the_content_of_costs_and_not_their_place(tmp_path: Path) -> None:
    costs = {"file": costs_file(tmp_path, np.ones(24)), "limit": 5.0}
    step = {"facility_location": {"costs": costs, "per_class": False, **PIXELS}}
    plain = without_paths(make_recipe({"data": {"name": "digits"}, "steps": [step]}))
    found = plain["steps"][0]["facility_location"]["costs"]
    assert set(found) == {"limit", "sha256"} and str(tmp_path) not in json.dumps(plain)


# --- options


@each_method
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ipc": 2, "bandwidth": 2.0}, "bandwidth would be ignored"),
        ({"ipc": 2, "optimizer": "lazy", "epsilon": 0.2}, "epsilon would be ignored"),
        ({"costs": {"file": "c.npy", "limit": 1.0}}, "per_class: false"),
        (
            {"costs": {"file": "c.npy", "limit": 1.0}, "per_class": False, "optimizer": "stochastic"},
            "with costs greedy is lazy",
        ),
        ({"costs": {"file": "c.npy", "limit": 1.0}, "per_class": False, "epsilon": 0.2}, "epsilon would be"),
        ({"costs": {"limit": 1.0}, "per_class": False}, "name the file of costs"),
        ({}, "give exactly one of ipc, fraction and count"),
        ({"ipc": 2, "references": "some"}, "references"),
        ({"ipc": 2, "references": 0}, "references"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    method: type[SubmodularSelector], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=told):
        build(method, **options)


@each_method
def test_every_option_has_its_say(
    method: type[SubmodularSelector], make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    source, ctx = make_source((60, 60, 60)), make_context()
    plain = selected(method, ctx, source, ipc=6)
    for options in (
        {"similarity": "rbf"},
        {"similarity": "distance"},
        {"similarity": "rbf", "bandwidth": 0.5},
        {"references": 7},
        {"optimizer": "stochastic", "epsilon": 0.8},
    ):
        other = selected(method, ctx, source, ipc=6, **options)
        assert other.indices.tolist() != plain.indices.tolist(), options
    assert selected(method, ctx, source, ipc=6, references=60).indices.tolist() == plain.indices.tolist()
    assert selected(method, ctx, source, ipc=6, optimizer="lazy").indices.tolist() == plain.indices.tolist()


def test_relevance_decides_between_the_dense_and_the_different(
    make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    source, ctx = make_source((60,)), make_context()
    near, far = (selected(GraphCutSelector, ctx, source, ipc=8, relevance=each) for each in (100.0, 0.01))
    s = matrix(similarity_of(build(GraphCutSelector, ipc=1).space(ctx, source).take(np.arange(60)), "cosine"))
    inside = [s[np.ix_(each.indices, each.indices)].sum() for each in (near, far)]
    assert inside[0] > 1.5 * inside[1]


def test_many_pairs_are_left_to_stochastic_greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataselect import submodular

    selector = build(FacilityLocationSelector, ipc=2)
    monkeypatch.setattr(submodular, "_PAIRS_FOR_LAZY", 40 * 40)
    features = clustered(41)
    exact = build(FacilityLocationSelector, ipc=2, optimizer="lazy").pick(features.clone(), 20, seed=1)
    drawn = build(FacilityLocationSelector, ipc=2, optimizer="stochastic").pick(features.clone(), 20, seed=1)
    found = selector.pick(features.clone(), 20, seed=1)
    assert found.rows.tolist() == drawn.rows.tolist() != exact.rows.tolist()
    few = build(FacilityLocationSelector, ipc=2, references=39).pick(features.clone(), 20, seed=1)
    lazy = build(FacilityLocationSelector, ipc=2, references=39, optimizer="lazy")
    assert few.rows.tolist() == lazy.pick(features.clone(), 20, seed=1).rows.tolist()


@each_method
def test_features_that_are_no_numbers_are_refused(method: type[SubmodularSelector]) -> None:
    features = clustered(20)
    features[4, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="no similarities"):
        build(method, ipc=2).pick(features, 2, seed=0)


@pytest.mark.gpu
@each_objective
@pytest.mark.parametrize("kind", KINDS)
def test_gpu_picks_what_the_cpu_picks(name: str, kind: SimilarityKind) -> None:
    features = clustered(500, 32)

    def picked(device: str) -> tuple[list[int], Tensor]:
        objective: Objective = OBJECTIVES[name](similarity_of(features.clone().to(device), kind))
        found = lazy_greedy(objective, 40)
        return found.rows.tolist(), found.gains.cpu()

    on_cpu, on_gpu = picked("cpu"), picked("cuda")
    assert on_gpu[0] == on_cpu[0]
    torch.testing.assert_close(on_gpu[1], on_cpu[1], rtol=1e-4, atol=1e-4)
