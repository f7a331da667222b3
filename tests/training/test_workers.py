"""Worker processes: what they print, how they die, and what is left behind (nothing)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import DistillError, MemoryExhaustedError, NonFiniteError
from distill.processes import read_frame, write_frame
from distill.training import worker as worker_module
from distill.training.job import Job
from distill.training.pool_files import PoolFiles
from distill.training.workers import WorkerPool

MakeJob = Callable[..., Job]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and file limits of POSIX")


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """Shared, since workers take seconds to start; it starts new ones after each test that ends them."""
    workers = WorkerPool(2)
    yield workers
    workers.close()


def run(workers: WorkerPool, jobs: list[Job], report: Callable[[int], None] = lambda steps: None) -> Any:
    return workers.train(jobs, dtype=torch.float32, report=report, done=lambda number, trained: None)


def processes(workers: WorkerPool) -> list[subprocess.Popen]:
    return [worker.process for worker in workers._workers]


def endless(make_job: MakeJob, label: str) -> Job:
    return make_job(epochs=10**6, label=label)


NOISY_MODEL = """
import os
from distill.models.mlp import MLPConfig

class Noisy(MLPConfig):
    def build(self, image_shape, classes):
        print("noise by print", flush=True)
        os.write(1, b"noise by write")
        return super().build(image_shape, classes)
"""


def test_workers_import_what_this_process_does_and_nothing_from_the_working_directory(
    make_job: MakeJob,
    pool: WorkerPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """Stray prints of a network from another package reach standard error and never the frames."""
    package, working = tmp_path / "package", tmp_path / "working"
    package.mkdir()
    working.mkdir()
    (package / "noisy_model.py").write_text(NOISY_MODEL)
    (working / "queue.py").write_text("raise SystemExit('imported from the working directory')")
    monkeypatch.syspath_prepend(package)
    monkeypatch.chdir(working)
    from noisy_model import Noisy  # type: ignore[import-not-found]

    (trained,) = run(pool, [replace(make_job(), model=Noisy(width=4))])
    assert trained.loss > 0
    shown = capfd.readouterr()
    assert "noise by print" in shown.err
    assert "noise by write" in shown.err
    assert shown.out == ""


def test_a_killed_worker_is_told_as_lack_of_memory(make_job: MakeJob, pool: WorkerPool) -> None:
    started: list[subprocess.Popen] = []

    def kill_one(steps: int) -> None:
        if not started:
            started.extend(processes(pool))
            started[1].kill()

    with pytest.raises(MemoryExhaustedError, match=r"that trained (left|right) was killed") as caught:
        run(pool, [endless(make_job, "left"), endless(make_job, "right")], kill_one)
    assert "DISTILL_WORKERS=1" in str(caught.value)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started), "the other worker is ended too"


def test_ctrl_c_ends_the_workers(make_job: MakeJob, pool: WorkerPool) -> None:
    """They do not hear it themselves: a terminal sends it to its foreground group, and they would die in tracebacks."""
    started: list[subprocess.Popen] = []
    groups: list[int] = []

    def interrupt(steps: int) -> None:
        if not started:
            started.extend(processes(pool))
            groups.extend(os.getpgid(process.pid) for process in started)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(pool, [endless(make_job, "a")], interrupt)
    assert len(started) == 1
    assert os.getpgid(0) not in groups
    assert all(process.poll() is not None for process in started)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    """The pipe to standard error ends with the last process that holds it, so `run` returns when workers are gone."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path[:] = sys.argv[1:]
        import torch
        from distill.contracts import Preprocessing
        from distill.models import model_config
        from distill.training.config import TrainConfig
        from distill.training.job import Job, Pool
        from distill.training.workers import WorkerPool

        images, labels = torch.zeros(8, 1, 8, 8, dtype=torch.uint8), torch.arange(8)
        job = Job(
            model=model_config("mlp"), classes=8, config=TrainConfig(epochs=10**6, augment="none"),
            pool=Pool(images, labels, Preprocessing((0.0,), (1.0,))), seed=0,
        )
        def die(steps):
            print("training", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        WorkerPool(1).train([job], dtype=torch.float32, report=die, done=lambda number, trained: None)
        """
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, *sys.path],
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == b"training\n"
    assert ended.stderr == b"", "no traceback of a worker"
    assert not list(tmp_path.glob("distill-pools-*")), "nor the pools' files"


def test_the_error_of_a_job_ends_all_and_leaves_nothing(make_job: MakeJob) -> None:
    pool = WorkerPool(1)
    with pytest.raises(NonFiniteError) as caught:
        run(pool, [make_job(lr=1e30, augment="none", epochs=4, label="wild")])
    assert "wild" in caught.value.what
    assert caught.value.fix is not None, "every field of the error has travelled"
    assert processes(pool) == [], "what the others still compute is of no use"
    folder = pool._folder
    assert folder.exists()
    pool.close()
    assert not folder.exists()


def test_a_defect_in_a_worker_is_told_with_the_job(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("broken network")

    monkeypatch.setattr(worker_module, "train", broken)
    job = make_job(label="bad")
    files = {"pool": PoolFiles(tmp_path).paths(job.pool), "test": None}
    message = {"number": 0, "job": job, "files": files, "dtype": torch.float32, "threads": 1}
    kind, error = worker_module._answer(message, {}, BytesIO())
    assert kind == "error"
    assert isinstance(error, DistillError)
    assert error.what == "training bad failed: ZeroDivisionError('broken network')"
    assert "Traceback" in capsys.readouterr().err


def test_frames() -> None:
    stream = BytesIO()
    for message in ({"a": 1}, "text"):
        write_frame(stream, message)
    whole = stream.getvalue()
    stream.seek(0)
    assert [read_frame(stream) for _ in range(3)] == [{"a": 1}, "text", None]
    for cut in (1, 9, len(whole) - 1):
        cut_short = BytesIO(whole[:cut])
        messages = []
        while (message := read_frame(cut_short)) is not None:
            messages.append(message)
        assert messages == ([{"a": 1}] if cut > 9 else [])
