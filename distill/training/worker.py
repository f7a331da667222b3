"""A worker process: reads jobs from standard input, trains them, writes results to standard output.

Started by `distill.training.workers`. It ends when its input ends, without a word and even in the middle of a job, and
takes the pools' files along, so that nothing outlives a parent that was killed.
"""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill.errors import DistillError
from distill.processes import serve
from distill.training.job import Pool
from distill.training.loop import train
from distill.training.memory import keep_freed_memory, memory_errors, reset_peak
from distill.training.pool_files import PoolPaths, load_pool

_CPU = torch.device("cpu")
_GRACE_SECONDS = 0.5

Send = Callable[[Any], None]


def main() -> None:
    keep_freed_memory()
    pools: dict[PoolPaths, Pool] = {}
    folders: set[Path] = set()

    def heard(message: dict[str, Any]) -> None:
        folders.add(Path(message["files"]["pool"].images).parent)

    def remove_pools() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    serve(lambda message, send: _answer(message, pools, send), heard=heard, at_end=remove_pools)


def _answer(message: dict[str, Any], pools: dict[PoolPaths, Pool], send: Send) -> tuple[Any, ...]:
    try:
        return ("done", message["number"], _train(message, pools, send))
    except DistillError as error:
        return ("error", error)
    except Exception as error:
        # Where the parent was killed, another worker has removed what this one was reading, and `serve` ends it now.
        time.sleep(_GRACE_SECONDS)
        traceback.print_exc()
        return ("error", DistillError(f"training {message['job'].label} failed: {error!r}"))


def _train(message: dict[str, Any], pools: dict[PoolPaths, Pool], send: Send) -> Any:
    reset_peak(_CPU)
    torch.set_num_threads(message["threads"])
    job, files = message["job"], message["files"]
    job = replace(job, pool=_pool(files["pool"], pools), test=_pool(files["test"], pools))
    with memory_errors(f"training {job.label}", fix="set DISTILL_WORKERS=1, or lower train.batch_size"):
        return train(
            [job],
            device=_CPU,
            dtype=message["dtype"],
            report=lambda steps: send(("steps", steps)),
        )[0]


def _pool(paths: PoolPaths | None, pools: dict[PoolPaths, Pool]) -> Pool | None:
    """The pool of these files; kept, so that jobs that share it also share the object."""
    if paths is None:
        return None
    if paths not in pools:
        pools[paths] = load_pool(paths)
    return pools[paths]
