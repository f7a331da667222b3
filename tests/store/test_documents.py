"""Sets of documents: what is written is what is read, byte for byte the same; what is broken or hostile is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import distill
from distill.contracts import DistilledSet, DocumentSet, Selection
from distill.errors import DamagedDataError, InputError, UnsafeFileError
from distill.store import format as fmt
from distill.store import writer
from distill.store.reader import is_of_documents, read_documents, read_set
from distill.store.summary import describe, summarise
from distill.store.writer import write_documents, write_set

FILES = ("a/one.jsonl", "größer/two.jsonl.gz", "\udc80\x1b[2J.parquet")
Poison = Callable[[h5py.File, Path], None]


@pytest.fixture
def documents() -> DocumentSet:
    """Five documents of three files, in the order in which they were taken."""
    return DocumentSet(
        selection=Selection(
            indices=np.array([9, 2, 7, 0, 5]),
            weights=np.ones(5, dtype=np.float32),
            scores=np.array([3.5, 2, -1e30, 0.25, -7], dtype=np.float32),
            meta={"score": "log importance weight", "passed": 8, "targets": [{"name": "target"}]},
        ),
        files=FILES,
        file=np.array([2, 0, 1, 0, 1], dtype=np.int32),
        row=np.array([1, 2, 3, 0, 1]),
        digest=np.array([0, 1, 2**64 - 1, 7, 7], dtype=np.uint64),
        provenance={"seed": 3, "recipe": {"data": {"name": "text"}}, "code": None},
    )


@pytest.fixture
def path(documents: DocumentSet, tmp_path: Path) -> Path:
    write_documents(documents, tmp_path / "set.h5")
    return tmp_path / "set.h5"


def assert_same(a: DocumentSet, b: DocumentSet) -> None:
    assert (a.files, dict(a.provenance), a.selection.meta) == (b.files, dict(b.provenance), b.selection.meta)
    for one, other in (
        (a.file, b.file),
        (a.row, b.row),
        (a.digest, b.digest),
        *(
            (getattr(a.selection, name), getattr(b.selection, name))
            for name in ("indices", "weights", "scores")
        ),
    ):
        assert one.dtype == other.dtype and one.tobytes() == other.tobytes()
    assert a.selection.rows is None and b.selection.rows is None


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_written_is_what_is_read(documents: DocumentSet, path: Path, verify: bool) -> None:
    assert_same(read_documents(path, verify=verify), documents)
    assert is_of_documents(path)


def test_the_same_set_is_the_same_bytes(documents: DocumentSet, path: Path, tmp_path: Path) -> None:
    """A second apart, for HDF5's time stamps are in seconds; under another name; facts in another order."""
    time.sleep(1.1)
    turned = dict(reversed(list(documents.provenance.items())))
    write_documents(replace(documents, provenance=turned), tmp_path / "other.h5")
    assert (tmp_path / "other.h5").read_bytes() == path.read_bytes()
    write_documents(read_documents(path), tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == path.read_bytes()


def test_many_documents(documents: DocumentSet, tmp_path: Path) -> None:
    """More than a chunk of each array."""
    count = 300_000
    rng = np.random.default_rng(0)
    many = replace(
        documents,
        selection=Selection(
            indices=rng.permutation(count),
            weights=np.ones(count, dtype=np.float32),
            scores=rng.normal(size=count).astype(np.float32),
        ),
        file=np.full(count, 2, dtype=np.int32),
        row=rng.permutation(count),
        digest=rng.integers(0, 2**64, count, dtype=np.uint64),
    )
    write_documents(many, tmp_path / "many.h5")
    assert_same(read_documents(tmp_path / "many.h5"), many)


def test_a_set_of_images_is_none_of_documents(
    documents: DocumentSet, path: Path, plain: DistilledSet, tmp_path: Path
) -> None:
    write_set(plain, tmp_path / "images.h5")
    with pytest.raises(InputError, match="is a set of images") as images:
        read_documents(tmp_path / "images.h5")
    with pytest.raises(InputError, match="is a set of documents") as texts:
        read_set(path)
    with pytest.raises(InputError, match="is a set of documents"):
        distill.load(path)
    assert images.value.where == str(tmp_path / "images.h5") and texts.value.where == str(path)
    assert not is_of_documents(tmp_path / "images.h5")


def test_the_summary_tells_of_documents(path: Path) -> None:
    summary = summarise(path, verify=True)
    assert summary["documents"] == {"count": 5, "files": 3}
    assert summary["bytes"] == {"total": path.stat().st_size}
    assert summary["selection"]["count"] == 5 and summary["selection"]["meta"]["passed"] == 8
    assert {array["name"] for array in summary["arrays"]} == set(fmt.DOCUMENTS)
    assert all(array["verified"] for array in summary["arrays"])
    told = describe(summary)
    assert "5 in 3 files" in told and "images" not in told and "\x1b" not in told


# Broken: with the right checksums, as a stranger may write them.


def with_selection(documents: DocumentSet, **fields: Any) -> DocumentSet:
    return replace(documents, selection=replace(documents.selection, **fields))


BROKEN: dict[str, tuple[Callable[[DocumentSet], DocumentSet], str]] = {
    "a file that is not named": (
        lambda d: replace(d, file=np.array([3, 0, 1, 0, 1], dtype=np.int32)),
        "files that the set does not name",
    ),
    "a file below none": (
        lambda d: replace(d, file=np.array([2, 0, -1, 0, 1], dtype=np.int32)),
        "files that the set does not name",
    ),
    "a row below none": (lambda d: replace(d, row=np.array([1, 2, -3, 0, 1])), "does not name"),
    "no files": (lambda d: replace(d, files=()), "files that the set does not name"),
    "a file twice": (lambda d: replace(d, files=(FILES[0], FILES[1], FILES[0])), "a file is named twice"),
    "a document twice": (lambda d: replace(d, row=np.array([1, 0, 3, 0, 1])), "documents are not distinct"),
    "an index twice": (lambda d: with_selection(d, indices=np.array([9, 2, 7, 2, 5])), "distinct"),
    "an index below none": (lambda d: with_selection(d, indices=np.array([9, 2, 7, -1, 5])), "ind"),
    "a score that is none": (
        lambda d: with_selection(d, scores=np.array([np.nan, 1, 1, np.inf, 1], dtype=np.float32)),
        "scores of documents are not finite",
    ),
    "a weight that is none": (
        lambda d: with_selection(d, weights=np.array([np.inf, 1, 1, 1, 1], dtype=np.float32)),
        "weights",
    ),
    "fewer rows": (lambda d: replace(d, row=np.array([1, 2, 3, 0])), "do not match|does not match"),
    "fewer files": (lambda d: replace(d, file=d.file[:4]), "documents/file does not match"),
    "fewer digests": (lambda d: replace(d, digest=d.digest[:4]), "documents/digest does not match"),
    "fewer indices": (
        lambda d: with_selection(d, indices=np.array([9, 2, 7, 0])),
        "do not match the documents",
    ),
    "nothing": (
        lambda d: DocumentSet(
            Selection(np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.float32)),
            FILES,
            np.empty(0, np.int32),
            np.empty(0, np.int64),
            np.empty(0, np.uint64),
        ),
        "holds no document",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_neither_written_nor_read(
    name: str, documents: DocumentSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = BROKEN[name]
    broken = change(documents)
    with pytest.raises(DamagedDataError, match=message):
        write_documents(broken, tmp_path / "set.h5")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(writer, "check_documents", lambda _: None)
    if name == "nothing":  # HDF5 has no chunks of nothing
        return
    write_documents(broken, tmp_path / "set.h5")
    with pytest.raises(DamagedDataError, match=message) as caught:
        read_documents(tmp_path / "set.h5")
    assert str(tmp_path / "set.h5") in (caught.value.where or "")


@pytest.mark.parametrize("value", [{"a": 1}, "a", [1, 2, 3], [["a"], "b", "c"], None])
def test_names_of_files_that_are_none(
    value: Any, documents: DocumentSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "check_documents", lambda _: None)
    path = tmp_path / "set.h5"
    write_documents(replace(documents, files=value), path)
    with pytest.raises(DamagedDataError, match=r"does not hold what belongs|is no") as caught:
        read_documents(path)
    assert "documents/files" in str(caught.value)


@pytest.mark.parametrize("name", sorted(fmt.DOCUMENTS))
def test_a_part_that_is_missing(name: str, path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
    for read in (read_documents, is_of_documents, lambda path: summarise(path, verify=False)):
        with pytest.raises(DamagedDataError, match="incomplete") as caught:
            read(path)
        assert name in (caught.value.found or "")


def test_a_flipped_bit_is_found(path: Path, documents: DocumentSet) -> None:
    with h5py.File(path, "r+") as file:
        file["documents/row"][0] = 17
    with pytest.raises(DamagedDataError, match="sha256"):
        read_documents(path)


def test_a_cut_file_is_damaged(path: Path) -> None:
    content = path.read_bytes()
    for part in (0, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:part])
        with pytest.raises(DamagedDataError):
            read_documents(path)


@pytest.mark.parametrize("name", ["images", "labels/hard", "labels/soft/logits", "selection/rows", "classes"])
def test_images_beside_documents(name: str, path: Path) -> None:
    shapes = {"images": (5, 4, 4, 1), "classes": (5,)}
    with h5py.File(path, "r+") as file:
        dtype = "u1" if name in shapes else "f2" if "soft" in name else "i8"
        shape = shapes.get(name, (5,))
        file.create_dataset(name, data=np.zeros(shape, dtype), chunks=shape, fletcher32=True)
        file[name].attrs["sha256"] = np.bytes_("0" * 64)
    for read in (read_documents, read_set, lambda path: summarise(path, verify=False)):
        with pytest.raises(DamagedDataError, match="one of documents and one of images") as caught:
            read(path)
        assert name in (caught.value.found or "")


# Hostile: refused before anything is read.

THREATS: dict[str, Poison] = {}


def threat(poison: Poison) -> Poison:
    THREATS[poison.__name__] = poison
    return poison


@threat
def soft_link(file: h5py.File, path: Path) -> None:
    del file["documents/row"]
    file["documents/row"] = h5py.SoftLink("/selection/indices")


@threat
def hard_link(file: h5py.File, path: Path) -> None:
    del file["documents/row"]
    file["documents/row"] = file["selection/indices"]


@threat
def external_link(file: h5py.File, path: Path) -> None:
    with h5py.File(path.with_name("neighbour.h5"), "w") as other:
        other.create_dataset("row", data=np.arange(5), chunks=True)
    del file["documents/row"]
    file["documents/row"] = h5py.ExternalLink(str(path.with_name("neighbour.h5")), "/row")


@threat
def external_storage(file: h5py.File, path: Path) -> None:
    path.with_name("secret").write_bytes(b"a secret")
    del file["documents/files"]
    file.create_dataset("documents/files", (8,), "u1", external=[(str(path.with_name("secret")), 0, 8)])


@threat
def variable_length_strings(file: h5py.File, path: Path) -> None:
    del file["documents/files"]
    file.create_dataset("documents/files", data=["a", "b", "c"], dtype=h5py.string_dtype(), chunks=(3,))


@threat
def texts_in_the_set(file: h5py.File, path: Path) -> None:
    file.create_dataset("documents/texts", data=np.zeros(5, np.uint8), chunks=(5,))


@threat
def another_group(file: h5py.File, path: Path) -> None:
    file.create_group("documents/more")


@threat
def other_numbers(file: h5py.File, path: Path) -> None:
    del file["documents/file"]
    file.create_dataset("documents/file", data=np.zeros(5, ">i4"), chunks=(5,))


@threat
def wide_numbers(file: h5py.File, path: Path) -> None:
    del file["documents/file"]
    file.create_dataset("documents/file", data=np.zeros(5, np.int64), chunks=(5,))


@threat
def a_bomb_of_rows(file: h5py.File, path: Path) -> None:
    """A petabyte of fill values, of which nothing is stored."""
    del file["documents/row"]
    file.create_dataset("documents/row", shape=(2**47,), dtype="i8", chunks=(1 << 17,))


@threat
def a_bomb_of_names(file: h5py.File, path: Path) -> None:
    del file["documents/files"]
    size = fmt.MAX_TEXT_BYTES + 1
    zeros = np.zeros(size, np.uint8)
    file.create_dataset("documents/files", data=zeros, chunks=(1 << 20,), compression="gzip")


@pytest.mark.parametrize("name", THREATS)
def test_a_threat_is_refused(name: str, path: Path) -> None:
    with h5py.File(path, "r+") as poisoned:
        THREATS[name](poisoned, path)
    for read in (read_documents, is_of_documents, lambda path: summarise(path, verify=False)):
        with pytest.raises(UnsafeFileError) as caught:
            read(path)
        assert str(path) in (caught.value.where or "") and "\x1b" not in str(caught.value)


def test_it_is_the_poison_that_is_refused(path: Path) -> None:
    """The control: opened for poisoning and closed again, the file is still read."""
    with h5py.File(path, "r+") as untouched:
        untouched.flush()
    assert len(read_documents(path)) == 5
