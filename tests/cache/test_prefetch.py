"""Reading ahead in a thread: order, errors, and an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from distill.cache.rows import prefetched


def counting(limit: int, made: list[int]) -> Iterator[int]:
    for number in range(limit):
        made.append(number)
        yield number


def test_items_come_in_order() -> None:
    assert list(prefetched(iter(range(100)))) == list(range(100))
    assert list(prefetched(iter([]))) == []


def test_only_so_many_are_made_ahead() -> None:
    made: list[int] = []
    items = prefetched(counting(100, made), ahead=3)
    assert next(items) == 0
    time.sleep(0.3)
    assert 3 <= len(made) <= 6  # one taken, three waiting, one or two in hand
    items.close()  # type: ignore[attr-defined]


def test_an_error_stands_where_the_item_would_have_been() -> None:
    def fails() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    items = prefetched(fails())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


def test_the_thread_ends_with_its_consumer() -> None:
    before = threading.active_count()
    items = prefetched(counting(10**9, []))
    next(items)
    items.close()  # type: ignore[attr-defined]
    for _ in range(50):
        if threading.active_count() <= before:
            return
        time.sleep(0.1)
    pytest.fail("the thread goes on")
