"""What passes cost is kept beside their rows, and charged once to each stage that reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.cache import Cache, CriticalMaps, Features, GradientNorms, Gradients, Logits, Network, Projection
from distill.cache.pass_costs import FILE, PassCost, keep, kept
from distill.contracts import Split

MakeCache = Callable[..., Cache]


class Ledger:
    """Counts as `distill.costs.Costs` does, for one stage."""

    def __init__(self) -> None:
        self.counted: set[str] = set()
        self.seconds: list[float] = []
        self.cached = False

    def charge(self, result: str, *, seconds: float, peak_bytes: int) -> None:
        assert peak_bytes > 0
        if result not in self.counted:
            self.counted.add(result)
            self.seconds.append(seconds)

    def made(self, result: str) -> None:
        self.counted.add(result)

    def mark_cached(self) -> None:
        self.cached = True


def lines(cache: Cache) -> dict[str, list[PassCost]]:
    """What is kept, by folder."""
    return {path.parent.name: kept(path.parent) for path in cache.folder.rglob(FILE)}


def test_a_pass_is_charged_once_whatever_is_read_of_it(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    first = Ledger()
    cache = make_cache(costs=first)
    quantities: list[Any] = [Features(), Gradients(Projection(dim=8)), GradientNorms(), CriticalMaps()]
    cache.request(split, network, quantities)
    cache.request(split, network, quantities)
    assert first.seconds == [] and not first.cached, "its own work is measured by its clock"
    told = lines(cache)
    assert len(told) == 5, "logits come along"
    (same,) = {tuple(each) for each in told.values()}
    assert [(cost.start, cost.stop) for cost in same] == [(0, 16), (16, 32), (32, 37)]

    for asked in ([Features()], quantities, [Logits()]):
        later = Ledger()
        cache = make_cache(costs=later)
        cache.request(split, network, asked)
        cache.request(split, network, asked)
        assert sorted(later.seconds) == sorted(cost.seconds for cost in same)
        assert not later.cached


def test_what_is_added_later_is_a_pass_of_its_own(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    make_cache().request(split, network, [Features()])
    second = Ledger()
    make_cache(costs=second).request(split, network, [Features(), CriticalMaps()])
    assert len(second.seconds) == 3, "features come from the pass before, maps from its own"
    third = Ledger()
    make_cache(costs=third).request(split, network, [Features(), CriticalMaps()])
    assert len(third.seconds) == 6


@pytest.mark.parametrize("content", [None, "", "torn 0 3", "a 0 x 1.0 5\n"])
def test_a_cost_that_is_not_known_is_no_cost_but_told(
    content: str | None, make_cache: MakeCache, split: Split, network: Network
) -> None:
    cache = make_cache()
    cache.request(split, network, [Features()])
    for path in cache.folder.rglob(FILE):
        path.unlink() if content is None else path.write_text(content)
    ledger = Ledger()
    make_cache(costs=ledger).request(split, network, [Features()])
    assert ledger.seconds == [] and ledger.cached


def test_lines_are_read_as_they_were_kept(tmp_path: Path) -> None:
    costs = [PassCost("a", 0, 2048, 1.25, 7), PassCost("b", 2048, 4000, 0.5, 9)]
    for cost in costs:
        keep(tmp_path, cost)
    with (tmp_path / FILE).open("a") as file:
        file.write("c 4000 50")
    assert kept(tmp_path) == costs
