"""How many threads a step on a CPU is given: small steps lose more to waiting for each other than they gain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FLOPS_A_THREAD = 1e9  # of a training step for which one more thread pays


def useful_threads(flops: float) -> int:
    """Threads that training steps of so many floating point operations can keep busy; at least 1."""
    return max(1, round(flops / _FLOPS_A_THREAD))


@contextmanager
def at_most_threads(count: int) -> Iterator[None]:
    """Compute with at most so many threads, and put torch's number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(count, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)
