"""The engine trains many networks in the way that is fastest on the device.

- On a GPU, as one stack: every kernel computes all K networks (`distill/training/networks.py`).
- On a CPU, as worker processes with one thread each (`distill/training/workers.py`): small networks do not fill two
  threads, and a stack is slower than a loop there.
- One network alone, in this process, with as many threads as its steps can keep busy.

The way chosen changes results by rounding alone: orders, views and initial weights come from each job's seed. Threads
round too. So experts and committees of equal teachers, of which some may be kept and others missing, have `one_thread`
on a CPU in either way: what their weights are then does not depend on how many were trained with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal

import torch

from distill.contracts import Progress
from distill.errors import InputError, MemoryExhaustedError
from distill.models.cost import forward_cost
from distill.models.torchvision_models import TorchvisionConfig
from distill.training.config import Precision
from distill.training.job import Job, Trained
from distill.training.loop import train
from distill.training.memory import keep_freed_memory, memory_errors
from distill.training.precision import resolve_precision
from distill.training.threads import at_most_threads, useful_threads
from distill.training.workers import WorkerPool

Way = Literal["auto", "serial", "workers", "stack"]

_FIX_MEMORY = "lower train.batch_size, use a smaller network, or set DISTILL_WORKERS=1 on a CPU"


def _ignore(number: int, trained: Trained) -> None:
    """Nobody waits for single results."""


class Engine:
    """Trains jobs; a context manager, because worker processes live as long as it does.

    Args:
        device: where networks are trained.
        precision: of forward and backward passes.
        progress: where training tells how far it is.
        way: how several networks are trained; `auto` is the fastest for the device.
    """

    def __init__(
        self, device: torch.device, *, precision: Precision, progress: Progress, way: Way = "auto"
    ) -> None:
        self.device = device
        self.dtype = resolve_precision(precision, device)
        self.progress = progress
        self.way = way
        self._workers: WorkerPool | None = None
        self._worker_peak = 0
        self._cudnn = torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=True,
            allow_tf32=False,  # float32 is then what it says: by default convolutions round their inputs to 10 bits
        )
        keep_freed_memory()

    def __enter__(self) -> Engine:
        self._cudnn.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._cudnn.__exit__(kind, error, trace)

    def close(self) -> None:
        """End the worker processes."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def train(
        self, jobs: Sequence[Job], *, title: str, on_done: Callable[[int, Trained], None] = _ignore
    ) -> list[Trained]:
        """Train every job and return the results in order.

        Args:
            jobs: any mix of models, data and lengths.
            title: what a progress bar says.
            on_done: called with a job's number and result as soon as it is there, in any order.

        Raises:
            NonFiniteError: a loss became NaN or infinite; the error names the job.
            MemoryExhaustedError: the device or the host ran out of memory.
        """
        way = self.choose(jobs)
        self.progress.record("train", title=title, jobs=len(jobs), way=way, dtype=str(self.dtype))
        total = sum(job.steps for job in jobs)
        results: dict[int, Trained] = {}

        def done(number: int, trained: Trained) -> None:
            results[number] = trained
            on_done(number, trained)

        with self.progress.task(title, total=total, unit="step") as task:
            if way == "workers":
                self._train_in_workers(jobs, task.advance, done)
            elif way == "stack":
                self._train_stacks(jobs, task.advance, done)
            else:
                self._train_one_by_one(jobs, task.advance, done)
        return [results[number] for number in range(len(jobs))]

    def choose(self, jobs: Sequence[Job]) -> Way:
        """The way in which these jobs would be trained."""
        if self.way != "auto":
            return self.way
        if self.device.type == "cuda":
            return "stack"
        return "workers" if len(jobs) > 1 and worker_count() > 1 else "serial"

    def _train_group(self, jobs: Sequence[Job], report: Callable[[int], None]) -> list[Trained]:
        with memory_errors(f"training {jobs[0].label}", fix=_FIX_MEMORY):
            return train(jobs, device=self.device, dtype=self.dtype, report=report)

    def _train_one_by_one(
        self, jobs: Sequence[Job], report: Callable[[int], None], done: Callable[[int, Trained], None]
    ) -> None:
        for number, job in enumerate(jobs):
            with at_most_threads(1 if job.one_thread else useful_threads(step_flops(job))):
                done(number, self._train_group([job], report)[0])

    def _train_stacks(
        self, jobs: Sequence[Job], report: Callable[[int], None], done: Callable[[int, Trained], None]
    ) -> None:
        """Jobs of one shape together; a stack that does not fit is halved, since results do not depend on it."""
        waiting = list(stackable(jobs))
        while waiting:
            numbers = waiting.pop(0)
            try:
                trained = self._train_group([jobs[number] for number in numbers], report)
            except MemoryExhaustedError:
                if len(numbers) == 1:
                    raise
                half = len(numbers) // 2
                self.progress.warn(f"{len(numbers)} networks at once do not fit in memory; trying {half}")
                waiting = [numbers[:half], numbers[half:], *waiting]
                torch.cuda.empty_cache()
                continue
            for number, result in zip(numbers, trained, strict=True):
                done(number, result)

    def _train_in_workers(
        self, jobs: Sequence[Job], report: Callable[[int], None], done: Callable[[int, Trained], None]
    ) -> None:
        workers = self._workers_on(cores_for(jobs))
        results = workers.train(jobs, dtype=self.dtype, report=report, done=done)
        # At worst the hungriest jobs ran side by side.
        peaks = sorted((result.peak_bytes for result in results), reverse=True)
        self._worker_peak = max(self._worker_peak, sum(peaks[: workers.count]))

    def _workers_on(self, cores: int) -> WorkerPool:
        """The workers, started anew where they share another number of cores."""
        if self._workers is not None and self._workers.count != cores:
            self.close()
        if self._workers is None:
            self._workers = WorkerPool(cores)
        return self._workers

    def take_worker_peak(self) -> int:
        """Bound on the worker processes' memory together since the last call, bytes; 0 if none worked."""
        peak, self._worker_peak = self._worker_peak, 0
        return peak


def step_flops(job: Job) -> float:
    """Floating point operations of a training step."""
    batch = min(job.config.batch_size, job.samples)
    return 3 * batch * forward_cost(job.model, job.pool.image_shape, job.classes).flops


def stackable(jobs: Sequence[Job]) -> list[list[int]]:
    """Numbers of the jobs, grouped so that each group can be trained as one stack.

    torchvision's networks are trained one by one: many hold dropout, whose draws in a stack would not be those of a
    network alone.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for number, job in enumerate(jobs):
        alike = (
            *(
                job.model,
                job.classes,
                job.config,
                job.samples,
                job.pool.image_shape,
                job.pool.soft,
                job.pool.weights is None,
                id(job.test),
            ),
            *(job.record_dynamics, None if job.pool.views is None else id(job.pool)),
        )
        key = (*alike, number) if isinstance(job.model, TorchvisionConfig) else alike
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def cores_for(jobs: Sequence[Job]) -> int:
    """Cores that workers share; where jobs ask for one thread no more than jobs."""
    return min(worker_count(), len(jobs)) if any(job.one_thread for job in jobs) else worker_count()


def worker_count() -> int:
    """Processes, and so cores, that train side by side: the cores this process may use, or DISTILL_WORKERS."""
    text = os.environ.get("DISTILL_WORKERS")
    if text is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise InputError(
            "the number of workers is no number",
            where="environment variable DISTILL_WORKERS",
            found=text,
            allowed="an integer >= 1",
        )
    return int(text)
