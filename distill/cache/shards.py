"""Rows on disk: a folder a key, a file a row range.

FOLDER/manifest.json                     parts of the key (to read, not to compare), rows, rows a shard
FOLDER/rows-START-STOP.SHA256.npy        float32 rows [START, STOP); the name carries the checksum of the file's bytes
FOLDER/rows-START-STOP-bad-K.SHA256.npy  the same, where K rows were not finite and are stored as zeros
FOLDER/.checked                          size and time of the shards whose checksum was once found right

A shard is written under another name and renamed, so it is either whole or absent; two processes that compute the
same shard write the same name. A killed run leaves whole shards, which the next run keeps. A shard whose bytes do
not have the checksum in its name is removed with a warning and counts as absent. Checksums cost more than reading, so
a shard is summed when it is met for the first time and again whenever its size or time of change is another than
then; `distill cache verify` sums all.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.cache.folder import describe
from distill.cache.identity import producer_version
from distill.contracts import Progress
from distill.files import disk_errors, remove_stale_partials, write_atomically

SHARD_ROWS = 2048
MANIFEST = "manifest.json"
State = Literal["whole", "damaged", "gone"]
_NAME = re.compile(r"([a-z]+)-(\d{10})-(\d{10})(?:-bad-(\d+))?\.([0-9a-f]{64})\.npy")
_CHECKED = ".checked"


@dataclass(frozen=True)
class Shard:
    """A file of rows.

    Args:
        path: where it is.
        span: which rows it holds, or sums over.
        bad: how many of them were not finite.
        sha256: of the file's bytes, hex.
    """

    path: Path
    span: range
    bad: int
    sha256: str

    @classmethod
    def of(cls, path: Path, prefix: str) -> Shard | None:
        """The shard of that file, None for a file of another name."""
        match = _NAME.fullmatch(path.name)
        if match is None or match[1] != prefix:
            return None
        return cls(path, range(int(match[2]), int(match[3])), int(match[4] or 0), match[5])


class ShardFolder:
    """The shards of one key.

    Args:
        folder: made when something is written.
        rows: N.
        progress: where repairs are told.
        prefix: first word of the files' names.
    """

    def __init__(self, folder: Path, *, rows: int, progress: Progress, prefix: str = "rows") -> None:
        self.folder = folder
        self.rows = rows
        self.progress = progress
        self.prefix = prefix

    @property
    def ranges(self) -> list[range]:
        """The row range of every shard."""
        return shard_ranges(self.rows)

    def describe(self, parts: Mapping[str, Any]) -> None:
        """Write the manifest; where it is there, note that it was used now."""
        facts = {
            "parts": parts,
            "producer": producer_version(str(parts["kind"])),
            "rows": self.rows,
            "shard_rows": SHARD_ROWS,
        }
        describe(self.folder / MANIFEST, facts)

    def present(self) -> dict[range, Shard]:
        """Whole shards by their range. Damaged ones are removed, with a warning."""
        remove_stale_partials(self.folder)
        checked = _Checked(self.folder / _CHECKED)
        found: dict[range, Shard] = {}
        with disk_errors(self.folder):
            entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        for entry in entries:
            shard = Shard.of(Path(entry.path), self.prefix)
            if shard is None:
                continue
            if entry not in checked:
                state = state_of(shard.path, shard.sha256)
                if state == "damaged":
                    with disk_errors(shard.path):
                        shard.path.unlink(missing_ok=True)
                    self.progress.warn(f"{shard.path} is damaged and will be computed again")
                if state != "whole":
                    continue
                checked.add(shard.path)
            found[shard.span] = shard
        return found

    def write(self, span: range, values: np.ndarray, *, bad: int = 0) -> Shard:
        """Store the rows `span` (len(span), D), `bad` of which were not finite."""
        parts = _npy(values)
        sha256 = _sha256_of(parts)
        told = f"-bad-{bad}" if bad else ""
        path = self.folder / f"{self.prefix}-{span.start:010d}-{span.stop:010d}{told}.{sha256}.npy"
        write_atomically(path, partial(_write_parts, parts))
        _Checked(self.folder / _CHECKED).add(path)
        return Shard(path, span, bad, sha256)

    def remove_sums_before(self, stop: int) -> None:
        """Remove running sums of fewer samples than the first `stop`, which others now hold."""
        for path in self.folder.glob(f"{self.prefix}-*.npy"):
            shard = Shard.of(path, self.prefix)
            if shard is not None and shard.span.stop < stop:
                with disk_errors(path):
                    path.unlink(missing_ok=True)


def shard_ranges(rows: int) -> list[range]:
    """The row ranges of the shards of an array of that many rows."""
    return [range(start, min(start + SHARD_ROWS, rows)) for start in range(0, rows, SHARD_ROWS)]


class _Checked:
    """Names of the shards that were found whole and have not changed since; lines `NAME SIZE TIME_NS`.

    Only ever appended to, a short line a write, so that processes do not disturb each other; a torn or missing line
    costs one more checksum.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.lines = set(path.read_text(errors="replace").splitlines())
        except OSError:
            self.lines = set()

    def __contains__(self, entry: os.DirEntry[str]) -> bool:
        with suppress(FileNotFoundError):
            return _line(entry.name, entry.stat()) in self.lines
        return False

    def add(self, path: Path) -> None:
        with suppress(OSError):  # another user's file: their next look sums the shard again
            line = _line(path.name, path.stat())
            with self.path.open("a") as file:
                file.write(f"{line}\n")


def _npy(values: np.ndarray) -> tuple[memoryview, memoryview]:
    """What `numpy.save` writes: the head, and the values without a copy of them."""
    whole = np.ascontiguousarray(values)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(whole))
    return head.getbuffer(), whole.reshape(-1).view(np.uint8).data


def _sha256_of(parts: Iterable[memoryview]) -> str:
    result = hashlib.sha256()
    for part in parts:
        result.update(part)
    return result.hexdigest()


def _write_parts(parts: Iterable[memoryview], path: Path) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.write(part)


def _line(name: str, facts: os.stat_result) -> str:
    return f"{name} {facts.st_size} {facts.st_mtime_ns}"


def state_of(path: Path, sha256: str) -> State:
    """Whether the file's bytes have this sha256 (hex); `gone` where another process removed or replaced it."""
    with disk_errors(path):
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return "gone"
    return "whole" if found == sha256 else "damaged"


def count_bad(shards: Iterable[Shard]) -> int:
    """Rows of these shards that were not finite."""
    return sum(shard.bad for shard in shards)
