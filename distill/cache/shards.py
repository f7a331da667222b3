"""Rows on disk: a folder a key, a file a row range.

FOLDER/manifest.json                     parts of the key (to read, not to compare), rows, rows a shard
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
from distill.files import disk_errors, remove_stale_partials, write_bytes_atomically

SHARD_ROWS = 2048
_NAME = re.compile(r"rows-(\d+)-(\d+)\.([0-9a-f]{64})\.npy")


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
        """A copy of consecutive rows, (rows, D); limits mean what they mean for a list."""
        start, stop, step = rows.indices(len(self))
        assert step == 1, "rows are consecutive"
        out = np.empty((max(stop - start, 0), self.shape[1]), dtype=self.dtype)
        for shard in range(start // SHARD_ROWS, -(-stop // SHARD_ROWS)):
            first = shard * SHARD_ROWS
            part = self._shards[shard][max(start - first, 0) : stop - first]
            place = max(first - start, 0)
            out[place : place + len(part)] = part
        return out

    def take(self, indices: np.ndarray) -> np.ndarray:
        """A copy of the rows `indices`, int64 in [0, n), in their order: (len(indices), D)."""
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of an array of {len(self)}")
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
        text = json.dumps(
            {"rows": self.rows, "shard_rows": SHARD_ROWS, "parts": parts}, indent=1, sort_keys=True
        )
        write_bytes_atomically(path, text.encode())

    def present(self) -> dict[range, Path]:
        """Whole shards by their range. Damaged ones are removed, with a warning."""
        remove_stale_partials(self.folder)
        found: dict[range, Path] = {}
        wanted = set(self.ranges)
        for path in sorted(self.folder.glob("rows-*.npy")):
            match = _NAME.fullmatch(path.name)
            if match is None:
                continue
            span = range(int(match[1]), int(match[2]))
            if not is_whole(path, match[3]):
                self.progress.warn(f"{path} is damaged and will be computed again")
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


def is_whole(path: Path, sha256: str) -> bool:
    """Whether the file's bytes have this sha256 (hex); one that has another is removed."""
    with disk_errors(path):
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return False  # another process removed it first
        if found != sha256:
            path.unlink(missing_ok=True)
    return found == sha256
