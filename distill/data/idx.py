"""MNIST's file format: a magic number, the sizes, then bytes; gzipped or not.

Images: magic 0x00000803, then N, H, W as big-endian uint32, then N*H*W bytes. Labels: magic 0x00000801, N, N
bytes.
Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", section "file formats"."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill.contracts import Progress
from distill.data.base import Data, DataConfig, Plan, existing
from distill.data.build import Found, PixelRows
from distill.data.files import damage_named, opened, refuse_disproportion
from distill.errors import DamagedDataError, InputError
from distill.machine_paths import MachinePath

_UBYTE = 0x08
_STANDARD = {"train": "train", "test": "t10k"}

FilePair = Annotated[list[Annotated[str, MachinePath()]], Field(min_length=2, max_length=2)]


class IdxConfig(DataConfig):
    """Options of `idx`. Either a folder with the four files of MNIST, or two pairs of files.

    Args:
        folder: holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte, each with or without .gz; `.idx3-ubyte` for `-idx3-ubyte` serves too.
        train, test: [images, labels], in place of the standard names; relative to `folder` where given.
        class_names: null numbers them.
    """

    name: Literal["idx"] = "idx"
    folder: Annotated[str, MachinePath()] | None = None
    train: FilePair | None = None
    test: FilePair | None = None
    class_names: Annotated[list[str], Field(min_length=1)] | None = None


class Idx(Data):
    """MNIST's file format, gzipped or not."""

    name = "idx"
    Config = IdxConfig

    def find(self, progress: Progress) -> Found:
        names = self.config.class_names
        return Found(_rows(*self._pair("train")), _rows(*self._pair("test")), tuple(names) if names else None)

    def peek(self) -> Plan:
        (train, height, width), (test, *_) = (
            read_sizes(self._pair(split)[0], 3) for split in ("train", "test")
        )
        names = self.config.class_names
        classes = len(names) if names else int(read_idx(self._pair("train")[1], 1).max()) + 1
        return Plan(classes, (1, height, width), train, test)

    def _pair(self, split: Literal["train", "test"]) -> tuple[Path, Path]:
        config: IdxConfig = self.config
        explicit = config.train if split == "train" else config.test
        if config.folder is None and explicit is None:
            raise InputError(
                f"nothing says where the {split} files are",
                where="data.folder",
                fix=f"set data.folder, or data.{split}: [IMAGES, LABELS]",
            )
        base = existing(config.folder, option="folder", folder=True) if config.folder is not None else Path()
        if explicit is not None:
            images, labels = (
                existing(str(base / Path(name).expanduser()), option=split) for name in explicit
            )
            return images, labels
        return _standard(base, split, "images-idx3"), _standard(base, split, "labels-idx1")


def _standard(folder: Path, split: str, kind: str) -> Path:
    """The file of a standard name in whichever spelling is there."""
    stem = f"{_STANDARD[split]}-{kind}-ubyte"
    spellings = [stem, stem.replace("-idx", ".idx")]
    names = [name + suffix for name in spellings for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise InputError("a file is missing", where=str(folder), allowed=", ".join(names))


def _rows(images: Path, labels: Path) -> PixelRows:
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise DamagedDataError(
            "images and labels differ in number",
            where=str(labels),
            found=f"{len(numbers)} labels for {len(pixels)} images",
        )
    return PixelRows(numbers.to(torch.int64), str(images), pixels[:, None])


def read_sizes(path: Path, dimensions: int) -> tuple[int, ...]:
    """The sizes that an idx file of bytes declares; DamagedDataError where it is no such file."""
    with damage_named(path), opened(path) as stream:
        return _header(stream.read(4 + 4 * dimensions), dimensions, path)


def read_idx(path: Path, dimensions: int) -> Tensor:
    """All bytes of an idx file: uint8 of its sizes. DamagedDataError where it is too short or too long."""
    with damage_named(path), opened(path) as stream:
        sizes = _header(stream.read(4 + 4 * dimensions), dimensions, path)
        refuse_disproportion(math.prod(sizes), path.stat().st_size, where=str(path))
        data = np.empty(sizes, dtype=np.uint8)
        view = data.reshape(-1).data
        filled = 0
        while filled < len(view):
            count = stream.readinto(view[filled : filled + 2**20])  # type: ignore[attr-defined]
            if not count:
                raise EOFError(f"{filled} bytes of data where the header promises {len(view)}")
            filled += count
        if stream.read(1):
            raise ValueError(f"more bytes than the {len(view)} that the header promises")
    return torch.from_numpy(data)


def _header(raw: bytes, dimensions: int, path: Path) -> tuple[int, ...]:
    if len(raw) < 4 + 4 * dimensions:
        raise EOFError("the header is incomplete")
    magic, *sizes = struct.unpack(f">{1 + dimensions}I", raw)
    if magic != (_UBYTE << 8 | dimensions):
        raise DamagedDataError(
            "this is not an idx file of the kind expected",
            where=str(path),
            found=f"magic 0x{magic:08x}",
            allowed=f"0x{_UBYTE << 8 | dimensions:08x}: bytes in {dimensions} dimensions",
        )
    return tuple(sizes)
