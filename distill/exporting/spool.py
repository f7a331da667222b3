"""Records on the disk, put in any order and got by number: what comes out of a stream can leave in another order."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import Self

import numpy as np


class Spool:
    """Up to `count` records in one file without a name, which ends with the process.

    Args:
        folder: on the disk that is to hold it.
        count: of records; they take 16 bytes of memory each.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._starts = np.zeros(count, dtype=np.int64)
        self._sizes = np.zeros(count, dtype=np.int64)
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def put(self, number: int, record: bytes) -> None:
        self._file.seek(self._end)
        self._file.write(record)
        self._starts[number], self._sizes[number] = self._end, len(record)
        self._end += len(record)

    def get(self, number: int) -> bytes:
        """The record of this number; empty where none was put."""
        self._file.seek(int(self._starts[number]))
        return self._file.read(int(self._sizes[number]))
