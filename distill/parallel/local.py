"""Processes of this machine; one worker is this process itself."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from distill.processes import Events, WorkerProcess, next_event

Item = TypeVar("Item")
Result = TypeVar("Result")

_MODULE = "distill.parallel.worker"
_FIX = "set DISTILL_WORKERS=1, or give the machine more memory"


class LocalPool:
    """At most `count` processes, started when first needed and ended with the pool.

    Args:
        count: at least 1; 1 works in this process. So does a single item where no process has been started yet.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers: list[WorkerProcess] = []
        self._events: Events = queue.Queue()
        self._peaks: dict[int, int] = {}  # by process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop()

    def each(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, doing: str
    ) -> Iterator[tuple[int, Result]]:
        """See `distill.parallel.Pool`."""
        if self.count == 1 or (len(items) < 2 and not self._workers):
            yield from ((number, function(item)) for number, item in enumerate(items))
            return
        while len(self._workers) < min(self.count, len(items)):
            self._workers.append(WorkerProcess(_MODULE, self._events, fix=_FIX))
        waiting = iter(range(len(items)))
        try:
            for worker in self._workers[: len(items)]:
                self._give(worker, function, items, next(waiting), doing)
            for _ in items:
                worker, (kind, number, result) = next_event(self._events)
                if kind == "error":
                    raise result
                self._peaks[worker.process.pid] = worker.peak_bytes()
                following = next(waiting, None)
                if following is not None:
                    self._give(worker, function, items, following, doing)
                yield number, result
        except BaseException:
            self._stop()  # what they still compute is of no use any more
            raise

    def take_worker_peak(self) -> int:
        """See `distill.parallel.Pool`."""
        peak = sum(self._peaks.values())
        self._peaks = {}
        return peak

    def _give(
        self,
        worker: WorkerProcess,
        function: Callable[..., Any],
        items: Sequence[Any],
        number: int,
        doing: str,
    ) -> None:
        worker.label = doing
        worker.send((function, items[number], number))

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
        self._events = queue.Queue()
