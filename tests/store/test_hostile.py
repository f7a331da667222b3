"""Hostile files, one generator a threat: each is refused as unsafe, before its data are read, and quickly."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from distill.errors import UnsafeFileError
from distill.store import archive
from distill.store import format as fmt
from distill.store.reader import read_set

SECRET = b"a file of the reader's machine"
Poison = Callable[[h5py.File, Path], None]
THREATS: dict[str, Poison] = {}


def threat(poison: Poison) -> Poison:
    THREATS[poison.__name__] = poison
    return poison


def replace_images(file: h5py.File, **options: object) -> h5py.Dataset:
    """Another dataset in the place of the images."""
    del file["images"]
    return file.create_dataset("images", **options)


def neighbour(path: Path) -> Path:
    """Another HDF5 file with images, as a link's or a virtual dataset's target."""
    target = path.with_name("neighbour.h5")
    with h5py.File(target, "w") as other:
        other.create_dataset("images", data=np.zeros((6, 4, 5, 2), np.float16), chunks=True)
        other.create_group("labels")
    return target


@threat
def soft_link(file: h5py.File, path: Path) -> None:
    file.move("images", "provenance2")
    file["images"] = h5py.SoftLink("/provenance2")


@threat
def dangling_soft_link(file: h5py.File, path: Path) -> None:
    del file["images"]
    file["images"] = h5py.SoftLink("/nowhere")


@threat
def external_link(file: h5py.File, path: Path) -> None:
    del file["images"]
    file["images"] = h5py.ExternalLink(str(neighbour(path)), "/images")


@threat
def external_link_as_group(file: h5py.File, path: Path) -> None:
    del file["labels"]
    file["labels"] = h5py.ExternalLink(str(neighbour(path)), "/labels")


@threat
def external_storage(file: h5py.File, path: Path) -> None:
    secret = path.with_name("secret")
    secret.write_bytes(SECRET)
    del file["provenance"]
    file.create_dataset("provenance", (len(SECRET),), "u1", external=[(str(secret), 0, len(SECRET))])


@threat
def virtual_dataset(file: h5py.File, path: Path) -> None:
    layout = h5py.VirtualLayout((6, 4, 5, 2), np.float16)
    layout[...] = h5py.VirtualSource(str(neighbour(path)), "images", (6, 4, 5, 2))
    del file["images"]
    file.create_virtual_dataset("images", layout)


@threat
def foreign_filter(file: h5py.File, path: Path) -> None:
    replace_images(file, data=np.zeros((6, 4, 5, 2), np.float16), compression="lzf")


@threat
def scale_offset_filter(file: h5py.File, path: Path) -> None:
    replace_images(file, data=np.zeros((6, 4, 5, 2), np.uint8), scaleoffset=0)


@threat
def gzip_twice(file: h5py.File, path: Path) -> None:
    """1032 x 1032: the ratio of one filter says nothing of two."""
    del file["images"]
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((6, 4, 5, 2))
    plist.set_deflate(9)
    plist.set_deflate(9)
    space = h5py.h5s.create_simple((6, 4, 5, 2))
    h5py.h5d.create(file.id, b"images", h5py.h5t.STD_U8LE, space, plist)


@threat
def variable_length_strings(file: h5py.File, path: Path) -> None:
    del file["classes"]
    file.create_dataset("classes", data=["a", "b", "c"], dtype=h5py.string_dtype(), chunks=(3,))


@threat
def variable_length_arrays(file: h5py.File, path: Path) -> None:
    del file["labels/hard"]
    file.create_dataset("labels/hard", (6,), h5py.vlen_dtype(np.int64), chunks=(6,))


@threat
def references(file: h5py.File, path: Path) -> None:
    del file["labels/hard"]
    file.create_dataset("labels/hard", data=[file.ref] * 6, dtype=h5py.ref_dtype, chunks=(6,))


@threat
def compound_type(file: h5py.File, path: Path) -> None:
    del file["labels/hard"]
    file.create_dataset("labels/hard", data=np.zeros(6, dtype=[("a", "i8")]), chunks=(6,))


@threat
def enumerated_type(file: h5py.File, path: Path) -> None:
    del file["labels/hard"]
    file.create_dataset("labels/hard", data=np.zeros(6, dtype=bool), chunks=(6,))


@threat
def opaque_type(file: h5py.File, path: Path) -> None:
    del file["classes"]
    file.create_dataset("classes", data=np.zeros(3, dtype="V8"), chunks=(3,))


@threat
def big_endian_type(file: h5py.File, path: Path) -> None:
    del file["labels/hard"]
    file.create_dataset("labels/hard", data=np.zeros(6, dtype=">i8"), chunks=(6,))


@threat
def unlisted_dataset(file: h5py.File, path: Path) -> None:
    file.create_dataset("pickled", data=np.zeros(3, np.uint8), chunks=(3,))


@threat
def unlisted_group(file: h5py.File, path: Path) -> None:
    file.create_group("labels/soft/more")


@threat
def name_with_terminal_codes(file: h5py.File, path: Path) -> None:
    file.create_group("\x1b[2J")


@threat
def unlisted_attribute(file: h5py.File, path: Path) -> None:
    file["images"].attrs["code"] = np.bytes_("import os")


@threat
def attribute_of_a_group(file: h5py.File, path: Path) -> None:
    file["labels"].attrs["sha256"] = np.bytes_("0")


@threat
def variable_length_attribute(file: h5py.File, path: Path) -> None:
    file["images"].attrs["sha256"] = "a python string"


@threat
def long_attribute(file: h5py.File, path: Path) -> None:
    file["images"].attrs["sha256"] = np.bytes_("0" * 10_000)


@threat
def array_attribute(file: h5py.File, path: Path) -> None:
    file.attrs["complete"] = np.ones(1000, np.int64)


@threat
def reference_attribute(file: h5py.File, path: Path) -> None:
    file["images"].attrs.create("sha256", file.ref, dtype=h5py.ref_dtype)


@threat
def many_attributes(file: h5py.File, path: Path) -> None:
    for number in range(100):
        file["images"].attrs[f"a{number}"] = number


@threat
def many_members(file: h5py.File, path: Path) -> None:
    for number in range(100):
        file.create_dataset(f"labels/soft/a{number}", data=np.zeros(3), chunks=(3,))


@threat
def cyclic_hard_link(file: h5py.File, path: Path) -> None:
    del file["labels/soft"]
    file["labels/soft"] = file["labels"]


@threat
def hard_link_to_the_root(file: h5py.File, path: Path) -> None:
    del file["selection"]
    file["selection"] = file["/"]


@threat
def two_hard_links(file: h5py.File, path: Path) -> None:
    del file["labels/hard"]
    file["labels/hard"] = file["selection/indices"]


@threat
def dataset_as_group(file: h5py.File, path: Path) -> None:
    del file["selection"]
    file.create_dataset("selection", data=np.zeros(6), chunks=(6,))


@threat
def group_as_dataset(file: h5py.File, path: Path) -> None:
    del file["images"]
    file.create_group("images")


@threat
def named_type_as_dataset(file: h5py.File, path: Path) -> None:
    del file["images"]
    file["images"] = np.dtype("f8")


@threat
def contiguous_storage(file: h5py.File, path: Path) -> None:
    replace_images(file, data=np.zeros((6, 4, 5, 2), np.uint8))


@threat
def shape_bomb(file: h5py.File, path: Path) -> None:
    """A petabyte of fill values, of which nothing is stored."""
    replace_images(file, shape=(2**30, 2**10, 2**10, 1), dtype="u1", chunks=(1, 2**10, 2**10, 1))


@threat
def shape_beyond_64_bits(file: h5py.File, path: Path) -> None:
    replace_images(file, shape=(2**40, 2**21, 1, 1), dtype="f2", chunks=(1, 1024, 1, 1))


@threat
def text_bomb(file: h5py.File, path: Path) -> None:
    del file["provenance"]
    size = fmt.MAX_TEXT_BYTES + 1
    file.create_dataset("provenance", data=np.zeros(size, np.uint8), chunks=(1 << 20,), compression="gzip")


@threat
def compression_bomb(file: h5py.File, path: Path) -> None:
    """Every chunk is there and gzip's own ratio is kept: 300 MiB from 300 KiB."""
    options = {"shape": (300, 1 << 10, 1 << 10, 1), "dtype": "u1", "chunks": (1, 1 << 10, 1 << 10, 1)}
    images = replace_images(file, **options, compression="gzip")
    zeros = zlib.compress(bytes(1 << 20), 9)
    for row in range(300):
        images.id.write_direct_chunk((row, 0, 0, 0), zeros)


@threat
def chunk_that_inflates_beyond_itself(file: h5py.File, path: Path) -> None:
    """HDF5 inflates a chunk's gzip stream to its end, whatever the chunk's size: 64 MiB into 240 bytes."""
    images = replace_images(file, shape=(6, 4, 5, 2), dtype="u1", chunks=(6, 4, 5, 2), compression="gzip")
    images.id.write_direct_chunk((0, 0, 0, 0), zlib.compress(bytes(64 << 20), 9))


@threat
def huge_chunk(file: h5py.File, path: Path) -> None:
    replace_images(file, shape=(4, 1 << 10, 1 << 10, 1), dtype="u1", chunks=(4, 1 << 10, 1 << 10, 1))


@threat
def chunk_larger_than_its_dataset(file: h5py.File, path: Path) -> None:
    replace_images(file, shape=(6, 4, 5, 2), dtype="u1", maxshape=(None, 4, 5, 2), chunks=(900, 4, 5, 2))


@pytest.mark.parametrize("name", THREATS)
def test_threat_is_refused(name: str, file: Path) -> None:
    with h5py.File(file, "r+") as poisoned:
        THREATS[name](poisoned, file)
    start = time.perf_counter()
    for verify in (True, False):
        with pytest.raises(UnsafeFileError) as caught:
            read_set(file, verify=verify)
        assert str(file) in (caught.value.where or "")
        assert "\x1b" not in str(caught.value)
    assert time.perf_counter() - start < 1


def test_overlapping_chunks(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HDF5 writes no file in which two datasets share chunks, so their sizes are made up here."""
    monkeypatch.setattr(archive, "_check_chunks", lambda *_: 1 << 20)
    with pytest.raises(UnsafeFileError, match="overlap"):
        read_set(file)


def test_it_is_the_poison_that_is_refused(file: Path) -> None:
    """The control: opened for poisoning and closed again, the file is still read."""
    with h5py.File(file, "r+") as untouched:
        untouched.flush()
    assert len(read_set(file)) == 6
