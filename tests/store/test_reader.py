"""Damaged files: each gives one error that names the place, and nothing but our own errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.contracts import DistilledSet
from distill.errors import DamagedDataError, DistillError, InputError, MemoryExhaustedError, UnsafeFileError
from distill.store import archive, writer
from distill.store import format as fmt
from distill.store.reader import read_set

Arrays = dict[str, np.ndarray]


def test_missing_file_folder_and_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "absent.h5", tmp_path, tmp_path / "fifo"):
        with pytest.raises(InputError) as caught:
            read_set(path)
        assert caught.value.where == str(path)


@pytest.mark.parametrize(
    "content", [b"", b"not HDF5", b"\x89HDF\r\n\x1a\n"], ids=["empty", "text", "signature"]
)
def test_no_hdf5(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "set.h5"
    path.write_bytes(content)
    with pytest.raises(DamagedDataError, match="no HDF5 file") as caught:
        read_set(path)
    assert not isinstance(caught.value, UnsafeFileError)


def test_hdf5_that_is_no_set(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["images"] = np.zeros(3)
    with pytest.raises(DamagedDataError, match="no distilled set"):
        read_set(tmp_path / "other.h5")


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        (fmt.FORMAT_ATTRIBUTE, np.bytes_("other"), "no distilled set"),
        (fmt.VERSION_ATTRIBUTE, np.int64(2), "another format version"),
        (fmt.COMPLETE_ATTRIBUTE, np.uint8(0), "never finished"),
        (fmt.COMPLETE_ATTRIBUTE, None, "never finished"),
        (fmt.CONTENT_ATTRIBUTE, np.bytes_("0" * 64), "not those that were written"),
    ],
)
def test_root_attributes(file: Path, attribute: str, value: object, message: str) -> None:
    with h5py.File(file, "r+") as broken:
        del broken.attrs[attribute]
        if value is not None:
            broken.attrs[attribute] = value
    with pytest.raises(DamagedDataError, match=message):
        read_set(file)


@pytest.mark.parametrize("name", [*fmt.REQUIRED, fmt.ZCA, fmt.CODEC, "labels/soft/logits", fmt.WEIGHTS])
def test_missing_dataset_is_named(file: Path, name: str) -> None:
    with h5py.File(file, "r+") as broken:
        del broken[name]
    with pytest.raises(DamagedDataError) as caught:
        read_set(file)
    # Which arrays a codec has is not the format's to know; that one is gone, the digest tells.
    assert (name if name != "labels/soft/logits" else fmt.CONTENT_ATTRIBUTE) in str(caught.value)


def test_rows_belong_to_a_selection(file: Path) -> None:
    with h5py.File(file, "r+") as broken:
        for name in (fmt.INDICES, fmt.WEIGHTS, fmt.SCORES, fmt.SELECTION_META):
            del broken[name]
    with pytest.raises(DamagedDataError, match=fmt.INDICES):
        read_set(file)


def test_dropping_a_whole_option_is_noticed(file: Path) -> None:
    """Without its selection the set would be sound; the content digest knows that there was one."""
    with h5py.File(file, "r+") as broken:
        del broken["selection"]
    with pytest.raises(DamagedDataError, match="not those that were written"):
        read_set(file)


@pytest.mark.parametrize("name", ["images", "labels/hard", "provenance", "labels/soft/logits"])
def test_changed_array_is_named_unless_unverified(file: Path, name: str, full: DistilledSet) -> None:
    with h5py.File(file, "r+") as broken:
        values = broken[name][...]
        broken[name][...] = values[::-1]
    with pytest.raises(DamagedDataError, match="sha256") as caught:
        read_set(file)
    assert name in (caught.value.where or "")
    if name == "images":
        assert read_set(file, verify=False).images.dtype == full.images.dtype


def test_missing_chunk_is_named(file: Path) -> None:
    """A chunk that was never written reads as zeros in plain HDF5."""
    with h5py.File(file, "r+") as broken:
        form = broken["images"]
        shape, dtype, digest = form.shape, form.dtype, form.attrs["sha256"]
        del broken["images"]
        hole = broken.create_dataset("images", shape, dtype, chunks=(1, *shape[1:]), **fmt.STORAGE)
        hole[0] = 1
        hole.attrs["sha256"] = digest
    with pytest.raises(DamagedDataError, match="chunks are missing") as caught:
        read_set(file)
    assert "images" in (caught.value.where or "")


def forge(full: DistilledSet, path: Path, change: Callable[[Arrays], object]) -> None:
    """A file with right digests over contents that no writer of ours would write."""
    arrays = writer._pack(full)
    change(arrays)
    image, pieces = writer._build(arrays)
    image.copy_to(path, pieces)


def nan_pixel(arrays: Arrays) -> None:
    arrays["images"] = np.full_like(arrays["images"], np.nan)


FORGED: dict[str, tuple[Callable[[Arrays], object], str]] = {
    "labels out of range": (lambda arrays: arrays.update({fmt.HARD: np.full(6, 7)}), "out of range"),
    "NaN": (nan_pixel, "NaN"),
    "classes no list": (lambda a: a.update({fmt.CLASSES: fmt.encode_json({"a": 1})}), "does not hold"),
    "classes no names": (lambda a: a.update({fmt.CLASSES: fmt.encode_json([1, 2, 3])}), "does not hold"),
    "other train recipe": (lambda a: a.update({fmt.TRAIN_RECIPE: fmt.encode_json({"lr": -1})}), "lr"),
    "unknown key": (lambda a: a.update({fmt.TRAIN_RECIPE: fmt.encode_json({"code": "x"})}), "code"),
    "codec without name": (lambda a: a.update({fmt.CODEC: fmt.encode_json({"attributes": {}})}), "codec"),
    "unknown codec": (
        lambda a: a.update({fmt.CODEC: fmt.encode_json({"codec": "new", "attributes": {"temperature": 1}})}),
        "update distill",
    ),
    "no JSON": (lambda a: a.update({fmt.PROVENANCE: np.frombuffer(b"{", np.uint8)}), "provenance"),
    "deep JSON": (lambda a: a.update({fmt.PROVENANCE: np.frombuffer(b"[" * 10**6, np.uint8)}), "nested too"),
    "dimension 0": (lambda a: a.update({fmt.MEAN: np.zeros((1, 1))}), "dimensions"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_contents(name: str, full: DistilledSet, tmp_path: Path) -> None:
    change, message = FORGED[name]
    forge(full, tmp_path / "set.h5", change)
    with pytest.raises(DamagedDataError, match=message) as caught:
        read_set(tmp_path / "set.h5")
    assert str(tmp_path / "set.h5") in (caught.value.where or "")


def test_too_large_for_memory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(archive.h5py.Dataset, "__getitem__", refuse)
    with pytest.raises(MemoryExhaustedError, match="does not fit"):
        read_set(file)


def outcome(path: Path, content: bytes, reference: DistilledSet, same: Callable[..., None]) -> str:
    """Reads `content`; it must be the reference or raise one of our own errors, which is named."""
    path.write_bytes(content)
    try:
        found = read_set(path)
    except DistillError as error:
        assert error.where is not None and str(path) in error.where
        return type(error).__name__
    same(found, reference)
    return "same"


few = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(data=st.data())
def test_flipped_bytes(
    data: st.DataObject,
    file_bytes: bytes,
    full_reference: DistilledSet,
    same: Callable[..., None],
    tmp_path: Path,
) -> None:
    content = bytearray(file_bytes)
    places = st.tuples(st.integers(0, len(content) - 1), st.integers(1, 255))
    for place, flip in data.draw(st.lists(places, min_size=1, max_size=8, unique_by=lambda p: p[0])):
        content[place] ^= flip
    # Metadata carry checksums and every array has its sha256, so that no flip at all goes unnoticed.
    assert outcome(tmp_path / "set.h5", bytes(content), full_reference, same) != "same"


@few
@given(cut=st.floats(0, 1, exclude_max=True))
def test_truncated(
    cut: float, file_bytes: bytes, full_reference: DistilledSet, same: Callable[..., None], tmp_path: Path
) -> None:
    content = file_bytes[: int(cut * len(file_bytes))]
    assert outcome(tmp_path / "set.h5", content, full_reference, same) != "same"


def test_undamaged_bytes_are_the_same(
    file_bytes: bytes, full_reference: DistilledSet, same: Callable[..., None], tmp_path: Path
) -> None:
    assert outcome(tmp_path / "set.h5", file_bytes, full_reference, same) == "same"
    assert outcome(tmp_path / "set.h5", file_bytes + b"tail", full_reference, same) == "same"
