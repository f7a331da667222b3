"""What is written is what is read, bit for bit; the same set is the same file, byte for byte."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.contracts import DistilledSet, Preprocessing
from distill.store import format as fmt
from distill.store.archive import open_archive
from distill.store.reader import read_set
from distill.store.summary import describe, summarise
from distill.store.writer import write_set

Same = Callable[[DistilledSet, DistilledSet], None]


@pytest.mark.parametrize("verify", [True, False])
def test_round_trip(any_set: DistilledSet, tmp_path: Path, same: Same, verify: bool) -> None:
    write_set(any_set, tmp_path / "set.h5")
    same(read_set(tmp_path / "set.h5", verify=verify), any_set)


def test_a_selection_without_rows(full: DistilledSet, tmp_path: Path, same: Same) -> None:
    """As sets of before rows were kept."""
    assert full.selection is not None
    older = replace(full, selection=replace(full.selection, rows=None))
    write_set(older, tmp_path / "set.h5")
    same(read_set(tmp_path / "set.h5"), older)
    assert "rows in the data not kept" in describe(summarise(tmp_path / "set.h5", verify=True))


def test_images_are_channels_last_without_a_copy(file: Path) -> None:
    images = read_set(file).images
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert tuple(images.shape) == (6, 2, 4, 5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_does_not_matter(
    plain: DistilledSet, tmp_path: Path, layout: torch.memory_format
) -> None:
    write_set(plain, tmp_path / "a.h5")
    write_set(replace(plain, images=plain.images.contiguous(memory_format=layout)), tmp_path / "b.h5")
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()


def test_images_cut_into_bands_and_many_chunks(tmp_path: Path, plain: DistilledSet, same: Same) -> None:
    """Images above a chunk's size, and more chunks than one."""
    images = torch.randint(0, 256, (3, 1, 600, 700), dtype=torch.uint8)
    large = replace(
        plain, images=images, labels=plain.labels[:3], preprocessing=Preprocessing(mean=(0.5,), std=(0.5,))
    )
    assert fmt.chunk_shape((3, 600, 700, 1), 1)[1] < 600
    write_set(large, tmp_path / "set.h5")
    same(read_set(tmp_path / "set.h5"), large)


def test_constant_images_are_no_bomb(tmp_path: Path, plain: DistilledSet, same: Same) -> None:
    """gzip reaches its limit on them, about 1000 to 1."""
    blank = replace(plain, images=torch.zeros((6, 2, 600, 600), dtype=torch.uint8))
    write_set(blank, tmp_path / "set.h5")
    assert (tmp_path / "set.h5").stat().st_size < blank.images.numel() / 200
    same(read_set(tmp_path / "set.h5"), blank)


def test_same_set_same_bytes(any_set: DistilledSet, tmp_path: Path) -> None:
    """A second apart, for HDF5's time stamps are in seconds; under another name; facts in another order."""
    write_set(any_set, tmp_path / "set.h5")
    time.sleep(1.1)
    turned = dict(reversed(list(any_set.provenance.items())))
    write_set(replace(any_set, provenance=turned), tmp_path / "other name.h5")
    assert (tmp_path / "set.h5").read_bytes() == (tmp_path / "other name.h5").read_bytes()


def test_writing_what_was_read_gives_the_same_bytes(file: Path, tmp_path: Path) -> None:
    write_set(read_set(file), tmp_path / "again.h5")
    assert (tmp_path / "again.h5").read_bytes() == file.read_bytes()


def test_provenance_above_the_limit_of_attributes(plain: DistilledSet, tmp_path: Path) -> None:
    provenance = {"notes": ["x" * 1000 + str(n) for n in range(200)]}
    write_set(replace(plain, provenance=provenance), tmp_path / "set.h5")
    assert read_set(tmp_path / "set.h5").provenance == provenance


def test_every_array_is_little_endian(file: Path) -> None:
    with open_archive(file) as archive:
        assert {array.dtype.str[0] for array in archive.arrays.values()} == {"<", "|"}
