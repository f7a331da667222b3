"""Transport: exact against linear programming, entropic against exact, potentials against differences of mass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor

from dataselect.distances import Distances, feasible
from dataselect.sinkhorn import TOLERANCE, _balanced, sinkhorn
from dataselect.transport import Solver, _cheap, exact
from tests.dataselect.largest import Largest

PLENTY = 1 << 30


def unit_rows(seed: int, count: int, width: int) -> Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def distances_of(seed: int, n: int, m: int, width: int = 5, *, memory: int = PLENTY) -> Distances:
    return Distances(unit_rows(seed, n, width), unit_rows(seed + 1000, m, width), memory=memory)


def masses(seed: int, count: int) -> Tensor:
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
    return drawn / drawn.sum()


def uniform(count: int) -> Tensor:
    return torch.full((count,), 1 / count, dtype=torch.float64)


def slow(costs: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """The linear programme itself."""
    n, m = costs.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    found = linprog(costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([a, b]))
    return float(found.fun)


# --- distances


@pytest.mark.parametrize("memory", [PLENTY, 0])
def test_distances_are_those_of_the_rows(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dataselect.distances._ENTRIES", 40)
    x, y = unit_rows(0, 13, 4), unit_rows(1, 9, 4)
    y[3] = x[5]
    found = Distances(x, y, memory=memory)
    wanted = (x.double()[:, None] - y.double()).norm(dim=2)
    torch.testing.assert_close(found.whole().double(), wanted, rtol=0, atol=1e-7)
    assert float(found.whole()[5, 3]) < 1e-7, "equal rows are no distance apart"
    assert (found.kept is None) == (memory == 0)
    rows, columns = torch.tensor([4, 0, 12]), torch.tensor([8, 3])
    part = found.part(rows, columns)
    torch.testing.assert_close(part.whole().double(), wanted[rows][:, columns])
    torch.testing.assert_close(part.first(2).whole().double(), wanted[rows[:2]][:, columns])
    assert (part.kept is None) == (part.first(2).kept is None) == (memory == 0)
    within = part.part(torch.tensor([2, 0]), torch.tensor([1]))
    torch.testing.assert_close(within.whole().double(), wanted[rows[[2, 0]]][:, columns[[1]]])
    some = Distances(x, y, memory=memory, rows=rows)
    torch.testing.assert_close(some.whole().double(), wanted[rows])


@pytest.mark.parametrize("memory", [PLENTY, 0])
def test_rows_are_gathered_by_blocks(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few distances between wide rows, of which no two blocks are held at once, whichever rows are asked for."""
    monkeypatch.setattr("dataselect.distances._ENTRIES", 2000)
    x, y = unit_rows(0, 300, 500), unit_rows(1, 40, 500)
    with Largest() as made:
        distances = Distances(x, y, memory=memory, rows=torch.arange(299, 19, -1))
        part = distances.part(torch.arange(270), torch.arange(40).flip(0))
        feasible(part, torch.zeros(40))
    kept = 4 * 280 * 40 if memory else 0
    assert made.bytes <= max(kept, 8 * 2000 + 8 * 500)
    wanted = (x.double()[299 - torch.arange(270), None] - y.double().flip(0)).norm(dim=2)
    torch.testing.assert_close(part.whole().double(), wanted, rtol=0, atol=1e-7)


def test_feasible_potentials_are_the_best_for_each_other() -> None:
    distances = distances_of(0, 11, 7)
    f, g = feasible(distances, torch.randn(7, generator=torch.Generator().manual_seed(0)))
    slack = distances.whole() - f[:, None] - g
    assert float(slack.min()) > -1e-6
    assert float(slack.amin(dim=0).max()) < 1e-6, "each g is as great as can be"


# --- exact


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (7, 1), (8, 8), (12, 20), (30, 17)])
@pytest.mark.parametrize("alike", [True, False])
def test_exact_equals_the_linear_programme(seed: int, shape: tuple[int, int], alike: bool) -> None:
    n, m = shape
    distances = distances_of(seed, n, m)
    a, b = (uniform(n), uniform(m)) if alike else (masses(seed, n), masses(seed + 1, m))
    wanted = slow(distances.whole().double().numpy(), a.numpy(), b.numpy())
    for start in (None, masses(seed + 2, m) * 5):
        found = exact(distances, a, b, start=start)
        assert found.cost == pytest.approx(wanted, abs=1e-9)
        assert float(a @ found.f + b @ found.g) == pytest.approx(wanted, abs=1e-9), "no duality gap"
        assert float((distances.whole() - found.f[:, None] - found.g).min()) >= -1e-8


def test_exact_is_exact_though_it_begins_with_few_arcs(monkeypatch: pytest.MonkeyPatch) -> None:
    distances, a, b = distances_of(3, 60, 45), masses(0, 60), masses(1, 45)
    wanted = exact(distances, a, b).cost
    monkeypatch.setattr("dataselect.transport._ARCS", 1)
    start = torch.linspace(0, 50, 45)  # leads far astray
    assert exact(distances, a, b, start=start).cost == pytest.approx(wanted, abs=1e-12)


def test_exact_where_most_distances_are_alike() -> None:
    """More of them than a sample tells apart, and more that are cheapest than the simplex begins with."""
    x, y = unit_rows(0, 5, 4).repeat(40, 1), unit_rows(1, 4, 4).repeat(32, 1)
    distances = Distances(x, y, memory=PLENTY)
    assert distances.whole().numel() > 1 << 14
    few = Distances(x[:5], y[:4], memory=PLENTY)
    a, b = masses(0, 200), masses(1, 128)
    wanted = exact(few, a.reshape(40, 5).sum(dim=0), b.reshape(32, 4).sum(dim=0)).cost
    assert exact(distances, a, b).cost == pytest.approx(wanted, abs=1e-9)
    for potential, width in ((0.0, 128), (3.0, 128)):
        arcs = _cheap(distances.whole().numpy(), np.full(width, potential))
        assert 0 < len(arcs) <= 2 * 8 * (200 + 128) and len(np.unique(arcs)) == len(arcs)


def test_points_that_are_all_the_same() -> None:
    x = unit_rows(0, 1, 4)
    distances = Distances(x.repeat(6, 1), x.repeat(4, 1), memory=PLENTY)
    assert exact(distances, masses(0, 6), masses(1, 4)).cost == pytest.approx(0, abs=1e-7)
    assert sinkhorn(distances, masses(0, 6), masses(1, 4)).cost == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("entropic", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_potentials_are_the_derivative_by_mass(seed: int, entropic: bool) -> None:
    """Masses that share no partial sums: the potentials are unique but for a constant."""
    distances, a, b = distances_of(seed, 15, 11), masses(seed, 15), masses(seed + 7, 11)
    found = sinkhorn(distances, a, b) if entropic else exact(distances, a, b)
    step = 1e-5
    for more, less in [(0, 1), (3, 14), (9, 2)]:
        moved = a.clone()
        moved[more] += step
        moved[less] -= step
        there, back = exact(distances, moved, b).cost, exact(distances, 2 * a - moved, b).cost
        wanted = float(found.f[more] - found.f[less])
        assert (there - back) / (2 * step) == pytest.approx(wanted, abs=2e-2 if entropic else 1e-6)


# --- entropic


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("shape", [(1, 5, 3), (150, 90, 4), (90, 200, 64), (64, 64, 2)])
def test_sinkhorn_is_within_a_thousandth_and_never_above(seed: int, shape: tuple[int, int, int]) -> None:
    n, m, width = shape
    distances, a, b = distances_of(seed, n, m, width), masses(seed, n), masses(seed + 1, m)
    wanted, found = exact(distances, a, b), sinkhorn(distances, a, b)
    assert wanted.cost * 0.999 < found.cost <= wanted.cost + 1e-6
    assert found.error < TOLERANCE
    assert float((distances.whole() - found.f[:, None] - found.g).min()) > -1e-6


def test_known_potentials_give_the_same_in_fewer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    distances, a, b = distances_of(0, 120, 80), masses(0, 120), masses(1, 80)
    cold = sinkhorn(distances, a, b)
    passes = []
    blocks = Distances.blocks
    monkeypatch.setattr(Distances, "blocks", lambda self: (passes.append(1), blocks(self))[1])
    warm = sinkhorn(distances, a, b, start=cold.g)
    count = len(passes)
    passes.clear()
    again = sinkhorn(distances, a, b)
    assert count < len(passes)
    assert warm.cost == pytest.approx(cold.cost, rel=5e-4)
    assert again.cost == cold.cost


@pytest.mark.parametrize("memory", [PLENTY, 0])
def test_the_error_is_the_worse_of_rows_and_columns(memory: int) -> None:
    """Also after few iterations, where an over-relaxed step leaves neither side right."""
    n, m = 40, 30
    a, b, eps = masses(0, n).float(), masses(1, m).float(), 0.1
    distances = distances_of(0, n, m, memory=memory)
    sides = set()
    for iterations, relaxation in [(1, 1.0), (3, 1.95), (10, 1.95), (10, 1.0), (25, 1.5)]:
        f, g, error = _balanced(
            distances, a, b, torch.zeros(m), eps, relaxation=relaxation, tolerance=0.0, iterations=iterations
        )
        plan = a[:, None] * b * ((f[:, None] + g - distances.whole()) / eps).exp()
        missed = [float((plan.sum(dim=1) - a).abs().sum()), float((plan.sum(dim=0) - b).abs().sum())]
        sides.add(int(np.argmax(missed)))
        assert error == pytest.approx(max(missed), rel=1e-3, abs=1e-5)
    assert sides == {0, 1}


def test_neither_memory_nor_blocks_change_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = masses(0, 70), masses(1, 50)
    wanted = sinkhorn(distances_of(0, 70, 50), a, b).cost
    monkeypatch.setattr("dataselect.distances._ENTRIES", 500)
    for memory in (PLENTY, 0):
        assert sinkhorn(distances_of(0, 70, 50, memory=memory), a, b).cost == pytest.approx(wanted, rel=2e-4)


# --- which of them


def test_the_solver_is_exact_while_it_is_small_and_says_where_it_did_not_converge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    distances = distances_of(0, 40, 30)
    wanted = exact(distances, uniform(40), uniform(30)).cost
    assert Solver(1200, told.append).solve(distances).cost == wanted
    assert Solver(1199, told.append).solve(distances).cost == pytest.approx(wanted, rel=1e-3)
    assert told == []
    monkeypatch.setattr("dataselect.sinkhorn._ITERATIONS", 2)
    monkeypatch.setattr("dataselect.sinkhorn.sinkhorn.__kwdefaults__", {"start": None, "iterations": 2})
    Solver(0, told.append).solve(distances)
    (warning,) = told
    assert "40 samples to 30 of the target has not converged" in warning
    assert "0.005 is wanted" in warning


@pytest.mark.gpu
def test_gpu_equals_cpu() -> None:
    x, y, a, b = unit_rows(0, 200, 16), unit_rows(1, 150, 16), masses(0, 200), masses(1, 150)
    on_cpu, on_gpu = Distances(x, y, memory=PLENTY), Distances(x.cuda(), y.cuda(), memory=PLENTY)
    torch.testing.assert_close(on_gpu.whole().cpu(), on_cpu.whole())
    for way in (exact, sinkhorn):
        here, there = way(on_cpu, a, b), way(on_gpu, a.cuda(), b.cuda())
        assert there.cost == pytest.approx(here.cost, rel=1e-4)
        assert there.f.device.type == "cuda"
