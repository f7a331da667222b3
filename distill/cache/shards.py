"""Rows on disk: a folder a key, a file a row range.

FOLDER/manifest.json                     parts of the key (to read, not to compare), shape, dtype, rows a shard
FOLDER/rows-START-STOP.SHA256.npy        rows [START, STOP), the name carries the checksum of the file's bytes

A shard is written under another name and renamed, so it is either whole or absent; two processes that compute the
same shard write the same name. A killed run leaves whole shards, which the next run keeps. A shard whose bytes do
not have the checksum in its name is removed with a warning and counts as absent.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from distill.contracts import Progress
from distill.files import disk_errors, write_bytes_atomically

SHARD_ROWS = 2048
_NAME = re.compile(r"rows-(\d+)-(\d+)\.([0-9a-f]{64})\.npy")
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class Rows:
    """An (n, D) array in shards, read by blocks; `n` is bounded by the disk, not by memory.

    Args:
        files: the shards in order.
        shape: (n, D).
        dtype: of the values.
    """

    files: tuple[Path, ...]
    shape: tuple[int, int]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @cached_property
    def _shards(self) -> list[np.ndarray]:
        return [np.load(path, mmap_mode="r", allow_pickle=False) for path in self.files]

    def blocks(self, size: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Consecutive row ranges of at most `size` rows and copies of their values, float (size, D)."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self.read(rows)

    def read(self, rows: slice) -> np.ndarray:
        """A copy of the rows [rows.start, rows.stop), (rows, D)."""
        first = rows.start // SHARD_ROWS
        last = (rows.stop - 1) // SHARD_ROWS
        parts = [
            self._shards[shard][
                max(rows.start - shard * SHARD_ROWS, 0) : min(rows.stop - shard * SHARD_ROWS, SHARD_ROWS)
            ]
            for shard in range(first, last + 1)
        ]
        return np.concatenate(parts) if len(parts) > 1 else np.array(parts[0])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """A copy of the rows `indices`, in their order, (len(indices), D)."""
        out = np.empty((len(indices), self.shape[1]), dtype=self.dtype)
        shard_of = indices // SHARD_ROWS
        for shard in np.unique(shard_of):
            places = np.flatnonzero(shard_of == shard)
            out[places] = self._shards[shard][indices[places] - shard * SHARD_ROWS]
        return out


class ShardFolder:
    """The shards of one key."""

    def __init__(self, folder: Path, *, rows: int, progress: Progress) -> None:
        self.folder = folder
        self.rows = rows
        self.progress = progress

    @property
    def ranges(self) -> list[range]:
        """The row range of every shard."""
        return [range(start, min(start + SHARD_ROWS, self.rows)) for start in range(0, self.rows, SHARD_ROWS)]

    def describe(self, parts: Mapping[str, Any]) -> None:
        """Write the manifest, for people and for `distill cache`."""
        path = self.folder / "manifest.json"
        if path.exists():
            return
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"rows": self.rows, "shard_rows": SHARD_ROWS, "parts": parts}, indent=1, sort_keys=True)
        write_bytes_atomically(path, text.encode())

    def present(self) -> dict[range, Path]:
        """Whole shards by their range. Damaged ones are removed, with a warning."""
        found: dict[range, Path] = {}
        wanted = set(self.ranges)
        for path in sorted(self.folder.glob("rows-*.npy")) if self.folder.is_dir() else []:
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            span = range(int(match[1]), int(match[2]))
            if file_sha256(path) != match[3]:
                self.progress.warn(f"{path} is damaged and will be computed again")
                path.unlink(missing_ok=True)
            elif span in wanted:
                found[span] = path
        return found

    def write(self, span: range, values: np.ndarray) -> Path:
        """Store the rows `span` (len(span), D); returns the shard's path."""
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values), allow_pickle=False)
        data = buffer.getbuffer()
        checksum = hashlib.sha256(data).hexdigest()
        final = self.folder / f"rows-{span.start:010d}-{span.stop:010d}.{checksum}.npy"
        write_bytes_atomically(final, data)
        return final

    def open(self, shards: Mapping[range, Path]) -> Rows:
        """The array of all shards, every range of which must be there."""
        files = tuple(shards[span] for span in self.ranges)
        first = np.load(files[0], mmap_mode="r", allow_pickle=False)
        return Rows(files, (self.rows, first.shape[1]), first.dtype)


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()
