"""Labels of views lie in one piece of the file, and are mapped where they are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet
from distill.errors import DamagedDataError, DistillError
from distill.labels.codecs import decode, decode_rows, encode
from distill.store import format as fmt
from distill.store.reader import read_set
from distill.store.writer import write_set

PASSES, CLASSES = 40_000, 3


@pytest.fixture
def large(plain: DistilledSet) -> DistilledSet:
    """Labels above the size from which they are mapped."""
    logits = torch.randn(PASSES, len(plain), CLASSES, generator=torch.Generator().manual_seed(0))
    soft = encode(logits, codec="full", temperature=4.0, teacher="t")
    assert soft.arrays["logits"].nbytes > fmt.MAPPED_BYTES
    return replace(plain, soft=soft)


def test_labels_are_mapped_and_equal(large: DistilledSet, tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    write_set(large, path)
    again = read_set(path)
    assert again.soft is not None and large.soft is not None
    logits = again.soft.arrays["logits"]
    assert isinstance(logits.base, np.memmap) or isinstance(logits, np.memmap)
    assert not logits.flags.writeable
    np.testing.assert_array_equal(logits, large.soft.arrays["logits"])
    torch.testing.assert_close(
        decode_rows(again.soft, 17, slice(1, 4)), decode(large.soft)[17, 1:4], rtol=0, atol=0
    )
    with h5py.File(path) as file:
        assert file["labels/soft/logits"].chunks is None
        np.testing.assert_array_equal(file["labels/soft/logits"][...], logits)


def test_the_same_labels_are_the_same_bytes(large: DistilledSet, tmp_path: Path) -> None:
    for name in ("a.h5", "b.h5"):
        write_set(large, tmp_path / name)
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_changed_labels_are_noticed(large: DistilledSet, tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    write_set(large, path)
    with h5py.File(path) as file:
        offset = file["labels/soft/logits"].id.get_offset()
    with path.open("r+b") as file:
        file.seek(offset + 12345)
        file.write(b"\x3c\x3c\x3c")
    with pytest.raises(DamagedDataError, match="sha256"):
        read_set(path)


def test_a_cut_file_is_refused(large: DistilledSet, tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    write_set(large, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(DistillError):
        read_set(path)


def test_one_piece_that_was_never_stored_is_refused(large: DistilledSet, tmp_path: Path) -> None:
    path = tmp_path / "set.h5"
    write_set(large, path)
    with h5py.File(path, "r+") as file:
        digest = file["labels/soft/logits"].attrs[fmt.SHA256_ATTRIBUTE]
        shape = file["labels/soft/logits"].shape
        del file["labels/soft/logits"]
        made = file.create_dataset("labels/soft/logits", shape=shape, dtype="<f2", track_times=False)
        made.attrs[fmt.SHA256_ATTRIBUTE] = digest
    with pytest.raises(DistillError):
        read_set(path)
