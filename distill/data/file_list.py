"""Where the images of a folder lie, in a few bytes more than their names: there may be tens of millions."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from pathlib import Path


class FileList:
    """Files below one folder, in the order in which they were added.

    A `Path` a file would take several times the length of its name, so the names are joined in one buffer.

    Args:
        root: the folder above all of them.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names = bytearray()
        self._ends = array("q")  # where each name ends in `_names`, in bytes

    def extend(self, names: Iterable[str]) -> None:
        """Add files by their paths relative to the root, with `/` between folders."""
        for name in names:
            self._names += os.fsencode(name)  # keeps names that are no text in the file system's encoding
            self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> Path:
        """The path of the row-th file; rows count from 0 and never from the end."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} files")
        start = self._ends[row - 1] if row else 0
        return self._root / os.fsdecode(bytes(self._names[start : self._ends[row]]))
