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
        path: created where it is absent and may be; a file that may only be read can still be locked.
        shared: whether others may hold it shared at the same time.
    """

    def __init__(self, path: Path, *, shared: bool) -> None:
        self.path = path
        self.shared = shared
        self._handle: int | None = None
        self._end: weakref.finalize | None = None

    def take(self, *, wait: bool = False) -> bool:
        """Whether the lock was had; with `wait`, once those who hold it let it go."""
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o666)
        except PermissionError:
            handle = os.open(self.path, os.O_RDONLY)
        if fcntl is not None:
            kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
            try:
                fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return False
        self._handle = handle
        self._end = weakref.finalize(self, _close, handle)
        return True

    def release(self) -> None:
        if self._end is not None:
            self._end()


def _close(handle: int) -> None:
    with suppress(OSError):
        os.close(handle)
