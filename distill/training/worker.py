"""A worker process: reads jobs from standard input, trains them, writes results to standard output.

Started by `distill.training.workers`. It ends when its input ends, without a word and even in the middle of a job, and
takes the pools' files along, so that nothing outlives a parent that was killed.
"""

from __future__ import annotations

import os
import queue
import shutil
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

from distill.errors import DistillError
from distill.training.job import Pool
from distill.training.loop import train
from distill.training.memory import keep_freed_memory, memory_errors, reset_peak
from distill.training.pool_files import PoolPaths, load_pool
from distill.training.workers import read_frame, write_frame

_CPU = torch.device("cpu")
_GRACE_SECONDS = 0.5


def main() -> None:
    keep_freed_memory()
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not reach the frames
    jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, jobs), daemon=True).start()
    pools: dict[PoolPaths, Pool] = {}
    while True:
        _send(results, _answer(jobs.get(), pools, results))


def _listen(stream: IO[bytes], jobs: queue.SimpleQueue[Any]) -> None:
    folders: set[Path] = set()
    while (message := read_frame(stream)) is not None:
        folders.add(Path(message["files"]["pool"].images).parent)
        jobs.put(message)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def _send(results: IO[bytes], message: tuple[Any, ...]) -> None:
    """Write one message; where nobody reads any more, wait for `_listen` to end this process."""
    with suppress(BrokenPipeError):
        write_frame(results, message)
        return
    threading.Event().wait()


def _answer(message: dict[str, Any], pools: dict[PoolPaths, Pool], results: IO[bytes]) -> tuple[Any, ...]:
    try:
        return ("done", message["number"], _train(message, pools, results))
    except DistillError as error:
        return ("error", error)
    except Exception as error:
        # Where the parent was killed, another worker has removed what this one was reading, and `_listen` ends it now.
        time.sleep(_GRACE_SECONDS)
        traceback.print_exc()
        return ("error", DistillError(f"training {message['job'].label} failed: {error!r}"))


def _train(message: dict[str, Any], pools: dict[PoolPaths, Pool], results: IO[bytes]) -> Any:
    reset_peak(_CPU)
    torch.set_num_threads(message["threads"])
    job, files = message["job"], message["files"]
    job = replace(job, pool=_pool(files["pool"], pools), test=_pool(files["test"], pools))
    with memory_errors(f"training {job.label}", fix="set DISTILL_WORKERS=1, or lower train.batch_size"):
        return train(
            [job],
            device=_CPU,
            dtype=message["dtype"],
            report=lambda steps: _send(results, ("steps", steps)),
        )[0]


def _pool(paths: PoolPaths | None, pools: dict[PoolPaths, Pool]) -> Pool | None:
    """The pool of these files; kept, so that jobs that share it also share the object."""
    if paths is None:
        return None
    if paths not in pools:
        pools[paths] = load_pool(paths)
    return pools[paths]
