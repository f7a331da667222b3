"""How much memory the tensors of a computation take at once: counted, not read off the machine.

Every tensor that an operation puts out is counted from then until its memory is given back; tensors of before are not.
The count is the same on every device and at every repetition. What an operation takes for itself while it runs (the
workspace of a convolution) is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While entered, `peak` is the most bytes that tensors made since then have held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._counted: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Views and operations in place give memory of before, which is known or not ours.
        before = {_key(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and _key(value) not in before:
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._now += size
        self.peak = max(self.peak, self._now)

        def forget(_: weakref.ref[torch.UntypedStorage]) -> None:
            del self._counted[key]
            self._now -= size

        self._counted[key] = weakref.ref(storage, forget)


def _key(value: Tensor) -> int:
    return value.untyped_storage()._cdata


def rows_within(
    work_bytes: int, run: Callable[[Tensor], object], probes: tuple[Tensor, Tensor], *, most: int
) -> int:
    """How many samples may go through `run` at once: the largest power of two within `work_bytes`, 1 to `most`.

    Args:
        work_bytes: what the tensors that `run` makes may take together.
        run: the computation, on images (B, Ch, H, W).
        probes: images of two batch sizes, from which the bytes that each further sample takes are counted.
        most: a power of two.
    """
    few, many = (_peak(run, probe) for probe in probes)
    each = max(1, (many - few) // (len(probes[1]) - len(probes[0])))
    rows = most
    while rows > 1 and rows * each > work_bytes:
        rows //= 2
    return rows


def _peak(run: Callable[[Tensor], object], probe: Tensor) -> int:
    with LiveBytes() as live:
        run(probe)
    return live.peak
