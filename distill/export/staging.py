"""A folder that is there whole or not at all: it is filled under another name and renamed at the end."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill.errors import InputError
from distill.files import PARTIAL, disk_errors, sync


def refuse_occupied(out: Path) -> None:
    """Raise InputError where something other than an empty folder or file is in the way."""
    if out.name in ("", ".."):
        raise InputError("this names a folder that is there already", where="--out", found=str(out))
    with disk_errors(out):
        if not out.is_symlink() and not out.exists():
            return
        empty = not any(out.iterdir()) if out.is_dir() else out.is_file() and out.stat().st_size == 0
    if out.is_symlink() or not empty:
        raise InputError(
            "something is there already",
            where=str(out),
            found="a link"
            if out.is_symlink()
            else "a folder that is not empty"
            if out.is_dir()
            else "a file",
            fix="name another place with --out, or remove it",
        )


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place once all is well; on any error it is removed.

    Raises:
        InputError: the disk is full, or the place cannot be written to.
    """
    staging = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}{PARTIAL}")
    with disk_errors(out):
        staging.mkdir(parents=True)
        try:
            yield staging
            _flush()
            if out.exists():
                out.rmdir()  # empty, or it is refused here
            staging.rename(out)
            sync(out.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _flush() -> None:
    """Have what was written reach the disk, so that the renamed folder survives a power cut whole.

    One call for all of it: a call a file would take most of the time that small images do.
    """
    if hasattr(os, "sync"):
        os.sync()
