"""A Ray cluster of two local nodes: results as on this machine, errors whole."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest

from distill.errors import DistillError, InputError
from distill.parallel import open_pool
from distill.parallel.on_ray import RayPool

ray = pytest.importorskip("ray")

HERE = str(Path(__file__).parent)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work() -> Iterator[ModuleType]:
    sys.path.insert(0, HERE)
    yield importlib.import_module("work")
    sys.path.remove(HERE)


@pytest.fixture(scope="module")
def cluster(ray_cluster: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with ray_cluster(HERE):
        yield


@pytest.fixture
def pool(cluster: None) -> Iterator[RayPool]:
    with RayPool() as pool:
        yield pool


def test_without_a_cluster_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands before all that need one: where a cluster is there, it is found."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="no Ray cluster"), open_pool("ray", workers=1):
        pass


@pytest.mark.parametrize("count", [0, 1, 7])
def test_every_item_is_done_once(count: int, pool: RayPool, work: ModuleType) -> None:
    found = dict(pool.each(work.square, list(range(10, 10 + count)), doing="squared a number"))
    assert found == {number: (10 + number) ** 2 for number in range(count)}


def test_an_error_for_users_comes_whole(pool: RayPool, work: ModuleType) -> None:
    with pytest.raises(InputError, match="three is refused") as caught:
        list(pool.each(work.refuse, range(6), doing="looked"))
    assert (caught.value.where, caught.value.fix) == ("items", "take another")


def test_a_defect_and_a_killed_task_are_told(pool: RayPool, work: ModuleType) -> None:
    with pytest.raises(DistillError, match="that divided failed"):
        list(pool.each(work.fail, [1, 0, 2], doing="divided"))
    with pytest.raises(DistillError, match="that looked failed"):
        list(pool.each(work.be_killed, range(5), doing="looked"))


def test_who_stops_taking_stops_the_work(pool: RayPool, work: ModuleType, tmp_path: Path) -> None:
    items = [(str(tmp_path), number) for number in range(50)]
    results = pool.each(work.leave_a_mark, items, doing="left a mark")
    next(results)
    results.close()
    assert len(list(tmp_path.iterdir())) < 50
