"""What the tests of data sources share: a recording progress, small files of every kind, the shared data."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


class RecordedTask:
    def __init__(self) -> None:
        self.done = 0

    def advance(self, count: int = 1) -> None:
        self.done += count


class RecordedProgress:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.tasks: dict[str, tuple[int | None, RecordedTask]] = {}

    @contextmanager
    def task(self, title: str, *, total: int | None = None, unit: str = "") -> Iterator[RecordedTask]:
        task = RecordedTask()
        self.tasks[title] = (total, task)
        yield task

    def note(self, text: str, **facts: Any) -> None:
        self.notes.append(text)

    def warn(self, text: str, **facts: Any) -> None:
        self.warnings.append(text)

    def record(self, event: str, **facts: Any) -> None:
        pass


@pytest.fixture
def progress() -> RecordedProgress:
    return RecordedProgress()


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """encode(pixels, format="PNG", **save options): pixels uint8 (H, W) or (H, W, 3), or a Pillow image."""

    def encode(picture: np.ndarray | Image.Image, format: str = "PNG", **options: Any) -> bytes:
        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        out = io.BytesIO()
        image.save(out, format, **options)
        return out.getvalue()

    return encode


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """picture(number, height, width, channels): uint8 (H, W) or (H, W, Ch), different for each number."""

    def picture(number: int, height: int = 6, width: int = 6, channels: int = 3) -> np.ndarray:
        rng = np.random.default_rng(number)
        shape = (height, width) if channels == 1 else (height, width, channels)
        return rng.integers(0, 256, shape, dtype=np.uint8)

    return picture


@pytest.fixture
def write_tar() -> Callable[..., Path]:
    """write_tar(path, {name: bytes}): a tar, gzipped where the name says so."""

    def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
        with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write_tar


@pytest.fixture
def write_idx() -> Callable[..., Path]:
    """write_idx(path, array): an idx file of bytes, gzipped where the name says so."""

    def write_idx(path: Path, array: np.ndarray) -> Path:
        raw = struct.pack(f">{1 + array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.tobytes()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
        return path

    return write_idx
