"""Pools on the way to worker processes: memory-mapped files, each array written once, however many pools hold it."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distill.contracts import Preprocessing
from distill.files import disk_errors
from distill.training.job import Pool, ViewLabels


class PoolPaths(NamedTuple):
    """The files of one pool."""

    images: str
    targets: str
    preprocessing: str
    views: str | None
    weights: str | None


class PoolFiles:
    """Writes pools into a folder; what was written stays until the folder is removed.

    A teacher's pool and an evaluation's share their images: they are one tensor, which is known by where it lies in
    memory. Everything written is therefore kept alive, so that nothing else can come to lie there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: dict[tuple[object, ...], str] = {}
        self._numbers = count()
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
            None if pool.views is None else self._views(pool.views),
            None if pool.weights is None else self._tensor(pool.weights),
        )

    def _views(self, views: ViewLabels) -> str:
        return self._file((id(views),), views, lambda path: self._pickle(views, path))

    def _pickle(self, value: object, path: Path) -> None:
        """Write an object whose arrays have files of their own."""
        with path.open("wb") as file:
            _Pickler(file, self._array).dump(value)

    def _array(self, values: np.ndarray) -> str:
        lies = (values.ctypes.data, values.dtype, values.shape, values.strides)
        return self._file(lies, values, lambda path: _save(path, values))

    def _tensor(self, values: Tensor) -> str:
        lies = (values.data_ptr(), values.dtype, tuple(values.shape), values.stride())

        return self._file(lies, values, lambda path: _save(path, values.numpy()))

    def _file(self, key: tuple[object, ...], content: object, write: Callable[[Path], object]) -> str:
        if key not in self._written:
            path = self.folder / f"{next(self._numbers)}"  # writing may write the arrays within, under theirs
            with disk_errors(path):
                write(path)
            self._written[key] = str(path)
            self._alive.append(content)
        return self._written[key]


def _save(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, values)


class _Pickler(pickle.Pickler):
    """Pickles an object without its arrays, which `name` gives files; labels that a set's file holds stay there."""

    def __init__(self, file: IO[bytes], name: Callable[[np.ndarray], str]) -> None:
        super().__init__(file)
        self.name = name

    def persistent_id(self, value: object) -> tuple[str, object] | None:
        if isinstance(value, np.memmap) and isinstance(value.base, mmap.mmap):  # of a file, and all of it
            return "mapped", (str(value.filename), value.offset, value.dtype.str, value.shape)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return "array", self.name(np.asarray(value))
        if isinstance(value, Tensor):
            return "tensor", self.name(value.detach().numpy())
        return None


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, known: tuple[str, Any]) -> object:
        kind, path = known
        if kind == "mapped":
            name, offset, dtype, shape = path
            return np.memmap(name, mode="r", dtype=dtype, shape=shape, offset=offset)
        values = np.load(path, mmap_mode="c")
        return torch.from_numpy(values) if kind == "tensor" else values


def load_pool(paths: PoolPaths) -> Pool:
    """A pool whose samples stay in the files until they are touched."""
    preprocessing: Preprocessing = pickle.loads(Path(paths.preprocessing).read_bytes())
    images, targets = _mapped(paths.images), _mapped(paths.targets)
    views = None
    if paths.views is not None:
        with Path(paths.views).open("rb") as file:
            views = _Unpickler(file).load()
    weights = None if paths.weights is None else _mapped(paths.weights)
    return Pool(images, targets, preprocessing, views, weights)


def _mapped(path: str) -> Tensor:
    return torch.from_numpy(np.load(path, mmap_mode="c"))
