"""Advisory locks that end with the process, however it ends."""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; users of one folder are then not told apart
    fcntl = None  # type: ignore[assignment]


class Lock:
    """A lock on a file, held until `release`, the object's end or the process's end.

    Args:
        path: created where it is absent and may be; another user's file, which may only be read, can still be locked.
        shared: whether others may hold it shared at the same time.
    """

    def __init__(self, path: Path, *, shared: bool) -> None:
        self.path = path
        self.shared = shared
        self._end: weakref.finalize | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Whether the lock was had; with `wait`, once those who hold it let it go."""
        while True:
            handle = self._open()
            if not self._had(handle, wait=wait):
                os.close(handle)
                return False
            if _is_at(handle, self.path):
                break
            os.close(handle)  # who held it removed the file: others will lock the next one of that name
        self._end = weakref.finalize(self, _close, handle)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Let the lock go, if it is held; with `remove`, the file goes first."""
        if self._end is None or not self._end.alive:
            return
        if remove:
            with suppress(OSError):
                self.path.unlink()
        self._end()

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_CREAT | os.O_RDWR, 0o666)
        except PermissionError:
            return os.open(self.path, os.O_RDONLY)

    def _had(self, handle: int, *, wait: bool) -> bool:
        if fcntl is None:
            return True
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        try:
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _close(handle: int) -> None:
    with suppress(OSError):
        os.close(handle)
