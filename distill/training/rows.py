"""Which samples of a pool its jobs use: those alone are worth memory, however many the pool has."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from distill.training.job import Job


def used_rows(jobs: Iterable[Job]) -> Tensor | None:
    """The samples that `jobs`, which share a pool, use: int64 (n,) ascending, distinct; None is all of them."""
    indices = []
    for job in jobs:
        if job.indices is None:
            return None
        indices.append(job.indices.cpu())
    return torch.unique(torch.cat(indices))


def places(job: Job, rows: Tensor | None) -> Tensor:
    """Where the job's samples are among `rows` of its pool (None: all of them): int64 (n,)."""
    indices = torch.arange(len(job.pool)) if job.indices is None else job.indices.cpu()
    return indices if rows is None else torch.searchsorted(rows, indices)
