"""Where shards are kept while a run reads them: on the device, in host memory, and always on disk.

Every shard is on disk before it is in a tier, so a tier only ever forgets. A shard that is read goes to the device
while `device_bytes` last, then to the host while `host_bytes` last. What must make room is a shard of the array that
was not used for the longest time: from the device to the host, from the host to nowhere. Shards of one array never
push out each other: a scan of an array larger than a tier would otherwise find nothing of it again the next time.

On a GPU the host tier is pinned memory, which copies to the device while kernels run. On a CPU the host tier is the
file itself, mapped into memory, of which the operating system keeps pages as it has room; the device's tier is empty.
"""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Of the memory that is free when the cache opens. The rest is for networks, batches and other programs.
DEVICE_SHARE = 0.25
HOST_SHARE = 0.25


@dataclass
class _Kept:
    values: Tensor
    version: int  # of the tensor when it was kept: rows must not be changed in place


class Level:
    """One tier: tensors by file, within a number of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        # array (its folder) -> shard (its file) -> values; the array used last stands last
        self.arrays: OrderedDict[Path, dict[Path, _Kept]] = OrderedDict()

    def get(self, path: Path) -> Tensor | None:
        kept = self.arrays.get(path.parent, {}).get(path)
        if kept is None:
            return None
        assert kept.values._version == kept.version, f"cached rows were changed in place: {path}"
        self.arrays.move_to_end(path.parent)
        return kept.values

    def add(self, path: Path, values: Tensor) -> None:
        self.arrays.setdefault(path.parent, {})[path] = _Kept(values, values._version)
        self.arrays.move_to_end(path.parent)
        self.bytes += values.nbytes

    def remove(self, path: Path) -> Tensor:
        shards = self.arrays[path.parent]
        values = shards.pop(path).values
        if not shards:
            del self.arrays[path.parent]
        self.bytes -= values.nbytes
        return values

    def has_room(self, size: int, *, beside: Path) -> bool:
        """Whether `size` bytes fit once other arrays than `beside` have made room."""
        own = sum(kept.values.nbytes for kept in self.arrays.get(beside, {}).values())
        return own + size <= self.limit

    def make_room(self, size: int, *, beside: Path) -> Iterator[tuple[Path, Tensor]]:
        """Remove shards of the arrays least recently used until `size` bytes fit."""
        while self.bytes + size > self.limit:
            oldest = next(array for array in self.arrays if array != beside)
            path = next(reversed(self.arrays[oldest]))
            yield path, self.remove(path)


class Tiers:
    """Shards in memory, by file.

    Args:
        device: where rows are wanted.
        device_bytes: of it, for shards.
        host_bytes: of host memory, for shards.
    """

    def __init__(self, device: torch.device, *, device_bytes: int, host_bytes: int) -> None:
        self.device = device
        self.on_device = Level(device_bytes)
        self.on_host = Level(host_bytes)
        self._lock = threading.Lock()  # readers ahead of their consumer run in a thread

    def get(self, path: Path) -> Tensor:
        """The shard of that file, (rows, D), on the device or the host. Not to be changed in place."""
        with self._lock:
            for level in (self.on_device, self.on_host):
                values = level.get(path)
                if values is not None:
                    return values
        values = map_file(path)
        with self._lock:
            return self._keep(path, values)

    def put(self, path: Path, values: Tensor) -> None:
        """Keep the values (rows, D) that were just written to `path`."""
        with self._lock:
            self._keep(path, values)

    def _keep(self, path: Path, values: Tensor) -> Tensor:
        """Put the shard into the highest tier that has room; returns what is kept, or the values themselves."""
        if path in self.on_device.arrays.get(path.parent, {}) or path in self.on_host.arrays.get(
            path.parent, {}
        ):
            return values  # another thread was first
        if self.on_device.has_room(values.nbytes, beside=path.parent):
            for old, old_values in self.on_device.make_room(values.nbytes, beside=path.parent):
                self._keep_on_host(old, old_values)
            values = values.to(self.device)
            self.on_device.add(path, values)
            return values
        return self._keep_on_host(path, values)

    def _keep_on_host(self, path: Path, values: Tensor) -> Tensor:
        if not self.on_host.has_room(values.nbytes, beside=path.parent):
            return values
        for _ in self.on_host.make_room(values.nbytes, beside=path.parent):
            pass  # it is on disk
        if self.device.type == "cuda":
            values = values.cpu().pin_memory()
        self.on_host.add(path, values)
        return values


def map_file(path: Path) -> Tensor:
    """A shard's file mapped into memory, (rows, D); changes of the tensor would not reach the file.

    No file stays open, unlike with `mmap` and `numpy.memmap`: a process may hold far more mappings than open files.
    """
    with path.open("rb") as file:
        shape, dtype, start = _read_header(file.read(_HEAD))
    skipped = start // dtype.itemsize
    whole = torch.from_file(str(path), shared=False, size=skipped + prod(shape), dtype=dtype)
    return whole[skipped:].view(shape)


@lru_cache(maxsize=64)
def _read_header(head: bytes) -> tuple[tuple[int, ...], torch.dtype, int]:
    """Shape, type and place of the values, from the first bytes of an .npy file; shards share them but for the last."""
    file = io.BytesIO(head)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return shape, _TORCH[dtype.str], file.tell()


# What numpy writes before the values of a two-dimensional array.
_HEAD = 128
_TORCH = {"<f4": torch.float32, "<f8": torch.float64}


def read_ahead(path: Path) -> None:
    """Ask the operating system to have the file's pages in memory soon."""
    if not hasattr(os, "posix_fadvise"):
        return
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def free_device_bytes(device: torch.device) -> int:
    """Free memory of a GPU; 0 on a CPU, whose memory is the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def free_host_bytes() -> int:
    """Memory that this process can have without swapping: of the machine, and of what its container or job may take."""
    return min([_free_on_machine(), *_free_in_groups()])


def _free_on_machine() -> int:
    with suppress(OSError, StopIteration, ValueError):
        lines = (_PROC / "meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 4 << 30


def _free_in_groups() -> Iterator[int]:
    """What is free in each control group of the process that limits memory (kernel docs: cgroup-v1, cgroup-v2)."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return  # no Linux
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if not controllers:
            yield from _free_above(_GROUPS, group, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _free_above(_GROUPS / "memory", group, *names)


def _free_above(root: Path, group: str, limit: str, used: str, idle: str) -> Iterator[int]:
    """What is free in a group and in those that hold it; a container sees its own group as the root."""
    inner = root / group.lstrip("/")
    for folder in (inner, *inner.parents):
        with suppress(OSError, ValueError, KeyError):  # not seen from here, or "max": no limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            taken = int((folder / used).read_text()) - int(
                stat[idle]
            )  # pages of files, such as ours, give way
            yield max(int((folder / limit).read_text()) - taken, 0)
        if folder == root:
            return


_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
