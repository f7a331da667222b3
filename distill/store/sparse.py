"""A file in memory of which only the blocks that were written take room.

HDF5 does not survive a failed write: after a full disk it keeps blocks that cannot be written and crashes the process
as it ends. So it writes here, and never fails; large arrays, for which it only reserves room, go to the disk from where
they are.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

_BLOCK = 1 << 16  # bytes
_PIECE = 16 << 20  # bytes of an array that are written at once


class SparseFile(io.RawIOBase):
    """A readable, writable, seekable file; what was never written reads as zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, bytearray] = {}
        self._place = 0
        self._size = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def truncate(self, size: int | None = None) -> int:
        self._size = self._place if size is None else size
        return self._size

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._place))
        for start, block, within, length in _parts(self._place, count):
            held = self._blocks.get(block)
            view[start : start + length] = bytes(length) if held is None else held[within : within + length]
        self._place += count
        return count

    def write(self, data: memoryview) -> int:  # type: ignore[override]
        view = memoryview(data).cast("B")
        for start, block, within, length in _parts(self._place, len(view)):
            held = self._blocks.setdefault(block, bytearray(_BLOCK))
            held[within : within + length] = view[start : start + length]
        self._place += len(view)
        self._size = max(self._size, self._place)
        return len(view)

    def copy_to(self, path: Path, pieces: list[tuple[int, np.ndarray]]) -> None:
        """Write the file to the disk, with arrays at the places that were reserved for them.

        Args:
            path: of a new file.
            pieces: offset (bytes) and array of each.
        """
        with path.open("wb") as file:
            for number in sorted(self._blocks):
                file.seek(number * _BLOCK)
                file.write(self._blocks[number])
            for offset, array in pieces:
                file.seek(offset)
                rows = max(1, _PIECE * len(array) // array.nbytes)
                for start in range(0, len(array), rows):
                    file.write(np.ascontiguousarray(array[start : start + rows]).data)
            file.truncate(self._size)


def _parts(place: int, count: int) -> list[tuple[int, int, int, int]]:
    """The blocks of `count` bytes at `place`: from which byte of them, the block, the place in it, how many."""
    found, done = [], 0
    while done < count:
        block, within = divmod(place + done, _BLOCK)
        length = min(_BLOCK - within, count - done)
        found.append((done, block, within, length))
        done += length
    return found
