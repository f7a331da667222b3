"""Atomic writes: the whole file or the one before, whatever happens in between."""

from __future__ import annotations

import errno
import io
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.errors import InputError
from distill.files import (
    PARTIAL,
    disk_errors,
    is_whole_zip,
    remove_stale_partials,
    sync,
    write_atomically,
    write_bytes_atomically,
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A file that a failed write must leave as it was."""
    path = tmp_path / "set.h5"
    path.write_bytes(b"before")
    return path


def assert_untouched(target: Path) -> None:
    assert target.read_bytes() == b"before"
    assert [path.name for path in target.parent.iterdir()] == ["set.h5"], "no temporary file is left"


def test_a_file_is_replaced(target: Path) -> None:
    write_bytes_atomically(target, b"after")
    assert target.read_bytes() == b"after"
    assert [path.name for path in target.parent.iterdir()] == ["set.h5"]


def test_the_file_is_whole_and_synced_before_it_is_seen(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    replace, fsync = os.replace, os.fsync

    def replacing(source: Path, destination: Path) -> None:
        assert source.read_bytes() == b"after"
        assert source.name.startswith(".set.h5.")
        assert source.name.endswith(PARTIAL)
        events.append("rename")
        replace(source, destination)

    def syncing(handle: int) -> None:
        events.append("sync folder" if Path(f"/proc/self/fd/{handle}").is_dir() else "sync file")
        fsync(handle)

    monkeypatch.setattr(os, "replace", replacing)
    monkeypatch.setattr(os, "fsync", syncing)
    write_bytes_atomically(target, b"after")
    if Path("/proc/self/fd").exists():
        assert events == ["sync file", "rename", "sync folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError("defect"), SystemExit])
def test_an_interrupted_write_leaves_the_file_before(target: Path, error: BaseException) -> None:
    def half(partial: Path) -> None:
        partial.write_bytes(b"aft")
        raise error

    with pytest.raises(BaseException) as caught:
        write_atomically(target, half)
    assert caught.type in (KeyboardInterrupt, ValueError, SystemExit)
    assert_untouched(target)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "cannot be written: Permission denied"),
        (errno.EROFS, "cannot be written: Read-only file system"),
    ],
)
def test_a_refused_write_is_one_clear_error(target: Path, number: int, message: str) -> None:
    def refused(partial: Path) -> None:
        partial.write_bytes(b"aft")
        raise OSError(number, os.strerror(number))

    with pytest.raises(InputError, match=message) as caught:
        write_atomically(target, refused)
    assert caught.value.where == str(target)
    assert caught.value.fix
    if "full" in message:
        assert str(caught.value.found).endswith("bytes free")
    assert_untouched(target)


def test_other_errors_of_the_system_are_not_ours_to_explain(target: Path) -> None:
    with pytest.raises(OSError, match="I/O"), disk_errors(target):
        raise OSError(errno.EIO, "I/O error")


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        write_bytes_atomically(tmp_path / "absent" / "set.h5", b"after")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file(target: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: Not a directory"):
        write_bytes_atomically(target / "set.h5", b"after")
    assert_untouched(target)


def test_files_and_folders_can_be_synced(target: Path) -> None:
    sync(target)
    sync(target.parent)


def test_old_leftovers_alone_are_removed(target: Path) -> None:
    folder = target.parent
    names = {".set.h5.1.partial": 7200, ".set.h5.2.partial": 10, "kept.partial": 7200, ".hidden": 7200}
    for name, age in names.items():
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (time.time() - age,) * 2)
    remove_stale_partials(folder)
    left = {path.name for path in folder.iterdir()}
    assert left == {"set.h5", ".set.h5.2.partial", "kept.partial", ".hidden"}
    remove_stale_partials(folder / "absent")


ARRAYS = {"scores": np.random.default_rng(0).random((1, 50)), "tokens": np.arange(50, dtype=np.int32)}


def packed(save: Callable[..., None], **arrays: Any) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def holds_arrays(path: Path) -> bool:
    with np.load(path, allow_pickle=False) as held:
        return set(held) == set(ARRAYS) and all(np.array_equal(held[name], ARRAYS[name]) for name in ARRAYS)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_whole_zip_is_known(save: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "kept.npz"
    assert not is_whole_zip(path)
    content = packed(save, **ARRAYS)
    path.write_bytes(content)
    assert is_whole_zip(path)
    for length in (0, 1, 30, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        assert not is_whole_zip(path)
    assert not is_whole_zip(tmp_path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("flips", [1, 3])
def test_a_zip_with_wrong_bits_is_not_whole_or_holds_what_it_held(
    flips: int, save: Callable[..., None], tmp_path: Path
) -> None:
    """Every other time in the headers, where zipfile raises errors of many kinds; dates and the like may be wrong."""
    path, content, rng = tmp_path / "kept.npz", packed(save, **ARRAYS), random.Random(0)
    directory = content.index(b"PK\x01\x02")
    broken = 0
    for number in range(3000):
        wrong = bytearray(content)
        for _ in range(flips):
            place = rng.randrange(directory if number % 2 else 0, len(wrong))
            wrong[place] ^= 1 << rng.randrange(8)
        path.write_bytes(wrong)
        if is_whole_zip(path):
            assert wrong == content or holds_arrays(path)
        else:
            broken += 1
    assert 1000 < broken < 3000, "some were broken, and some not where it matters"


def test_a_zip_whose_directory_lost_members_is_not_whole(tmp_path: Path) -> None:
    """One wrong bit: a directory of no length, and a comment that takes the member behind it."""
    path, content = tmp_path / "kept.npz", bytearray(packed(np.savez, fourteen_chars=np.arange(9)))
    assert content[-10] == 64, "the length of a directory of one member, of a name of 18 letters"
    path.write_bytes(content)
    assert is_whole_zip(path)
    content[-10] = 0
    path.write_bytes(content)
    assert not is_whole_zip(path)
    content = bytearray(packed(np.savez, **ARRAYS))
    content[content.index(b"PK\x01\x02") + 33] = 1  # the first member's comment: 256 bytes
    path.write_bytes(content)
    assert not is_whole_zip(path)
