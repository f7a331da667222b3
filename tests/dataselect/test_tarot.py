"""TAROT: layers against a slow sort, potentials that fill the last, sizes that are found, weights, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dataselect.distances import Distances
from dataselect.ratio_estimate import Ratio, _Bounds, _Fold, estimate_ratio
from dataselect.target_neighbours import layers, nearest, times_near
from dataselect.tarot import Tarot, _finished, _width, take_layers
from dataselect.transport import Solver
from dataselect.whitening import whiten
from distill.contracts import Context, Selection, Source, Split
from distill.errors import InputError
from distill.randomness import generator
from tests.dataselect.largest import Largest

MEMORY = 1 << 30
MODES = ((0, 0.55), (1, 0.35), (2, 0.1))  # of the target, and their shares; the last is rare


def refuse(text: str) -> None:
    raise AssertionError(text)


SOLVER = Solver(10_000_000, refuse)


def unit(seed: int, count: int, width: int = 6) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def planted(seed: int, *, alike: int = 240, others: int = 560, targets: int = 150) -> tuple[Tensor, Tensor]:
    """Whitened features: of 3 modes of the target, one rare, in as many shares among the first `alike` candidates, and
    of 9 modes besides."""
    rng = np.random.default_rng(seed)
    centres = 6 * rng.normal(size=(12, 12))
    names, shares = zip(*MODES, strict=True)

    def drawn(modes: np.ndarray) -> Tensor:
        return torch.from_numpy(centres[modes] + rng.normal(size=(len(modes), 12))).float()

    own = np.sort(rng.choice(names, size=targets, p=shares))
    near = rng.choice(names, size=alike, p=shares)
    candidates, target = drawn(np.concatenate([near, rng.integers(3, 12, size=others)])), drawn(own)
    whiten(candidates, target, eps=1e-4)
    return candidates, target


def transported(candidates: Tensor, target: Tensor, rows: Tensor) -> float:
    return SOLVER.solve(Distances(candidates[rows], target, memory=MEMORY)).cost


def slow_order(candidates: Tensor, target: Tensor) -> np.ndarray:
    """Candidates of each target, nearest first, ties to the lowest row: (M, N)."""
    squares = ((target.double()[:, None] - candidates.double()) ** 2).sum(dim=2).numpy()
    return np.argsort(np.round(squares, 7), axis=1, kind="stable")


# --- neighbours


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(1, 1), (40, 13), (7, 30)])
@pytest.mark.parametrize("tile", [4096, 5])
def test_neighbours_equal_a_slow_sort_whatever_the_tiles(
    seed: int, shape: tuple[int, int], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dataselect.target_neighbours._TILE", tile)
    monkeypatch.setattr("dataselect.target_neighbours._TARGETS", 4)
    candidates, target = unit(seed, shape[0]), unit(seed + 50, shape[1])
    candidates[shape[0] // 2] = candidates[0]  # a duplicate
    wanted = slow_order(candidates, target)
    for depth in {1, min(3, shape[0]), shape[0]}:
        found = torch.cat([rows for _, rows, _ in nearest(candidates, target, depth)])
        assert found.tolist() == wanted[:, :depth].tolist()
        ranks = np.full(shape[0], depth)
        for rank in reversed(range(depth)):
            ranks[wanted[:, rank]] = rank
        assert layers(candidates, target, depth).tolist() == ranks.tolist()
        times = np.bincount(wanted[:, :depth].ravel(), minlength=shape[0])
        assert times_near(candidates, target, depth).tolist() == times.tolist()


@pytest.mark.parametrize("among", [None, torch.arange(1999, -1, -1)])
def test_neighbours_are_found_in_bounded_memory(
    among: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wide rows and as many neighbours as there are candidates: neither is ever held for all of them."""
    entries = 1 << 15
    monkeypatch.setattr("dataselect.target_neighbours._ENTRIES", entries)
    candidates, target = unit(0, 2000, 512), unit(1, 60, 512)
    for depth in (1, 100, 2000):
        with Largest() as made:
            for _ in nearest(candidates, target, depth, among=among):
                pass
        assert made.bytes <= 8 * entries < 8 * candidates.numel() // 30


def test_neighbours_among_some_are_places_in_them() -> None:
    candidates, target, among = unit(0, 50), unit(1, 20), torch.tensor([7, 3, 44, 3, 12])
    found, wanted = (
        torch.cat([rows for _, rows, _ in way])
        for way in (nearest(candidates, target, 2, among=among), nearest(candidates[among], target, 2))
    )
    assert torch.equal(found, wanted)
    assert times_near(candidates, target, 1, among=among).tolist() == [
        int((found[:, 0] == place).sum()) for place in range(5)
    ]


def test_a_selection_never_holds_all_candidates_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in float64 nor as a copy: they may lie in a file larger than memory."""
    entries = 1 << 14
    for module in ("target_neighbours", "distances", "whitening"):
        monkeypatch.setattr(f"dataselect.{module}._ENTRIES", entries)
    candidates, target = unit(0, 3000, 256), unit(1, 40, 256)
    plain = Tarot.Config.model_validate({"count": 2500, "features": "pixels", "weights": True})
    with Largest() as made:
        whiten(candidates, target, eps=1e-4)
        taken = take_layers(candidates, target, 2500, solver=SOLVER, memory=MEMORY)
        ratio_of(candidates, target, folds=2)  # any fold proposes thousands
        _finished(candidates, target, taken, plain, SOLVER)
    distances = 4 * 3000 * 40
    assert made.bytes <= max(8 * 256**2, 2 * 8 * entries, distances) < candidates.nbytes / 5


def test_neighbours_beyond_the_radius_are_nobodys() -> None:
    candidates = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    assert layers(candidates, torch.tensor([[1.0, 0]]), 3, within=2.0).tolist() == [0, 3, 3]


# --- a given size


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", [1, 9, 30, 77, 80])
def test_layers_are_whole_and_the_last_is_filled_by_smallest_potential(seed: int, count: int) -> None:
    candidates, target = unit(seed, 80), unit(seed + 9, 12)
    found = take_layers(candidates, target, count, solver=SOLVER, memory=MEMORY)
    order = slow_order(candidates, target)
    whole: list[int] = []
    for rank in range(80):
        layer = sorted(set(order[:, rank].tolist()) - set(whole))
        if len(whole) + len(layer) > count:
            break
        whole += layer
        if len(whole) == count:
            break
    assert found[: len(whole)].tolist() == whole
    if len(whole) < count:
        pool = torch.tensor(whole + layer)
        potentials = SOLVER.solve(Distances(candidates[pool], target, memory=MEMORY)).f[len(whole) :]
        wanted = np.argsort(potentials.numpy(), kind="stable")[: count - len(whole)]
        assert found[len(whole) :].tolist() == [layer[place] for place in wanted]
    assert len(set(found.tolist())) == count


def test_the_smallest_potentials_are_nearer_than_the_largest() -> None:
    """The release takes the largest."""
    gains = []
    for seed in range(5):
        candidates, target = planted(seed)
        own = layers(candidates, target, 1)
        layer = (own == 0).nonzero()[:, 0]
        count = len(layer) // 2
        found = take_layers(candidates, target, count, solver=SOLVER, memory=MEMORY)
        potentials = SOLVER.solve(Distances(candidates[layer], target, memory=MEMORY)).f
        wrong = layer[potentials.argsort(descending=True)[:count]]
        gains.append(transported(candidates, target, wrong) - transported(candidates, target, found))
    assert min(gains) > 0.02


def test_duplicate_candidates_come_by_row_number() -> None:
    candidates, target = unit(0, 1).repeat(6, 1), unit(1, 3)
    found = take_layers(candidates, target, 4, solver=SOLVER, memory=MEMORY)
    assert found.tolist() == [0, 1, 2, 3]
    zeros = take_layers(torch.zeros(6, 3), torch.zeros(2, 3), 3, solver=SOLVER, memory=MEMORY)
    assert zeros.tolist() == [0, 1, 2]


def test_golden_ranking() -> None:
    candidates, target = planted(0, alike=12, others=20, targets=8)
    found = take_layers(candidates, target, 10, solver=SOLVER, memory=MEMORY)
    assert found.tolist() == GOLDEN


GOLDEN = [3, 4, 9, 10, 11, 0, 5, 7, 19, 2]


@pytest.mark.parametrize("seed", range(4))
def test_a_target_of_three_modes_is_met_nearer_than_by_similarity_or_chance(seed: int) -> None:
    candidates, target = planted(seed)
    count = 60
    rows = take_layers(candidates, target, count, solver=SOLVER, memory=MEMORY)
    similar = (candidates @ target.mean(dim=0)).argsort(descending=True)[:count]
    drawn = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))[:count]
    mine, others = (
        transported(candidates, target, rows),
        [transported(candidates, target, each) for each in (similar, drawn)],
    )
    assert mine < 0.9 * min(others)
    rare = target[-round(0.07 * len(target)) :].mean(dim=0)  # targets are in the order of their modes
    assert int((candidates[rows] @ torch.nn.functional.normalize(rare, dim=0) > 0.8).sum()) >= 3


# --- the size


def ratio_of(candidates: Tensor, target: Tensor, **options: object) -> Ratio:
    asked = {"folds": 10, "tolerance": 5e-3, "seed": 0, "solver": SOLVER, "memory": MEMORY}
    return estimate_ratio(candidates, target, advance=lambda: None, **{**asked, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alike", [120, 240, 480])
def test_the_planted_ratio_is_found(seed: int, alike: int) -> None:
    candidates, target = planted(seed, alike=alike, others=800 - alike)
    found = ratio_of(candidates, target)
    share = float((found.layer < found.depth).double().mean())
    assert alike / 800 / 1.5 < share < alike / 800 * 1.5


def slow_curve(candidates: Tensor, target: Tensor, held: np.ndarray) -> dict[int, float]:
    """The transport of every k, each solved by itself."""
    others = np.setdiff1d(np.arange(len(target)), held)
    order = slow_order(candidates, target)[held]
    alike = (candidates @ target.T > 0).T.numpy()[held]
    curve, taken = {}, set[int]()
    for k in range(1, len(candidates) + 1):
        for sample in range(len(held)):
            if alike[sample, order[sample, k - 1]]:
                taken.add(int(order[sample, k - 1]))
        rows = torch.tensor(sorted(taken))
        curve[k] = SOLVER.solve(Distances(candidates[rows], target[others], memory=MEMORY)).cost
    return curve


def test_few_transports_give_what_all_of_them_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sizes that are told apart, the smallest within the tolerance of the best, though few were solved."""
    monkeypatch.setattr("dataselect.ratio_estimate._STEP", 0.0)
    candidates, target = planted(1, alike=50, others=70, targets=40)
    for tolerance in (1e-4, 5e-3, 5e-2):
        found = ratio_of(candidates, target, folds=4, tolerance=tolerance)
        order = torch.randperm(40, generator=generator(0, "folds"))
        for held, curve in zip(order.tensor_split(4), found.curves, strict=True):
            wanted = slow_curve(candidates, target, held.sort().values.numpy())
            for k, _, cost in curve.points:
                assert cost == pytest.approx(wanted[k], abs=1e-6)
            best = min(wanted.values())
            assert wanted[curve.neighbours] <= best * (1 + tolerance) / (1 - tolerance) + 1e-6
            solved_best = min(cost for _, _, cost in curve.points)
            smaller = [k for k in wanted if k < curve.neighbours]
            assert all(wanted[k] > solved_best * (1 + tolerance) - 1e-6 for k in smaller)
            assert len(curve.points) < 25 < len(wanted)


@pytest.mark.parametrize("memory", [MEMORY, 0])
def test_potentials_of_a_fold_extend_to_feasible_ones_of_all(memory: int) -> None:
    """And are the best there are: each bound of a prefix is below its transport, and equal where it was solved."""
    candidates, target = planted(0, alike=60, others=60, targets=40)
    bounds = _Bounds(Distances(candidates, target, memory=memory), [])
    layer = layers(candidates, target[:10], 120)
    fold = _Fold(bounds.distances, torch.arange(10), layer)
    solved = SOLVER.solve(fold.to_others.first(50))
    bounds.extend(fold, solved.g)
    f, g = bounds.of_candidates[0], bounds.of_target[0]
    slack = bounds.distances.whole() - f[:, None] - g
    assert float(slack.min()) > -1e-6
    assert float(slack.amin(dim=1).max()) < 1e-6 and float(slack[:, :10].amin(dim=0).max()) < 1e-6
    sizes = torch.tensor([10, 50, 90])
    lower = bounds.of_prefixes(0, fold.order, sizes, fold.others)
    costs = [SOLVER.solve(fold.to_others.first(int(size))).cost for size in sizes]
    assert all(low <= cost + 1e-6 for low, cost in zip(lower.tolist(), costs, strict=True))
    assert float(lower[1]) == pytest.approx(costs[1], abs=1e-6)


def test_depth_grows_until_the_best_is_well_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates, target = planted(2)
    wanted = ratio_of(candidates, target)
    monkeypatch.setattr("dataselect.ratio_estimate._DEPTH", 2)
    found = ratio_of(candidates, target)
    assert max(curve.neighbours for curve in found.curves) > 2
    shares = [float((each.layer < each.depth).double().mean()) for each in (wanted, found)]
    assert shares[1] == pytest.approx(shares[0], rel=0.1)


def test_memory_does_not_change_the_size() -> None:
    candidates, target = planted(0, alike=60, others=60, targets=40)
    kept, computed = (ratio_of(candidates, target, memory=memory) for memory in (MEMORY, 0))
    assert torch.equal(kept.layer, computed.layer)
    assert kept.curves == computed.curves


def test_a_target_that_nothing_resembles_is_refused() -> None:
    with pytest.raises(InputError, match="none has a positive similarity"):
        ratio_of(torch.tensor([[1.0, 0]]).repeat(5, 1), torch.tensor([[-1.0, 0]]).repeat(4, 1), folds=2)


# --- the method


def targeted(source: Source, *, rows: slice = slice(None, None, 3), **changed: object) -> Source:
    """The source with some of its own images for a target."""
    train = Split(source.train.images[rows], source.train.labels[rows], fingerprint=f"part {rows}")
    return replace(source, target=replace(source, train=train, **changed))


def select(context: Context, source: Source, **options: object) -> Selection:
    method = Tarot(Tarot.Config.model_validate({"features": "pixels", **options}))
    method.check(source, None)
    return method.run(context, source, None)


def test_weights_are_half_alike_and_half_those_of_the_nearest(
    source: Source, make_context: Callable[..., Context]
) -> None:
    plain, weighted = (
        select(make_context(), targeted(source, rows=slice(0, 7)), count=9, weights=weights)
        for weights in (False, True)
    )
    assert plain.indices.tolist() == weighted.indices.tolist()
    assert (plain.weights == 1).all()
    # the target's samples are among the data, and each is picked: it has its own seventh
    wanted = [0.5 + (0.5 * 9 / 7 if index < 7 else 0) for index in weighted.indices]
    np.testing.assert_allclose(weighted.weights, wanted, rtol=1e-5)
    assert weighted.meta["transport_distance"] < plain.meta["transport_distance"]


@pytest.mark.parametrize("seed", range(5))
def test_weights_never_make_the_transport_longer(seed: int) -> None:
    candidates, target = unit(seed, 30), unit(seed + 70, 40)
    masses = (1 / 30 + times_near(candidates, target, 1).double() / 40) / 2
    distances = Distances(candidates, target, memory=MEMORY)
    alike = torch.full((40,), 1 / 40, dtype=torch.float64)
    assert SOLVER.solve_masses(distances, masses, alike).cost <= SOLVER.solve(distances).cost


def test_a_found_size_is_kept_below_a_budget(
    make_source: Callable[..., Source], make_context: Callable[..., Context]
) -> None:
    whole = make_source((30, 30, 30, 30))
    own = (whole.train.labels == 0).nonzero()[::2, 0]
    part = Split(whole.train.images[own], whole.train.labels[own], fingerprint="zeros")
    source = replace(whole, target=replace(whole, train=part))
    free = select(make_context(), source, size="estimate", folds=3)
    there = len(free.indices)
    assert 15 <= there <= 45
    assert free.meta["ratio"] == pytest.approx(there / 120)
    assert len(free.meta["curves"]) == 3
    most = select(make_context(), source, size="estimate", folds=3, count=there)
    assert most.indices.tolist() == free.indices.tolist()
    fewer = select(make_context(), source, size="estimate", folds=3, count=there - 1)
    assert len(fewer.indices) == there - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"count": 5, "folds": 3}, "folds would be ignored"),
        ({"count": 5, "folds": 3, "tolerance": 0.1}, "folds and tolerance would be ignored"),
        ({"count": 5, "ipc": 1}, "ipc"),
        ({"count": 5, "per_class": True}, "the target decides"),
        ({"size": "estimate", "folds": 1}, "folds"),
        ({"count": 5, "eps": -1.0}, "eps"),
    ],
)
def test_options_that_have_no_meaning_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Tarot.Config.model_validate(options)


def test_a_budget_above_the_data_an_empty_target_and_too_few_for_folds_are_refused(source: Source) -> None:
    def check(source: Source, **options: object) -> None:
        Tarot(Tarot.Config.model_validate({"features": "pixels", **options})).check(source, None)

    with pytest.raises(InputError, match="25 images are asked for, and there are 24"):
        check(targeted(source), count=25)
    with pytest.raises(InputError, match="the target has no training images"):
        check(targeted(source, rows=slice(0, 0)), count=5)
    with pytest.raises(InputError, match="8 training images, which cannot be cut into 10 folds") as caught:
        check(targeted(source), size="estimate")
    assert caught.value.where == "folds"


NETWORK = {"model": {"name": "convnet", "width": 4}, "train": {"epochs": 1, "batch_size": 16}}


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({"features": "pixels"}, 64),
        ({"features": "gradients", "network": NETWORK, "projection": {"dim": 300}}, 300),
        ({"features": "last_layer", "network": NETWORK}, 3 * (16 + 1)),
        ({"features": "network", "network": NETWORK}, 16),
        ({"features": "network", "network": NETWORK, "layer": "body.0"}, 4 * 8 * 8),
    ],
)
def test_too_many_features_are_refused_before_a_network_is_trained(
    options: dict[str, object], width: int, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Just below what is needed it is refused, at that it is not; and D is that of the features there will be."""
    method = Tarot(Tarot.Config.model_validate({"count": 5, **options}))
    needed = 24 * width**2

    def check(memory: int) -> None:
        config = method.config.model_copy(update={"memory": memory})
        Tarot(config).check(targeted(source), None)

    check(needed)
    with pytest.raises(InputError, match=f"whitening {width} features takes {needed:,} bytes") as caught:
        check(needed - 1)
    assert caught.value.where == "memory"


@pytest.mark.parametrize("features", ["last_layer", "network"])
def test_the_width_that_is_checked_is_that_of_the_features(
    features: str, source: Source, make_context: Callable[..., Context]
) -> None:
    method = Tarot(Tarot.Config.model_validate({"count": 5, "features": features, "network": NETWORK}))
    found = method.space(make_context(), source).raw(np.arange(3))
    assert found.shape[1] == _width(method.config, source)


def test_entropic_transports_do_as_well(source: Source, make_context: Callable[..., Context]) -> None:
    exact, other = (
        select(make_context(), targeted(source, rows=slice(1, 13)), count=9, **options)
        for options in ({}, {"exact_entries": 0})
    )
    assert len(other.indices) == 9
    assert other.meta["transport_distance"] == pytest.approx(exact.meta["transport_distance"], rel=0.02)


def test_all_images_can_be_asked_for(source: Source, make_context: Callable[..., Context]) -> None:
    found = select(make_context(), targeted(source), count=24)
    assert sorted(found.indices.tolist()) == list(range(24))


@pytest.mark.gpu
def test_gpu_takes_what_the_cpu_takes() -> None:
    candidates, target = planted(0)
    here = take_layers(candidates, target, 60, solver=SOLVER, memory=MEMORY)
    there = take_layers(candidates.cuda(), target.cuda(), 60, solver=SOLVER, memory=MEMORY)
    assert there.cpu().tolist() == here.tolist()
    sizes = [ratio_of(*(each.to(device) for each in (candidates, target))) for device in ("cpu", "cuda")]
    assert torch.equal(sizes[0].layer, sizes[1].layer.cpu())
