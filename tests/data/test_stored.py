"""Chunks of HDF5 data sets: what a reader would have to unpack is bounded before anything is read."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from distill.data import stored
from distill.data.stored import MAX_CHUNK_BYTES, open_array
from distill.errors import UnsafeFileError
from distill.training.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")
ROWS = 30
BOMB_ROWS = 4_000_000  # of 64 bytes: 244 MiB a chunk


def zeros_deflated(count: int) -> bytes:
    """`count` zero bytes as a gzip stream, made in little memory."""
    stream = zlib.compressobj(9)
    block = bytes(2**20)
    whole, rest = divmod(count, len(block))
    return b"".join(
        [*(stream.compress(block) for _ in range(whole)), stream.compress(bytes(rest)), stream.flush()]
    )


def write_chunk(path: Path, *, rows: int, chunk_rows: int, data: bytes, **options: Any) -> Path:
    """An x of uint8 (rows, 8, 8) whose one chunk is stored as `data`."""
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset(
            "x",
            (rows, 8, 8),
            "u1",
            chunks=(chunk_rows, 8, 8),
            maxshape=(None, 8, 8),
            compression="gzip",
            **options,
        )
        dataset.id.write_direct_chunk((0, 0, 0), data)
    return path


def memory_of_reading(path: Path) -> int:
    """Bytes by which the process grew at most; reads nothing where the file is refused."""
    reset_peak(CPU)
    before = peak_bytes(CPU)
    try:
        with open_array(path, "x") as array:
            for _ in array.blocks():
                pass
    except UnsafeFileError:
        pass
    return peak_bytes(CPU) - before


@pytest.fixture
def bomb(tmp_path: Path) -> Path:
    path = tmp_path / "bomb.h5"
    return write_chunk(path, rows=ROWS, chunk_rows=BOMB_ROWS, data=zeros_deflated(BOMB_ROWS * 64))


def test_a_chunk_bomb_is_refused(bomb: Path) -> None:
    assert bomb.stat().st_size < 2**20
    refusal = r"bomb\.h5, dataset x[^$]*too large to unpack[^$]*chunks=True"
    with pytest.raises(UnsafeFileError, match=refusal), open_array(bomb, "x"):
        pytest.fail("opened")


def test_a_chunk_bomb_takes_no_memory(bomb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = memory_of_reading(bomb)
    monkeypatch.setattr(stored, "MAX_CHUNK_BYTES", 2**40)
    if memory_of_reading(bomb) < BOMB_ROWS * 64 // 2:
        pytest.skip("the process's peak of memory cannot be measured anew here")
    assert refused < 16 * 2**20


def test_a_stream_longer_than_its_chunk_is_refused(tmp_path: Path) -> None:
    """HDF5 inflates it to its end: 64 MiB for a chunk of 1920 bytes."""
    path = write_chunk(tmp_path / "long.h5", rows=ROWS, chunk_rows=ROWS, data=zeros_deflated(64 * 2**20))
    with pytest.raises(UnsafeFileError, match="holds more than it declares"), open_array(path, "x"):
        pytest.fail("opened")


@pytest.mark.parametrize("codes", [(1, 1), (1, 32000), (32000, 2, 32000)])
def test_compression_upon_compression_is_refused(tmp_path: Path, codes: tuple[int, ...]) -> None:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((ROWS, 8, 8))
    for code in codes:
        properties.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (1,))
    path = tmp_path / "twice.h5"
    with h5py.File(path, "w") as file:
        space = h5py.h5s.create_simple((ROWS, 8, 8))
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, space, properties)
    with pytest.raises(UnsafeFileError, match="compressed more than once"), open_array(path, "x"):
        pytest.fail("opened")


@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("compression", [None, "gzip", "lzf"])
def test_a_chunk_may_be_larger_than_its_dataset(tmp_path: Path, rows: int, compression: str | None) -> None:
    """As h5py writes data sets that are to grow; noise, so that chunks are stored larger than they are."""
    noise = np.random.default_rng(0).integers(0, 256, (rows, 8, 8), dtype=np.uint8)
    with h5py.File(tmp_path / "grows.h5", "w") as file:
        dataset = file.create_dataset(
            "x",
            (0, 8, 8),
            "u1",
            maxshape=(None, 8, 8),
            compression=compression,
            shuffle=True,
            fletcher32=True,
        )
        assert dataset.chunks[0] > ROWS
        dataset.resize(rows, axis=0)
        dataset[:] = noise
    with open_array(tmp_path / "grows.h5", "x") as array:
        read = [block for _, block in array.blocks()]
    np.testing.assert_array_equal(np.concatenate([*read, np.empty((0, 8, 8), np.uint8)]), noise)


def test_a_chunk_of_the_greatest_size_is_accepted(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "large.h5", "w") as file:
        rows = MAX_CHUNK_BYTES // 64
        file.create_dataset("x", (rows, 8, 8), "u1", chunks=(rows, 8, 8), compression="gzip")
    with open_array(tmp_path / "large.h5", "x") as array:
        assert array.shape == (rows, 8, 8)


def test_a_chunk_that_gzip_makes_larger_is_read(tmp_path: Path) -> None:
    """zlib adds bytes to noise in proportion, more than a fixed allowance would cover."""
    noise = np.random.default_rng(0).integers(0, 256, (1 << 17, 8, 8), dtype=np.uint8)
    with h5py.File(tmp_path / "noise.h5", "w") as file:
        dataset = file.create_dataset("x", data=noise, chunks=noise.shape, compression=1, fletcher32=True)
        assert dataset.id.get_storage_size() > noise.nbytes + 1024
    with open_array(tmp_path / "noise.h5", "x") as array:
        assert all(np.array_equal(block, noise[rows]) for rows, block in array.blocks())
