"""What every stage of a run cost: seconds and peak memory, work of earlier runs included."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from distill.evaluation.results import StageCost
from distill.training.engine import Engine
from distill.training.memory import peak_bytes, reset_peak


class Costs:
    """A ledger of stages, in the order in which they ran.

    Args:
        engine: whose device and worker processes are measured.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.stages: dict[str, StageCost] = {}
        self._charged = (0.0, 0)
        self._cached = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the enclosed work as stage `name`; a stage that failed is not entered."""
        self._charged, self._cached = (0.0, 0), False
        reset_peak(self.engine.device)
        self.engine.take_worker_peak()
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start + self._charged[0]
        peak = peak_bytes(self.engine.device) + self.engine.take_worker_peak()
        self.stages[name] = StageCost(seconds, max(peak, self._charged[1]), cached=self._cached)

    def charge(self, *, seconds: float, peak_bytes: int) -> None:
        """Add what an earlier run paid for a result that this stage reads from the cache."""
        self._charged = (self._charged[0] + seconds, max(self._charged[1], peak_bytes))
        self._cached = True

    def mark_cached(self) -> None:
        """Say that this stage read a result whose cost is not known any more."""
        self._cached = True
