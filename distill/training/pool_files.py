"""Pools on the way to worker processes: memory-mapped files, each array written once, however many pools hold it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.contracts import Preprocessing
from distill.files import disk_errors
from distill.training.job import Pool


class PoolPaths(NamedTuple):
    """The files of one pool."""

    images: str
    targets: str
    preprocessing: str


class PoolFiles:
    """Writes pools into a folder; what was written stays until the folder is removed.

    A teacher's pool and an evaluation's share their images: they are one tensor, which is known by where it lies in
    memory. Everything written is therefore kept alive, so that nothing else can come to lie there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[tuple[object, ...], str] = {}
        self._alive: list[object] = []

    def paths(self, pool: Pool) -> PoolPaths:
        """The pool's files, written when first asked for.

        Raises:
            InputError: the disk is full, or does not let us write.
        """
        pre = pool.preprocessing
        return PoolPaths(
            self._tensor(pool.images),
            self._tensor(pool.targets),
            self._file((id(pre),), pre, lambda path: path.write_bytes(pickle.dumps(pre))),
        )

    def _tensor(self, values: Tensor) -> str:
        lies = (values.data_ptr(), values.dtype, tuple(values.shape), values.stride())

        def write(path: Path) -> None:
            with path.open("wb") as file:
                np.save(file, values.numpy())

        return self._file(lies, values, write)

    def _file(self, key: tuple[object, ...], content: object, write: Callable[[Path], object]) -> str:
        if key not in self._written:
            path = self.folder / f"{len(self._written)}"
            with disk_errors(path):
                write(path)
            self._written[key] = str(path)
            self._alive.append(content)
        return self._written[key]


def load_pool(paths: PoolPaths) -> Pool:
    """A pool whose samples stay in the files until they are touched."""
    preprocessing: Preprocessing = pickle.loads(Path(paths.preprocessing).read_bytes())
    images, targets = (np.load(path, mmap_mode="c") for path in (paths.images, paths.targets))
    return Pool(torch.from_numpy(images), torch.from_numpy(targets), preprocessing)
