"""Arrays as they lie in npz, npy and HDF5 files, read block by block; the files are taken to be hostile.

Nothing is unpickled. HDF5 is reached through hard links alone, one path component at a time (a link on the
way can leave the file), and a dataset may not keep its bytes elsewhere, use filters that would load a
plug-in, or hold anything but plain numbers."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import h5py
import numpy as np

from distill.data.files import damage_named, refuse_disproportion
from distill.data.rows import blocks
from distill.errors import DamagedDataError, InputError, UnsafeFileError

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")
# deflate, shuffle, fletcher32 of HDF5 itself, lzf of h5py: all are compiled in.
_FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 32000: "lzf"}
_COMPRESSIONS = frozenset((1, 32000))
# HDF5 unpacks a chunk whole, however few of its rows are asked for: twice the bytes of a block of rows.
MAX_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """An array in a file.

    Args:
        where: file and name, as messages show it.
        read: rows of a slice; slices must be consecutive, from row 0 on.
    """

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    read: Callable[[slice], np.ndarray]

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All rows in blocks of about 32 MiB."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        for block in blocks(self.shape[0], row_bytes):
            yield block, self.read(block)


def has_array(path: Path, name: str) -> bool:
    """Whether the file or folder holds an array of this name."""
    if path.is_dir():
        return (path / f"{name}.npy").is_file()
    with damage_named(path):
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                return f"{name}.npy" in archive.namelist()
        with h5py.File(path, "r") as file:
            return _walk(file, name, path) is not None


@contextmanager
def open_array(path: Path, name: str) -> Iterator[Stored]:
    """An array of an .npz file, an HDF5 file, or a folder of .npy files.

    Raises:
        InputError: no such array, or a file of another kind.
        DamagedDataError: truncated, or a wrong checksum.
        UnsafeFileError: objects, links that leave the file, sizes out of proportion.
    """
    if path.is_dir():
        with damage_named(path / f"{name}.npy"):
            yield _open_npy(path / f"{name}.npy")
    elif path.suffix == ".npz":
        with damage_named(path), zipfile.ZipFile(path) as archive:
            yield _open_npz(archive, path, name)
    elif path.suffix in HDF5_SUFFIXES:
        with damage_named(path), h5py.File(path, "r") as file:
            yield _open_hdf5(file, path, name)
    else:
        raise InputError(
            "not a file of arrays",
            where="data.path",
            found=str(path),
            allowed=f"an .npz file, {' or '.join(HDF5_SUFFIXES)}, or a folder of .npy files",
        )


def _missing(name: str, where: str, there: list[str]) -> InputError:
    return InputError(
        f"there is no array {name!r}",
        where=where,
        allowed=", ".join(sorted(there)) or "nothing: the file is empty",
        fix="name the arrays with data.x_train, data.y_train, data.x_test and data.y_test",
    )


def _open_npy(path: Path) -> Stored:
    if not path.is_file():
        raise _missing(path.stem, str(path.parent), [file.stem for file in path.parent.glob("*.npy")])
    with path.open("rb") as stream:
        shape, _, dtype = _npy_header(stream, str(path))
        stored = path.stat().st_size - stream.tell()
    _check_size(shape, dtype, stored, str(path))
    mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    return Stored(str(path), shape, dtype, mapped.__getitem__)


def _open_npz(archive: zipfile.ZipFile, path: Path, name: str) -> Stored:
    where = f"{path}, array {name}"
    members = {info.filename: info for info in archive.infolist()}
    info = members.get(f"{name}.npy")
    if info is None:
        raise _missing(name, str(path), [member.removesuffix(".npy") for member in members])
    refuse_disproportion(info.file_size, info.compress_size, where=where)
    stream = archive.open(info)
    shape, fortran, dtype = _npy_header(stream, where)
    _check_size(shape, dtype, info.file_size - stream.tell(), where)
    if fortran and len(shape) > 1:  # rows are not consecutive bytes
        whole = np.lib.format.read_array(archive.open(info), allow_pickle=False)
        return Stored(where, shape, dtype, whole.__getitem__)
    return Stored(where, shape, dtype, lambda block: _next_rows(stream, block, shape, dtype))


def _next_rows(stream: IO[bytes], block: slice, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    rows = block.stop - block.start
    raw = stream.read(rows * math.prod(shape[1:]) * dtype.itemsize)
    if block.stop == shape[0]:
        stream.read(1)  # zipfile compares the checksum at the end
    return np.frombuffer(raw, dtype=dtype).reshape(rows, *shape[1:])


def _npy_header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, fortran, dtype = read(stream)
    except (TokenError, SyntaxError, TypeError, MemoryError) as error:  # the header is parsed as Python text
        raise ValueError(f"the header is damaged: {error}") from error
    if dtype.hasobject:
        raise UnsafeFileError(
            "the array holds pickled Python objects; they are never loaded",
            where=where,
            fix="save it as a plain array of numbers",
        )
    return shape, fortran, dtype


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], stored: int, where: str) -> None:
    declared = math.prod(shape) * dtype.itemsize
    if declared != stored:
        raise DamagedDataError(
            "the array is truncated or damaged",
            where=where,
            found=f"{stored} bytes of data",
            allowed=f"{declared} bytes, by its header",
        )


def _open_hdf5(file: h5py.File, path: Path, name: str) -> Stored:
    where = f"{path}, dataset {name}"
    node = _walk(file, name, path)
    if not isinstance(node, h5py.Dataset):
        raise _missing(name, str(path), list(map(str, file)))
    _check_dataset(node, where)
    declared = math.prod(node.shape) * node.dtype.itemsize
    refuse_disproportion(declared, node.id.get_storage_size(), where=where)
    return Stored(where, node.shape, node.dtype, node.__getitem__)


def _walk(file: h5py.File, name: str, path: Path) -> h5py.Group | h5py.Dataset | None:
    """The object of this name; None where there is none."""
    node = file
    for part in name.strip("/").split("/"):
        if not isinstance(node, h5py.Group) or part in ("", ".", ".."):
            return None
        try:
            link = node.get(part, getlink=True)
        except (KeyError, TypeError):  # absent, or a link of a kind that h5py does not know
            return None
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise UnsafeFileError(
                "the file reaches its data through a link",
                where=f"{path}, {part} in {node.name}",
                found=type(link).__name__,
                allowed="datasets stored in the file itself",
            )
        node = _child(node, part)
    return node


def _child(group: h5py.Group, name: str) -> h5py.Group | h5py.Dataset:
    try:
        return group[name]
    except KeyError as error:  # the link is there, so this is h5py's word for a damaged object
        raise OSError(str(error)) from error


def _check_dataset(dataset: h5py.Dataset, where: str) -> None:
    properties = dataset.id.get_create_plist()
    if properties.get_external_count() or dataset.is_virtual:
        raise UnsafeFileError("the dataset keeps its data in other files", where=where)
    codes = [properties.get_filter(index)[0] for index in range(properties.get_nfilters())]
    foreign = [str(code) for code in codes if code not in _FILTERS]
    if foreign:
        raise UnsafeFileError(
            "the dataset uses a foreign filter",
            where=where,
            found=f"filter {', '.join(foreign)}",
            allowed=", ".join(_FILTERS.values()),
        )
    if sum(code in _COMPRESSIONS for code in codes) > 1:  # ratios multiply: 1000 to 1 becomes a million to 1
        raise UnsafeFileError("the dataset is compressed more than once", where=where)
    if dataset.id.get_type().get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) or dataset.shape is None:
        raise UnsafeFileError("the dataset does not hold plain numbers", where=where)
    if dataset.chunks is not None:
        _check_chunks(dataset, math.prod(dataset.chunks) * dataset.dtype.itemsize, where)


def _check_chunks(dataset: h5py.Dataset, chunk_bytes: int, where: str) -> None:
    """Refuse chunks that take more memory than a block of rows is worth.

    A chunk may be larger than its dataset, which is usual where rows are appended; `MAX_CHUNK_BYTES` bounds it.
    HDF5 inflates a chunk's gzip stream to its end, whatever the chunk's size, so that is bounded as well.
    """
    if chunk_bytes > MAX_CHUNK_BYTES:
        raise UnsafeFileError(
            "the dataset is stored in chunks that are too large to unpack",
            where=where,
            found=f"{chunk_bytes} bytes, chunks of {dataset.chunks}",
            allowed=f"{MAX_CHUNK_BYTES} bytes a chunk",
            fix="write the file again with smaller chunks, for example with h5py's chunks=True",
        )
    largest = 0

    def compare(chunk: Any) -> None:
        nonlocal largest
        largest = max(largest, chunk.size)

    dataset.id.chunk_iter(compare)
    # HDF5's own bound on what gzip adds to noise, and room for checksums.
    most = chunk_bytes + chunk_bytes // 1000 + 1024
    if largest > most:
        raise UnsafeFileError(
            "a chunk holds more than it declares",
            where=where,
            found=f"{largest} bytes",
            allowed=f"{most} bytes for a chunk of {chunk_bytes}",
        )
