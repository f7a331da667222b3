"""Writing files so that a reader sees the whole of one or nothing, whatever happens in between."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from distill.errors import InputError

PARTIAL = ".partial"
_STALE_SECONDS = 3600.0
_ZIP_END = struct.Struct("<4s6sH10s")  # signature, disks, members, sizes and places


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path` in one move.

    The file and its folder are synced, so that the move survives a power cut. On any error, Ctrl-C included, the
    temporary file is removed and `path` stays as it was.

    Raises:
        InputError: the folder is not writable, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    with disk_errors(path):
        try:
            write(partial)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def write_bytes_atomically(path: Path, data: bytes | memoryview) -> None:
    """`write_atomically` for content that is at hand."""

    def write(partial: Path) -> None:
        partial.write_bytes(data)

    write_atomically(path, write)


def remove_stale_partials(folder: Path) -> None:
    """Remove temporary files that killed runs left in `folder`; younger ones may be another process's work."""
    for partial in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            if time.time() - partial.stat().st_mtime > _STALE_SECONDS:
                partial.unlink()


def is_whole_zip(path: Path) -> bool:
    """Whether an npz, or another zip file without a comment, has all its members, with the checksums that it holds."""
    # A wrong bit in its headers may ask for a password, a compression that there is none of, a later version, a member
    # beyond the end...: zipfile says so by errors of many kinds.
    with suppress(Exception), zipfile.ZipFile(path) as held:
        return len(held.namelist()) == _members(path) and held.testzip() is None
    return False


def _members(path: Path) -> int:
    """How many the end of a zip file says that there are; a wrong length in its directory hides some from zipfile."""
    with path.open("rb") as file:
        file.seek(-_ZIP_END.size, os.SEEK_END)
        signature, _, count, _ = _ZIP_END.unpack(file.read(_ZIP_END.size))
    return int(count) if signature == b"PK\x05\x06" else -1


def sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder, and syncs its entries with the file
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reserve(path: Path) -> None:
    """Have the disk give a mapped file all of its room now: a full disk later would kill the process that writes."""
    if not hasattr(os, "posix_fallocate"):
        return
    handle = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(handle, 0, path.stat().st_size)
    finally:
        os.close(handle)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write at `path` into one clear error (exit code 2)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                "the disk is full",
                where=str(path),
                found=_free(path),
                fix="free some space, or write elsewhere",
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOENT, errno.EEXIST):
            raise InputError(
                f"cannot be written: {os.strerror(error.errno)}",
                where=str(path),
                fix="choose a folder that you may write to",
            ) from error
        raise


def _free(path: Path) -> str | None:
    folder = path if path.is_dir() else path.parent
    try:
        return f"{shutil.disk_usage(folder).free} bytes free"
    except OSError:
        return None
