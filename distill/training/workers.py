"""Workers for a CPU: each process trains one network at a time on a share of the cores.

A worker runs `distill.training.worker`. Pools travel through memory-mapped files, once.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.processes import Events, WorkerProcess, next_event
from distill.training.job import Job, Pool, Trained
from distill.training.pool_files import PoolFiles

_MODULE = "distill.training.worker"
_FIX = "set DISTILL_WORKERS=1, lower train.batch_size, or use a smaller network"


class WorkerPool:
    """At most `count` workers, started when first needed.

    Threads of each worker: `count` shared among the workers that have work, so that three jobs with sixteen use five
    threads each; `count` is thus also the number of cores that are used.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers: list[WorkerProcess] = []
        self._folder = Path(tempfile.mkdtemp(prefix="distill-pools-"))
        self._files = PoolFiles(self._folder)
        self._events: Events = queue.Queue()

    def train(
        self,
        jobs: Sequence[Job],
        *,
        dtype: torch.dtype,
        report: Callable[[int], None],
        done: Callable[[int, Trained], None],
    ) -> list[Trained]:
        """Train every job, the longest first; `report` hears of steps, `done` of results. Returns them in order."""
        if not jobs:
            return []
        waiting = sorted(range(len(jobs)), key=lambda number: jobs[number].steps)
        busy = min(self.count, len(jobs))
        threads = max(1, self.count // busy)
        while len(self._workers) < busy:
            self._workers.append(WorkerProcess(_MODULE, self._events, fix=_FIX))
        results: dict[int, Trained] = {}
        try:
            for worker in self._workers[:busy]:
                self._give(worker, waiting.pop(), jobs, dtype, threads)
            while len(results) < len(jobs):
                worker, message = self._next_event()
                if message[0] == "steps":
                    report(message[1])
                    continue
                results[message[1]] = message[2]
                done(message[1], message[2])
                if waiting:
                    self._give(worker, waiting.pop(), jobs, dtype, threads)
        except BaseException:
            self._stop_workers()  # what they still compute is of no use any more
            raise
        return [results[number] for number in range(len(jobs))]

    def _give(
        self, worker: WorkerProcess, number: int, jobs: Sequence[Job], dtype: torch.dtype, threads: int
    ) -> None:
        job = jobs[number]
        worker.label = f"trained {job.label}"
        files = {name: None if pool is None else self._files.paths(pool) for name, pool in _pools(job)}
        # Weights and samples travel by file; the rest of the job is small.
        bare = replace(job, pool=_absent(job.pool), test=None)
        worker.send({"number": number, "job": bare, "files": files, "dtype": dtype, "threads": threads})

    def _next_event(self) -> tuple[WorkerProcess, Any]:
        worker, message = next_event(self._events)
        if message[0] == "error":
            raise message[1]
        return worker, message

    def _stop_workers(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers = []
        self._events = queue.Queue()

    def close(self) -> None:
        """End the workers and remove their files."""
        self._stop_workers()
        shutil.rmtree(self._folder, ignore_errors=True)


def _pools(job: Job) -> tuple[tuple[str, Pool | None], ...]:
    return (("pool", job.pool), ("test", job.test))


def _absent(pool: Pool) -> Pool:
    """The pool without its samples, which a worker reads from the file."""
    return replace(pool, images=pool.images[:0].clone(), targets=pool.targets[:0].clone(), views=None)
