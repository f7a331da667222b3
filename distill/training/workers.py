"""Worker processes for a CPU: each trains one network at a time on a share of the cores.

A worker runs `distill.training.worker`, spoken to over its standard input and output in frames (length, then pickle;
both ends are this program). A fresh interpreter, rather than a fork, is safe beside this process's threads and lets a
user's script be without `if __name__ == "__main__"`. Pools travel through memory-mapped files, once.
"""

from __future__ import annotations

import os
import pickle
import queue
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from distill.errors import DistillError, MemoryExhaustedError
from distill.training.job import Job, Pool, Trained
from distill.training.pool_files import PoolFiles

_LENGTH = struct.Struct("<Q")

# A worker imports from where this process does: `-m` would put the working directory, and whatever lies there, first.
_START = "import sys; sys.path[:] = sys.argv[1:]; from distill.training.worker import main; main()"


def write_frame(stream: IO[bytes], message: Any) -> None:
    """Send one message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any | None:
    """Receive one message, None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    data = stream.read(size)
    return pickle.loads(data) if len(data) == size else None


class WorkerPool:
    """At most `count` workers, started when first needed.

    Threads of each worker: `count` shared among the workers that have work, so that three jobs with sixteen use five
    threads each; `count` is thus also the number of cores that are used.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._workers: list[_Worker] = []
        self._folder = Path(tempfile.mkdtemp(prefix="distill-pools-"))
        self._files = PoolFiles(self._folder)
        self._events: queue.Queue[tuple[_Worker, Any]] = queue.Queue()

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
            self._workers.append(_Worker(self._events))
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
        self, worker: _Worker, number: int, jobs: Sequence[Job], dtype: torch.dtype, threads: int
    ) -> None:
        job = jobs[number]
        worker.label = job.label
        files = {name: None if pool is None else self._files.paths(pool) for name, pool in _pools(job)}
        # Weights and samples travel by file; the rest of the job is small.
        bare = replace(job, pool=_absent(job.pool), test=None)
        worker.send({"number": number, "job": bare, "files": files, "dtype": dtype, "threads": threads})

    def _next_event(self) -> tuple[_Worker, Any]:
        while True:
            try:
                worker, message = self._events.get(timeout=0.5)  # short, so that Ctrl-C is heard
            except queue.Empty:
                continue
            if message is None:
                raise _death(worker)
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


def _death(worker: _Worker) -> DistillError:
    code = worker.process.wait()
    if code in (-9, 137):
        return MemoryExhaustedError(
            f"the process that trained {worker.label} was killed, most likely for memory",
            fix="set DISTILL_WORKERS=1, lower train.batch_size, or use a smaller network",
        )
    return DistillError(
        f"the process that trained {worker.label} ended with code {code}; its message stands above"
    )


class _Worker:
    """One process and the thread that reads what it says."""

    def __init__(self, events: queue.Queue) -> None:
        self.label = ""
        self._events = events
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # No threads before it is told how many.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            # A group of its own: Ctrl-C is heard by this process alone, which then ends the worker.
            process_group=0,
        )
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: queue.Queue) -> None:
        assert self.process.stdout is not None
        while True:
            message = read_frame(self.process.stdout)
            events.put((self, message))
            if message is None:
                return

    def send(self, message: Any) -> None:
        assert self.process.stdin is not None
        try:
            write_frame(self.process.stdin, message)
        except BrokenPipeError as error:
            raise _death(self) from error

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was buffered for a dead process cannot be written
                    stream.close()
