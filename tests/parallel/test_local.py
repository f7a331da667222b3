"""Processes of this machine: every result once, errors whole, nothing left running."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from distill.errors import DistillError, InputError, MemoryExhaustedError
from distill.parallel import open_pool
from distill.parallel.local import LocalPool


@pytest.fixture(scope="module")
def work() -> Iterator[ModuleType]:
    """A module that workers find by the path that they are given."""
    sys.path.insert(0, str(Path(__file__).parent))
    spec = importlib.util.find_spec("work")
    assert spec is not None
    yield importlib.import_module("work")
    sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="module")
def pool(work: ModuleType) -> Iterator[LocalPool]:
    with LocalPool(2) as pool:
        yield pool


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_item_is_done_once(count: int, pool: LocalPool, work: ModuleType) -> None:
    items = list(range(10, 10 + count))
    found = dict(pool.each(work.square, items, doing="squared a number"))
    assert found == {number: item * item for number, item in enumerate(items)}


def test_one_worker_is_this_process(work: ModuleType) -> None:
    with open_pool("local", workers=1) as pool:
        assert dict(pool.each(work.slow_first, [1, 1], doing="waited")) == {0: os.getpid(), 1: os.getpid()}


def test_a_single_item_starts_no_process_and_goes_to_one_that_is_there(work: ModuleType) -> None:
    with LocalPool(2) as pool:
        (alone,) = dict(pool.each(work.slow_first, [1], doing="waited")).values()
        several = dict(pool.each(work.slow_first, [1, 1], doing="waited")).values()
        (later,) = dict(pool.each(work.slow_first, [1], doing="waited")).values()
    assert alone == os.getpid()
    assert later in several and os.getpid() not in several


def test_results_come_as_they_are_done(pool: LocalPool, work: ModuleType) -> None:
    order = [number for number, _ in pool.each(work.slow_first, [0, 1, 2, 3], doing="waited")]
    assert order == [1, 2, 3, 0]


def test_large_results_come_whole(pool: LocalPool, work: ModuleType) -> None:
    found = dict(pool.each(work.large, [5_000_000, 3, 4_000_000], doing="wrote"))
    assert {number: len(each) for number, each in found.items()} == {0: 5_000_000, 1: 3, 2: 4_000_000}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_for_users_comes_whole(workers: int, work: ModuleType) -> None:
    with LocalPool(workers) as pool, pytest.raises(InputError, match="three is refused") as caught:
        list(pool.each(work.refuse, range(6), doing="looked"))
    assert (caught.value.where, caught.value.fix) == ("items", "take another")


def test_a_defect_is_told(work: ModuleType) -> None:
    with LocalPool(2) as pool, pytest.raises(DistillError, match="fail failed: ZeroDivisionError"):
        list(pool.each(work.fail, [1, 0, 2], doing="divided"))


def test_a_killed_worker_is_told(work: ModuleType) -> None:
    with LocalPool(2) as pool:
        with pytest.raises(MemoryExhaustedError, match="the process that looked was killed"):
            list(pool.each(work.be_killed, range(5), doing="looked"))
        assert dict(pool.each(work.square, [2, 3], doing="squared")) == {0: 4, 1: 9}, "others take its place"


def test_who_stops_taking_stops_the_work(tmp_path: Path, work: ModuleType) -> None:
    items = [(str(tmp_path), number) for number in range(50)]
    with LocalPool(2) as pool:
        results = pool.each(work.leave_a_mark, items, doing="left a mark")
        next(results)
        results.close()
        done = len(list(tmp_path.iterdir()))
        time.sleep(0.6)
        assert len(list(tmp_path.iterdir())) == done < 50
