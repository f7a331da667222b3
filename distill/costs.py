"""What every stage of a run cost: seconds and peak memory, work of earlier runs included."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch

from distill.evaluation.protocol import Ledger
from distill.evaluation.results import StageCost
from distill.files import write_bytes_atomically
from distill.parallel import Pool
from distill.training.memory import peak_bytes, reset_peak


class Measured(Protocol):
    """Who works, and where."""

    @property
    def device(self) -> torch.device: ...

    def take_worker_peak(self) -> int:
        """Bound on the worker processes' memory together since the last call, bytes; 0 if none worked."""
        ...


@dataclass(frozen=True)
class PoolWorkers:
    """This process and those of a pool, on a CPU."""

    pool: Pool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def take_worker_peak(self) -> int:
        return self.pool.take_worker_peak()


class Costs:
    """A ledger of stages, in the order in which they ran.

    Args:
        engine: whose device and worker processes are measured, or `PoolWorkers`.
    """

    def __init__(self, engine: Measured) -> None:
        self.engine = engine
        self.stages: dict[str, StageCost] = {}
        self._start = time.perf_counter()
        self._worker_peak = 0
        self._charged = (0.0, 0)
        self._counted: set[str] = set()
        self._cached = False

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the enclosed work as stage `name`; a stage that failed is not entered."""
        self._charged, self._cached, self._worker_peak = (0.0, 0), False, 0
        self._counted = set()
        reset_peak(self.engine.device)
        self.engine.take_worker_peak()
        self._start = time.perf_counter()
        yield
        self.stages[name] = self.so_far()

    def so_far(self) -> StageCost:
        """What the running stage has cost up to now."""
        seconds = time.perf_counter() - self._start + self._charged[0]
        self._worker_peak = max(self._worker_peak, self.engine.take_worker_peak())
        peak = peak_bytes(self.engine.device) + self._worker_peak
        return StageCost(seconds, max(peak, self._charged[1]), cached=self._cached)

    def go_on(self, earlier: StageCost) -> None:
        """Add what an interrupted run paid for the part of this stage that is not done again."""
        self._add(earlier.seconds, earlier.peak_bytes or 0)
        self._cached = self._cached or earlier.cached

    def charge(self, result: str, *, seconds: float, peak_bytes: int) -> None:
        """Add what an earlier run paid for a result that this stage reads from the cache; once, however often it does.

        Args:
            result: its key in the cache.
        """
        if result in self._counted:
            return
        self._counted.add(result)
        self._add(seconds, peak_bytes)
        self._cached = True

    def made(self, result: str) -> None:
        """Say that this stage made a result, and so has paid for it: reading it again costs nothing."""
        self._counted.add(result)

    def mark_cached(self) -> None:
        """Say that this stage read a result whose cost is not known any more."""
        self._cached = True

    def _add(self, seconds: float, peak: int) -> None:
        self._charged = (self._charged[0] + seconds, max(self._charged[1], peak))


class CostedLedger(Ledger):
    """A ledger of students that knows what they cost, over all parts of an interrupted evaluation.

    The cost is written with every student, so a killed run keeps it too; work on students that were not finished
    is done again, and counted then.

    Args:
        path: of the ledger; the cost lies beside it. None keeps nothing.
        identity: of the set and of the test data.
        costs: whose running stage is the evaluation.
    """

    def __init__(self, path: Path | None, *, identity: str, costs: Costs) -> None:
        super().__init__(path, identity=identity)
        self.costs = costs
        self.cost_path = None if path is None else path.with_suffix(".cost.json")
        if self.known and self.cost_path is not None and self.cost_path.exists():
            costs.go_on(load_cost(self.cost_path))

    def add(self, job: str, accuracy: float) -> None:
        super().add(job, accuracy)
        if self.cost_path is not None:
            save_cost(self.cost_path, self.costs.so_far())


def save_cost(path: Path, cost: StageCost) -> None:
    """Write a cost as JSON, whole or not at all."""
    write_bytes_atomically(path, json.dumps(asdict(cost)).encode())


def load_cost(path: Path) -> StageCost:
    """What `save_cost` wrote."""
    return StageCost(**json.loads(path.read_text(encoding="utf-8")))
