"""Expert trajectories: the weights of networks as they train, in one memory-mapped array.

FOLDER/header.json                parameters by name and shape, epochs of the checkpoints, parts of the key
FOLDER/weights.npy                float32 (experts, checkpoints, P), readable by numpy alone
FOLDER/expert-NUMBER.SHA256       the expert's row is whole and has this checksum
FOLDER/.checked                   when rows were last compared with their checksums

A reader maps the file and touches the checkpoints it asks for: two checkpoints are 2 P numbers, where released formats
load files of ten experts for them (reference: buffers of Cazenavette et al., CVPR 2022). An expert is trained straight
into its row and counts when the row is on the disk; a killed run trains the missing ones only. More experts may be
asked for later: the array grows. One process trains at a time, others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from distill.cache.folder import describe
from distill.contracts import Progress
from distill.errors import DamagedDataError, InputError
from distill.files import disk_errors, remove_stale_partials, write_atomically, write_bytes_atomically

FORMAT = 1
HEADER, WEIGHTS = "header.json", "weights.npy"
_MARK = re.compile(r"expert-(\d{5,})\.([0-9a-f]{64})")
_CHECKED = ".checked"
_PIECE = 1 << 24  # bytes read at once for a checksum


@dataclass(frozen=True)
class Layout:
    """What a trajectory holds.

    Args:
        shapes: of the parameters, by name, in the order in which they stand in a checkpoint.
        epochs: after how many epochs each checkpoint was taken.
    """

    shapes: Mapping[str, tuple[int, ...]]
    epochs: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.Module, epochs: Sequence[int]) -> Layout:
        """The layout for a network.

        Raises:
            InputError: the network keeps running statistics, which are no parameters and would be lost.
        """
        floating = [name for name, value in module.named_buffers() if value.is_floating_point()]
        if floating:
            raise InputError(
                "the network keeps statistics beside its parameters, which a trajectory does not hold",
                found=", ".join(floating[:4]),
                allowed="networks without batch norm",
                fix="set norm: instance, or norm: none",
            )
        return cls({name: tuple(value.shape) for name, value in module.named_parameters()}, tuple(epochs))

    @property
    def parameters(self) -> int:
        """P."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def row_shape(self) -> tuple[int, int]:
        """Of an expert's row: (checkpoints, P)."""
        return len(self.epochs), self.parameters

    def views(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a checkpoint (P,), or of K of them (K, P), by name: (..., *shape)."""
        parts = vector.split([prod(shape) for shape in self.shapes.values()], dim=-1)
        return {
            name: part.reshape(*vector.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


class Trajectories:
    """Trajectories of experts, read checkpoint by checkpoint.

    Args:
        path: the array's file.
        layout: what it holds.
        experts: how many of its rows, from the first, may be read.

    Raises:
        DamagedDataError: the file is gone, or holds something else: it was replaced after the experts were finished.
    """

    def __init__(self, path: Path, layout: Layout, experts: int) -> None:
        self.path = path
        self.layout = layout
        header = _read_header(path)
        shape = (experts, *layout.row_shape)
        if header is None or not header.fits(layout) or header.shape[0] < experts:
            raise DamagedDataError(
                "the array of trajectories is not the one that was written",
                where=str(path),
                found="no such array" if header is None else f"float32 {header.shape}",
                allowed=f"float32 {shape}, or more experts",
                fix="run it again: experts that are not there are trained anew",
            )
        # Mapped as far as it is asked for: the file may have been cut behind that.
        self._weights = np.memmap(path, dtype="<f4", mode="r", offset=header.start, shape=shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, checkpoints, P)."""
        experts, checkpoints, parameters = self._weights.shape
        return experts, checkpoints, parameters

    @property
    def epochs(self) -> tuple[int, ...]:
        """After how many epochs each checkpoint was taken."""
        return self.layout.epochs

    def read(self, expert: int, checkpoint: int) -> Tensor:
        """A copy of one checkpoint, float32 (P,)."""
        return torch.from_numpy(np.array(self._weights[expert, checkpoint]))

    def after(self, expert: int, epoch: int) -> Tensor:
        """A copy of the checkpoint that was taken after `epoch` epochs, float32 (P,)."""
        return self.read(expert, self.epochs.index(epoch))


class TrajectoryFolder:
    """Where the experts of one key are written.

    Args:
        folder: made when something is written.
        layout: what each expert's row holds.
        progress: where repairs are told.
    """

    def __init__(self, folder: Path, layout: Layout, *, progress: Progress) -> None:
        self.folder = folder
        self.layout = layout
        self.progress = progress

    @property
    def path(self) -> Path:
        return self.folder / WEIGHTS

    def describe(self, parts: Mapping[str, Any]) -> None:
        """Write the header, for readers other than this program and for `distill cache`."""
        facts = {
            "format": FORMAT,
            "dtype": "float32",
            "axes": ["experts", "checkpoints", "parameters"],
            "parameters": [
                {"name": name, "shape": list(shape)} for name, shape in self.layout.shapes.items()
            ],
            "epochs": list(self.layout.epochs),
            "parts": parts,
        }
        describe(self.folder / HEADER, facts)

    def make_room(self, experts: int) -> None:
        """Let the array hold at least that many experts; rows that are there stay, unless they are of another shape."""
        shape = (experts, *self.layout.row_shape)
        header = _read_header(self.path)
        if header is None or not header.fits(self.layout):
            write_atomically(self.path, partial(_create, shape))
            return
        with disk_errors(self.path):
            if header.shape[0] < experts:
                _grow(self.path, shape)
            elif self.path.stat().st_size < header.stop:  # it was cut
                _grow(self.path, header.shape)

    def finish(self, expert: int) -> None:
        """Say that the expert's row is whole; the row is on the disk already."""
        for mark in self.folder.glob(f"expert-{expert:05d}.*"):
            mark.unlink(missing_ok=True)
        write_bytes_atomically(self.folder / f"expert-{expert:05d}.{self._sha256(expert)}", b"")

    def finished(self) -> set[int]:
        """Experts whose rows are whole. The mark of a damaged row is removed, with a warning."""
        remove_stale_partials(self.folder)
        if not self.path.exists():
            return set()
        marks = marks_in(self.folder)
        # The marks of rows written since are younger than the array; only a change without one needs a comparison.
        if self._state(marks) == _text(self.folder / _CHECKED):
            return set(marks)
        header = _read_header(self.path)
        fits = header is not None and header.fits(self.layout)
        for expert in damaged_experts(self.folder) if fits else sorted(marks):
            self.progress.warn(f"expert {expert} in {self.path} is damaged and will be trained again")
            (self.folder / f"expert-{expert:05d}.{marks.pop(expert)}").unlink(missing_ok=True)
        self.remember()
        return set(marks)

    def remember(self) -> None:
        """Note that the rows, as they are now, have their checksums."""
        with suppress(OSError):  # another user's file: rows are compared again the next time
            (self.folder / _CHECKED).write_text(self._state(marks_in(self.folder)))

    def open(self, experts: int) -> Trajectories:
        """The first `experts`, all of which must be finished."""
        return Trajectories(self.path, self.layout, experts)

    def _state(self, marks: Mapping[int, str]) -> str:
        """Changes with the array's file and with the marks."""
        facts = self.path.stat()
        told = hashlib.sha256(json.dumps(sorted(marks.items())).encode()).hexdigest()
        return f"{facts.st_size} {facts.st_mtime_ns} {told}"

    def _sha256(self, expert: int) -> str:
        header = _read_header(self.path)
        assert header is not None, "the expert was written there"
        with self.path.open("rb") as file:
            return _row_sha256(file, header, expert)


def marks_in(folder: Path) -> dict[int, str]:
    """The checksums of the finished experts, by number."""
    found = {}
    for path in sorted(folder.glob("expert-*")):
        if match := _MARK.fullmatch(path.name):
            found[int(match[1])] = match[2]
    return found


def damaged_experts(folder: Path) -> list[int]:
    """Finished experts whose rows do not have their checksums; all rows are read."""
    marks = marks_in(folder)
    header = _read_header(folder / WEIGHTS)
    if header is None:  # absent, or no array
        return sorted(marks)
    with (folder / WEIGHTS).open("rb") as file:
        return [
            expert
            for expert in sorted(marks)
            if expert >= header.shape[0] or _row_sha256(file, header, expert) != marks[expert]
        ]


def experts_held(folder: Path) -> int | None:
    """Experts that the array has room for; None where there is none."""
    header = _read_header(folder / WEIGHTS)
    return None if header is None else header.shape[0]


@dataclass(frozen=True)
class _Header:
    """Of the array's file.

    Args:
        shape: (experts, checkpoints, P).
        start: where the values begin.
    """

    shape: tuple[int, int, int]
    start: int

    def fits(self, layout: Layout) -> bool:
        """Whether its rows are those of the layout."""
        return self.shape[1:] == layout.row_shape

    @property
    def row_bytes(self) -> int:
        """Of an expert."""
        return prod(self.shape[1:]) * 4

    @property
    def stop(self) -> int:
        """Size of the whole file."""
        return self.start + self.shape[0] * self.row_bytes


def _read_header(path: Path) -> _Header | None:
    """None where there is no file, or none that holds such an array."""
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
    except (OSError, ValueError):
        return None
    if len(shape) != 3 or by_columns or dtype.str != "<f4":
        return None
    return _Header((shape[0], shape[1], shape[2]), start)


def _row_sha256(file: BinaryIO, header: _Header, expert: int) -> str:
    """sha256 (hex) of an expert's row, or of what is there of it."""
    result = hashlib.sha256()
    left = header.row_bytes
    file.seek(header.start + expert * header.row_bytes)
    while left and (piece := file.read(min(left, _PIECE))):
        result.update(piece)
        left -= len(piece)
    return result.hexdigest()


def _create(shape: tuple[int, int, int], path: Path) -> None:
    """A file of zeros, which takes no room on the disk yet."""
    np.lib.format.open_memmap(path, mode="w+", dtype="<f4", shape=shape).flush()


def _grow(path: Path, shape: tuple[int, int, int]) -> None:
    """Give the array more rows: numpy leaves room in the header for a longer first axis."""
    with path.open("r+b") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        start = file.tell()
        file.truncate(start + prod(shape) * 4)
        file.seek(0)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        assert file.tell() == start, "numpy leaves room for a longer first axis"
        file.flush()
        os.fsync(file.fileno())


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
