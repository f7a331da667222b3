"""A set's file, opened with distrust: what may harm the reader is refused before anything is read.

HDF5 can point to other files (external and soft links, external storage, virtual datasets), declare arrays
far larger than the file, load filter plugins from a folder, and hold types that allocate as they are read. So
the tree is walked by format 1's own names, one link at a time; hard links alone are followed, each to an
object not seen before; and type, layout, filters, shape, size and chunks of every dataset are checked on the
low-level handle, before h5py's convenient one exists. This file imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import h5py
import numpy as np

from distill.errors import DamagedDataError, InputError, MemoryExhaustedError, UnsafeFileError
from distill.store import format as fmt

_T = TypeVar("_T")

# Verification reads this much of an array at once.
_SLICE_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredArray:
    """A dataset of the file, checked and not yet read.

    Args:
        name: path in the file, such as `labels/hard`.
        shape, dtype: of the array.
        stored_bytes: bytes of its chunks in the file.
        sha256: the digest that the file claims, see `format.digest`.
        offset: where it begins in the file, None where it lies in chunks.
        dataset: h5py's handle; valid while the archive is open.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stored_bytes: int
    sha256: str
    dataset: h5py.Dataset = field(repr=False)
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def slices(self) -> Iterator[np.ndarray]:
        """The array in pieces along its first axis, whole chunks at a time."""
        if self.offset is not None:
            step = max(1, _SLICE_BYTES * self.shape[0] // self.nbytes)
            for start in range(0, self.shape[0], step):
                yield self.dataset[start : start + step]
            return
        chunk = self.dataset.chunks[0]
        chunk_bytes = max(1, chunk * self.nbytes // self.shape[0])
        step = chunk * max(1, _SLICE_BYTES // chunk_bytes)
        for start in range(0, self.shape[0], step):
            yield self.dataset[start : start + step]


@dataclass(frozen=True)
class Archive:
    """An open set whose structure is sound; its contents are as sound as `verify` found them.

    Args:
        path: the file.
        file_bytes: its size.
        arrays: its datasets by name.
        content_sha256: the digest of the whole set, see `format.content_digest`.
    """

    path: Path
    file_bytes: int
    arrays: dict[str, StoredArray]
    content_sha256: str

    def read(self, name: str, *, verify: bool) -> np.ndarray:
        """The array `name`; with `verify`, compared with its sha256. One that lies in one piece is mapped, not read.

        Raises:
            DamagedDataError: it cannot be read, or its sha256 differs.
            MemoryExhaustedError: it does not fit the host's memory.
        """
        array = self.arrays[name]
        if array.offset is not None:
            if verify:
                self.verify(name)
            return np.memmap(self.path, mode="r", dtype=array.dtype, shape=array.shape, offset=array.offset)
        try:
            with _damage(self.path, name):
                values: np.ndarray = array.dataset[...]
        except MemoryError as error:
            raise MemoryExhaustedError(
                "an array does not fit memory", where=_place(self.path, name), found=f"{array.nbytes} bytes"
            ) from error
        if verify:
            self._compare(array, fmt.digest(array.dtype, array.shape, [values]))
        return values

    def verify(self, name: str) -> None:
        """Compare the array `name` with its sha256, in slices; raises DamagedDataError."""
        array = self.arrays[name]
        with _damage(self.path, name):
            found = fmt.digest(array.dtype, array.shape, array.slices())
        self._compare(array, found)

    def document(self, name: str, kind: type[_T], *, verify: bool) -> _T:
        """The value of a text dataset, which must be of type `kind`; errors as in `read`."""
        with _damage(self.path, name):
            value = fmt.decode_json(self.read(name, verify=verify))
        if not isinstance(value, kind):
            raise DamagedDataError(
                "the text does not hold what belongs here",
                where=_place(self.path, name),
                found=type(value).__name__,
                allowed=kind.__name__,
            )
        return value

    def _compare(self, array: StoredArray, found: str) -> None:
        if found != array.sha256:
            raise DamagedDataError(
                "the data do not match their sha256",
                where=_place(self.path, array.name),
                found=found,
                allowed=array.sha256,
                fix="fetch or make the set again",
            )


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a set and check its structure; nothing but attributes is read.

    Raises:
        InputError: no such file, or it may not be read.
        DamagedDataError: no HDF5 file, truncated, unfinished, incomplete, or of another format version.
        UnsafeFileError: the file uses a feature of HDF5 that no set needs and that could do harm.
    """
    _check_readable(path)
    file = _open(path)
    try:
        with _damage(path):
            archive = _inspect(path, file)
        yield archive
    finally:
        with _damage(path):
            file.close()


def _check_readable(path: Path) -> None:
    """A plain look before HDF5's: its own messages do not tell a missing file from a damaged one."""
    if path.exists() and not path.is_file():
        raise InputError("is no file", where=str(path), allowed="the set.h5 of a run")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(
            f"cannot be read: {error.strerror}", where=str(path), fix="check the path"
        ) from error


def _open(path: Path) -> h5py.File:
    try:
        # Sets are never changed in place, so no lock is needed; read-only and network disks refuse locks.
        return h5py.File(path, "r", locking=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise DamagedDataError(
            "is no HDF5 file, or a truncated one",
            where=str(path),
            found=_one_line(error),
            fix="fetch or make the set again",
        ) from error


@contextmanager
def _damage(path: Path, name: str = "") -> Iterator[None]:
    """Turn what h5py, numpy and json raise on broken bytes into DamagedDataError."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        raise DamagedDataError(
            "cannot be read",
            where=_place(path, name),
            found=_one_line(error),
            fix="fetch or make the set again",
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _place(path: Path, name: str = "") -> str:
    return f"{path}, dataset {name}" if name else str(path)


def _unsafe(
    path: Path, name: str, what: str, *, found: str | None = None, allowed: str | None = None
) -> NoReturn:
    place = f"{path}, /{name}" if name else str(path)
    raise UnsafeFileError(
        what,
        where=place,
        found=found,
        allowed=allowed,
        fix="do not use this file; fetch the set from its author",
    )


def _inspect(path: Path, file: h5py.File) -> Archive:
    size = path.stat().st_size
    content = _check_root(path, file.id)
    arrays = {array.name: array for array in _walk(path, file.id, "", seen=set())}
    if lacks := fmt.missing(arrays):
        raise DamagedDataError("the set is incomplete", where=str(path), found=f"no {', '.join(lacks)}")
    if beside := fmt.unfit(arrays):
        raise DamagedDataError(
            "the set is one of documents and one of images", where=str(path), found=", ".join(beside)
        )
    stored = sum(array.stored_bytes for array in arrays.values())
    if stored > size:
        _unsafe(path, "", "chunks of datasets overlap", found=f"{stored} bytes of chunks in a file of {size}")
    if fmt.content_digest({array.name: array.sha256 for array in arrays.values()}) != content:
        raise DamagedDataError(
            "the datasets are not those that were written",
            where=str(path),
            found=f"another {fmt.CONTENT_ATTRIBUTE}",
            fix="fetch or make the set again",
        )
    return Archive(path, size, arrays, content)


def _check_root(path: Path, root: h5py.h5g.GroupID) -> str:
    """Check the marks of a finished set of this version; returns its content digest."""
    attributes = _attributes(path, root, "", fmt.ROOT_ATTRIBUTES)
    if attributes.get(fmt.FORMAT_ATTRIBUTE) != fmt.FORMAT:
        raise DamagedDataError("is HDF5, but no distilled set", where=str(path))
    version = attributes.get(fmt.VERSION_ATTRIBUTE)
    if version != fmt.FORMAT_VERSION:
        raise DamagedDataError(
            "has another format version",
            where=str(path),
            found=str(version),
            allowed=str(fmt.FORMAT_VERSION),
            fix="use the version of distill that wrote it, or a newer one",
        )
    if attributes.get(fmt.COMPLETE_ATTRIBUTE) != 1:
        raise DamagedDataError("was never finished: its writer was interrupted", where=str(path))
    return str(attributes.get(fmt.CONTENT_ATTRIBUTE))


def _attributes(
    path: Path, owner: h5py.h5g.GroupID | h5py.h5d.DatasetID, name: str, allowed: frozenset[str]
) -> dict[str, str | int]:
    """The attributes of an object: scalar integers and fixed-length strings of listed names only."""
    count = h5py.h5a.get_num_attrs(owner)
    if count > fmt.MAX_ATTRIBUTES:
        _unsafe(path, name, "has too many attributes", found=str(count), allowed=str(fmt.MAX_ATTRIBUTES))
    found: dict[str, str | int] = {}
    for index in range(count):
        attribute = h5py.h5a.open(owner, index=index)
        key = attribute.name.decode("utf-8", "replace")
        if key not in allowed:
            _unsafe(path, name, "has an attribute that format 1 does not list", found=repr(key))
        found[key] = _scalar(path, name, attribute)
    return found


def _scalar(path: Path, name: str, attribute: h5py.h5a.AttrID) -> str | int:
    kind = attribute.get_type()
    text = kind.get_class() == h5py.h5t.STRING and not kind.is_variable_str()
    scalar = attribute.get_space().get_simple_extent_type() == h5py.h5s.SCALAR
    small = kind.get_size() <= fmt.MAX_ATTRIBUTE_BYTES
    if not (scalar and small and (text or kind.get_class() == h5py.h5t.INTEGER)):
        _unsafe(path, name, "has an attribute that is no integer and no fixed-length string")
    value = np.empty((), dtype=attribute.dtype)
    attribute.read(value)
    return value.item().decode("ascii") if text else int(value)


def _walk(path: Path, group: h5py.h5g.GroupID, prefix: str, *, seen: set[int]) -> Iterator[StoredArray]:
    """The datasets of a group and of the groups in it. `seen` holds the addresses of objects met so far."""
    _meet(path, group, prefix, seen)
    count = group.get_num_objs()
    if count > fmt.MAX_MEMBERS:
        _unsafe(path, prefix, "has too many members", found=str(count), allowed=str(fmt.MAX_MEMBERS))
    for key in group:
        name = prefix + key.decode("utf-8", "replace")
        with _damage(path, name):
            member = _open_member(path, group, key, name)
        if isinstance(member, h5py.h5g.GroupID):
            yield from _walk(path, member, f"{name}/", seen=seen)
        else:
            _meet(path, member, name, seen)
            with _damage(path, name):
                array = _check_dataset(path, name, member)
            yield array


def _open_member(
    path: Path, group: h5py.h5g.GroupID, key: bytes, name: str
) -> h5py.h5g.GroupID | h5py.h5d.DatasetID:
    """The group or dataset that format 1 has under this name."""
    if fmt.spec_of(name) is None and name not in fmt.GROUPS:
        _unsafe(path, "", "has a member that format 1 does not list", found=repr(name)[:100])
    if group.links.get_info(key).type != h5py.h5l.TYPE_HARD:
        _unsafe(path, name, "is a soft or external link", allowed="hard links")
    kind = h5py.h5o.get_info(group, key).type
    if kind == h5py.h5o.TYPE_GROUP and name in fmt.GROUPS:
        child = h5py.h5g.open(group, key)
        _attributes(path, child, name, frozenset())
        return child
    if kind == h5py.h5o.TYPE_DATASET and name not in fmt.GROUPS:
        return h5py.h5d.open(group, key)
    _unsafe(path, name, "is another kind of object than format 1 has here")


def _meet(path: Path, thing: h5py.h5g.GroupID | h5py.h5d.DatasetID, name: str, seen: set[int]) -> None:
    address = h5py.h5o.get_info(thing).addr
    if address in seen:
        _unsafe(path, name, "two links lead to one object")
    seen.add(address)


def _check_dataset(path: Path, name: str, dataset: h5py.h5d.DatasetID) -> StoredArray:
    """Everything that can be known of a dataset before it is read."""
    spec = fmt.spec_of(name)
    assert spec is not None, "refused by _open_member"
    dtype = _check_type(path, name, dataset.get_type(), spec)
    plist = dataset.get_create_plist()
    mapped = plist.get_layout() == h5py.h5d.CONTIGUOUS and fmt.may_be_mapped(name)
    if not (mapped or plist.get_layout() == h5py.h5d.CHUNKED) or plist.get_external_count() > 0:
        _unsafe(
            path, name, "has contiguous, external or virtual storage", allowed="chunks in the file itself"
        )
    filters = [plist.get_filter(index)[0] for index in range(plist.get_nfilters())]
    if not fmt.FILTERS.issuperset(filters) or len(set(filters)) < len(filters):
        _unsafe(
            path,
            name,
            "has filters that format 1 does not use",
            found=", ".join(map(str, filters)),
            allowed="gzip (1), shuffle (2), fletcher32 (3), each once",
        )
    shape = _check_shape(path, name, dataset.get_space(), dtype, spec)
    digest = str(
        _attributes(path, dataset, name, frozenset({fmt.SHA256_ATTRIBUTE})).get(fmt.SHA256_ATTRIBUTE)
    )
    handle = h5py.Dataset(dataset)
    if mapped:
        size = math.prod(shape) * dtype.itemsize
        offset = _check_piece(path, name, dataset, size)
        return StoredArray(name, shape, dtype, size, digest, handle, offset)
    stored = _check_chunks(path, name, dataset, shape, tuple(plist.get_chunk()), dtype.itemsize)
    _check_proportion(path, name, math.prod(shape) * dtype.itemsize, stored)
    return StoredArray(name, shape, dtype, stored, digest, handle)


def _check_piece(path: Path, name: str, dataset: h5py.h5d.DatasetID, size: int) -> int:
    """Where a dataset of one piece begins; all of it must lie in the file."""
    offset = dataset.get_offset()
    if offset is None or dataset.get_storage_size() != size:
        raise DamagedDataError("is not wholly stored", where=_place(path, name), allowed=f"{size} bytes")
    if offset + size > path.stat().st_size:
        raise DamagedDataError(
            "lies beyond the end of the file", where=_place(path, name), found=f"{offset + size} bytes"
        )
    return int(offset)


def _check_type(path: Path, name: str, kind: h5py.h5t.TypeID, spec: fmt.Spec) -> np.dtype[Any]:
    """The dtype of a dataset: exactly one of the spec's, which are plain numbers."""
    for allowed in map(np.dtype, spec.dtypes):
        if kind.equal(h5py.h5t.py_create(allowed)):
            return allowed
    _unsafe(path, name, "has a type that format 1 does not allow here", allowed=", ".join(spec.dtypes))


def _check_shape(
    path: Path, name: str, space: h5py.h5s.SpaceID, dtype: np.dtype[Any], spec: fmt.Spec
) -> tuple[int, ...]:
    simple = space.get_simple_extent_type() == h5py.h5s.SIMPLE
    shape = tuple(int(size) for size in space.get_simple_extent_dims()) if simple else ()
    fits = 1 <= len(shape) <= fmt.MAX_NDIM if spec.ndim is None else len(shape) == spec.ndim
    if not fits or min(shape) < 1:
        raise DamagedDataError(
            "has the wrong number of dimensions, or an empty one",
            where=_place(path, name),
            found=str(shape),
            allowed=f"{spec.ndim or f'1 to {fmt.MAX_NDIM}'} dimensions of 1 or more",
        )
    limit = fmt.MAX_TEXT_BYTES if spec is fmt.TEXT else fmt.MAX_ARRAY_BYTES
    if (declared := math.prod(shape) * dtype.itemsize) > limit:
        _unsafe(
            path, name, "is larger than format 1 allows", found=f"{declared} bytes", allowed=f"{limit} bytes"
        )
    return shape


def _check_chunks(
    path: Path,
    name: str,
    dataset: h5py.h5d.DatasetID,
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    itemsize: int,
) -> int:
    """Bytes of a dataset's chunks in the file; every chunk must exist and be no larger than what it holds."""
    chunk_bytes = math.prod(chunk) * itemsize
    if chunk_bytes > fmt.MAX_CHUNK_BYTES or any(c > s for c, s in zip(chunk, shape, strict=True)):
        _unsafe(
            path,
            name,
            "has chunks out of proportion",
            found=str(chunk),
            allowed=f"{fmt.MAX_CHUNK_BYTES} bytes",
        )
    sizes: list[int] = []
    dataset.chunk_iter(lambda info: sizes.append(info.size))
    expected = math.prod(-(-s // c) for s, c in zip(shape, chunk, strict=True))
    if len(sizes) != expected:
        raise DamagedDataError(
            "chunks are missing", where=_place(path, name), found=str(len(sizes)), allowed=str(expected)
        )
    if max(sizes) > chunk_bytes + fmt.CHUNK_SLACK_BYTES:
        _unsafe(
            path, name, "a chunk holds more than it declares", found=f"{max(sizes)} for {chunk_bytes} bytes"
        )
    return sum(sizes)


def _check_proportion(path: Path, name: str, declared: int, stored: int) -> None:
    ratio = fmt.MAX_LARGE_RATIO if declared > fmt.LARGE_BYTES else fmt.MAX_RATIO
    if declared > ratio * stored:
        _unsafe(
            path,
            name,
            "declares a size out of proportion to what is stored",
            found=f"{declared} bytes from {stored}",
            allowed=f"at most {ratio} times",
        )
