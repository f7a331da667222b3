"""Locks end with their holder, and a lock file that is removed takes nobody else's lock along."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from distill import locks as locks_module
from distill.locks import Lock

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs advisory locks")


def test_one_holder_or_many_that_share(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    alone = Lock(path, shared=False)
    assert alone.take()
    assert not Lock(path, shared=False).take()
    assert not Lock(path, shared=True).take()
    alone.release()
    sharing = [Lock(path, shared=True) for _ in range(2)]
    assert all(lock.take() for lock in sharing)
    assert not Lock(path, shared=False).take()


def test_a_lock_ends_with_its_object(tmp_path: Path) -> None:
    assert Lock(tmp_path / "lock", shared=False).take()
    assert Lock(tmp_path / "lock", shared=False).take()


def test_a_removed_file_is_not_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened just before its holder removed it: a third process would make a file of that name and lock it too."""
    path = tmp_path / "lock"
    holder, late, third = (Lock(path, shared=False) for _ in range(3))
    assert holder.take()
    opened = Lock._open

    def open_then_remove(lock: Lock) -> int:
        monkeypatch.setattr(Lock, "_open", opened)
        handle = opened(lock)
        holder.release(remove=True)
        return handle

    monkeypatch.setattr(Lock, "_open", open_then_remove)
    assert late.take()
    assert path.exists()
    assert not third.take()


def test_releasing_twice_removes_nobody_elses_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = Lock(path, shared=False), Lock(path, shared=False)
    assert first.take()
    first.release(remove=True)
    assert second.take()
    first.release(remove=True)
    assert path.exists()


def test_waiting(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = Lock(path, shared=False), Lock(path, shared=False)
    assert first.take()
    threading.Timer(0.1, lambda: first.release(remove=True)).start()
    assert second.take(wait=True)
    assert path.exists()


def test_a_file_that_may_only_be_read_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    path.touch()
    true_open = os.open

    def refuse_writing(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", str(path))
        return true_open(path, flags, mode)

    monkeypatch.setattr(locks_module.os, "open", refuse_writing)
    lock = Lock(path, shared=False)
    assert lock.take()
    assert not Lock(path, shared=False).take()
