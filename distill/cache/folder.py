"""The cache's folder: where it is, and the proof that it is ours.

FOLDER/distill-cache.json     the format
FOLDER/rows/KEY/              shards of one quantity (distill/cache/shards.py)
FOLDER/networks/              trained networks (distill/cache/networks.py)
FOLDER/trajectories/KEY/      training trajectories (distill/cache/trajectories.py)
FOLDER/text/KEY/              passes over corpora of text (distill/cache/text_passes.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from distill.errors import InputError
from distill.files import disk_errors, write_bytes_atomically
from distill.locks import Lock

FORMAT = 1
MARKER = "distill-cache.json"


def default_folder() -> Path:
    """DISTILL_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("DISTILL_CACHE"):
        return Path(chosen)
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "distill"


def claim(folder: Path) -> Lock:
    """Make the folder a cache, or refuse it: nothing that is not ours is written to or deleted.

    Returns:
        A shared lock, which tells `distill cache gc` that the cache is in use.

    Raises:
        InputError: the folder cannot be written (even where all rows are there: a run would find out only once it
            needs another), holds other files, or a cache of another format.
    """
    marker = folder / MARKER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # In this order: another process that claims the folder now puts the marker down before anything else.
        filled = any(not entry.name.startswith(".") for entry in folder.iterdir())
        foreign = filled and not marker.exists()
    if foreign:
        raise InputError(
            "the folder holds other files and is no cache",
            where=str(folder),
            allowed="an empty or absent folder, or an earlier cache",
            fix="set cache.folder, or the environment variable DISTILL_CACHE, to another folder",
        )
    if not marker.exists():
        write_bytes_atomically(marker, json.dumps({"format": FORMAT}).encode())
    refuse_other_format(folder)
    return _lock(folder, shared=True)


def is_cache(folder: Path) -> bool:
    """Whether a cache was ever made there."""
    return (folder / MARKER).exists()


def refuse_other_format(folder: Path) -> None:
    """Raise InputError where the cache there was written by a version with another format."""
    marker = folder / MARKER
    with disk_errors(marker):
        try:
            found = json.loads(marker.read_text())["format"]
        except (ValueError, KeyError, TypeError):
            found = None
    if found != FORMAT:
        raise InputError(
            "the cache has another format",
            where=str(marker),
            found=str(found),
            allowed=str(FORMAT),
            fix="name another folder in cache.folder or DISTILL_CACHE, or remove this one yourself",
        )


def describe(path: Path, facts: Mapping[str, Any]) -> None:
    """Write what tells of a key, for people and for `distill cache`; where it is there, note that it was used now.

    Raises:
        InputError: the file cannot be written.
    """
    text = json.dumps(facts, indent=1)
    if read_description(path) == json.loads(text):
        with suppress(OSError):  # another user's file: its time is not ours to set
            os.utime(path)
        return
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomically(path, text.encode())


def read_description(path: Path) -> dict[str, Any]:
    """What `describe` wrote; nothing where it is absent or damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    told = isinstance(found, dict) and isinstance(found.get("parts"), dict)
    return found if told else {}


@contextmanager
def locked_alone(folder: Path) -> Iterator[None]:
    """Work while no run uses the cache; InputError where one does."""
    lock = _lock(folder, shared=False)
    try:
        yield
    finally:
        lock.release()


def _lock(folder: Path, *, shared: bool) -> Lock:
    lock = Lock(folder / ".lock", shared=shared)
    with disk_errors(folder):
        had = lock.take(wait=shared)
    if not had:
        raise InputError("a run uses the cache", where=str(folder), fix="wait until it has ended")
    return lock
