"""Looking after a cache's folder: what it holds, whether it is whole, and making room."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.cache import text_passes
from distill.cache.folder import is_cache, locked_alone, read_description, refuse_other_format
from distill.cache.identity import producer_version
from distill.cache.networks import read_facts
from distill.cache.shards import MANIFEST, Shard, shard_ranges, state_of
from distill.cache.trajectories import HEADER, damaged_experts, experts_held, marks_in
from distill.errors import InputError
from distill.files import PARTIAL, disk_errors, is_whole_zip

_DAY = 86400.0


@dataclass(frozen=True)
class Entry:
    """One thing that the cache keeps: the rows of a quantity, a network, or trajectories.

    Args:
        kind: such as `features`, `network`, `trajectories`.
        path: a folder, or a file.
        told: what it is of, for people.
        bytes: on disk.
        used: when it was last asked for, in seconds since 1970.
        whole: share of it that is there, 0 to 1.
        obsolete: made by a version whose results are not used any more.
    """

    kind: str
    path: Path
    told: str
    bytes: int
    used: float
    whole: float
    obsolete: bool = False


def entries(folder: Path) -> list[Entry]:
    """Everything in the cache, the one that was used last first.

    Raises:
        InputError: there is no cache, or one of another format.
    """
    _refuse_other(folder)
    found = [*_rows(folder), *_networks(folder), *_trajectories(folder), *_text(folder)]
    return sorted(found, key=lambda entry: (-entry.used, entry.path.name))


def damaged(folder: Path) -> Iterator[tuple[Path, bool]]:
    """Every checksummed file of the cache, and every expert's mark, with whether it is whole; all bytes are read.

    Raises:
        InputError: there is no cache, or one of another format.
    """
    _refuse_other(folder)
    for path in sorted(folder.rglob("*")):
        checksum = _checksum(path)
        if checksum is not None:
            state = state_of(path, checksum)
            if state != "gone":  # a run has put newer sums, or a newer network, in its place
                yield path, state == "whole"
    for header in sorted((folder / "trajectories").glob(f"*/{HEADER}")):
        broken = damaged_experts(header.parent)
        for expert, sha256 in marks_in(header.parent).items():
            yield header.parent / f"expert-{expert:05d}.{sha256}", expert not in broken
    for path in sorted((folder / text_passes.FOLDER).glob("*/*.npz")):
        yield path, is_whole_zip(path)


def surplus(found: Sequence[Entry], *, max_bytes: int | None, unused_days: float | None) -> list[Entry]:
    """What to remove: obsolete entries, those unused for so many days, and the longest unused beyond so many bytes."""
    oldest_kept = -1.0 if unused_days is None else time.time() - unused_days * _DAY
    removed = [entry for entry in found if entry.obsolete or entry.used < oldest_kept]
    if max_bytes is None:
        return removed
    kept = sorted((entry for entry in found if entry not in removed), key=lambda entry: entry.used)
    total = sum(entry.bytes for entry in kept)
    for entry in kept:
        if total <= max_bytes:
            break
        removed.append(entry)
        total -= entry.bytes
    return removed


def remove(folder: Path, unwanted: Sequence[Entry]) -> None:
    """Remove these entries, and what killed runs left half-written.

    Raises:
        InputError: a run uses the cache, or a file cannot be removed.
    """
    with locked_alone(folder):
        for entry in unwanted:
            with disk_errors(entry.path):
                _remove_folder(entry.path) if entry.path.is_dir() else entry.path.unlink(missing_ok=True)
        for partial in folder.rglob(f".*{PARTIAL}"):
            with disk_errors(partial):
                partial.unlink(missing_ok=True)


def remove_damaged(folder: Path, paths: Sequence[Path]) -> None:
    """Remove damaged files, which will then be computed again.

    Raises:
        InputError: a run uses the cache, or a file cannot be removed.
    """
    with locked_alone(folder):
        for path in paths:
            with disk_errors(path):
                path.unlink(missing_ok=True)


def _remove_folder(folder: Path) -> None:
    """What tells of the folder goes last, so that an interrupted removal leaves nothing untold."""
    for path in folder.iterdir():
        if path.name not in (MANIFEST, HEADER):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    shutil.rmtree(folder)


def _refuse_other(folder: Path) -> None:
    if not is_cache(folder):
        raise InputError(
            "there is no cache",
            where=str(folder),
            fix="name its folder with --folder, or in the environment variable DISTILL_CACHE",
        )
    refuse_other_format(folder)


def _rows(folder: Path) -> Iterator[Entry]:
    for place in _folders(folder / "rows"):
        facts = read_description(place / MANIFEST)
        parts = facts.get("parts", {})
        yield Entry(
            kind=str(parts.get("kind", "unknown")),
            path=place,
            told=_told(parts) if parts else _unreadable(place),
            bytes=_size(place),
            used=_used(place, MANIFEST),
            whole=_share(place, int(facts.get("rows", 0))) if facts else 0.0,
            # What no manifest tells of may still be served: the key decides.
            obsolete=_is_obsolete(facts, str(parts.get("kind", "unknown"))),
        )


def _folders(place: Path) -> list[Path]:
    """One for every key, with or without a manifest."""
    return sorted(path for path in place.glob("*") if path.is_dir())


def _unreadable(path: Path) -> str:
    return f"key {path.name[:8]}, not readable"


def _used(place: Path, told_by: str) -> float:
    """When the folder was last asked for: the time of its manifest, or its own where there is none."""
    for path in (place / told_by, place):
        with suppress(FileNotFoundError):
            return path.stat().st_mtime
    return 0.0


def _told(parts: dict[str, Any]) -> str:
    """Rows in words: of which data and network, and what beside."""
    network, data = parts.get("network", {}), str(parts.get("data", ""))
    others = {
        key: value
        for key, value in parts.items()
        if key not in ("kind", "network", "data", "shard_rows", "dtype", "rows", "work_bytes")
    }
    options = ", ".join(
        f"{key} {json.dumps(value)}" for key, value in others.items() if value not in (["*"], False)
    )
    return (
        f"{parts.get('rows')} images of {data[:8]}, network {str(network.get('weights', ''))[:8]}, {options}"
    )


def _share(folder: Path, rows: int) -> float:
    """Share of the rows that is on disk."""
    ranges = shard_ranges(rows)
    if not ranges:
        return 1.0
    spans = {shard.span for path in folder.glob("rows-*.npy") if (shard := Shard.of(path, "rows"))}
    summed = [shard.span.stop for path in folder.glob("sums-*.npy") if (shard := Shard.of(path, "sums"))]
    if summed:
        return max(summed) / rows
    return sum(len(span) for span in ranges if span in spans) / rows


def _networks(folder: Path) -> Iterator[Entry]:
    for path in sorted((folder / "networks").glob("*.npz")):
        with suppress(FileNotFoundError):  # a run has put a newer one in its place
            facts = path.stat()
            made = _facts_of_network(path)
            told = _told_of_network(made) if made else _unreadable(path)
            obsolete = _is_obsolete(made, "network")
            yield Entry("network", path, told, facts.st_size, facts.st_mtime, 1.0, obsolete)


def _facts_of_network(path: Path) -> dict[str, Any]:
    """How it was made; empty for a file that cannot be read, of which `distill cache verify` tells."""
    try:
        return read_facts(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return {}


def _is_obsolete(facts: Mapping[str, Any], kind: str) -> bool:
    """Whether another version made it. Of what tells nothing nothing is known, and the key may still serve it."""
    return bool(facts) and facts.get("producer") != producer_version(kind)


def _told_of_network(facts: Mapping[str, Any]) -> str:
    trained = f"{facts.get('model', 'network')}, {facts.get('epochs', '?')} epochs"
    return f"{trained}, trained on {str(facts.get('data', ''))[:8]}"


def _trajectories(folder: Path) -> Iterator[Entry]:
    for place in _folders(folder / "trajectories"):
        parts = read_description(place / HEADER).get("parts", {})
        done, room = len(marks_in(place)), experts_held(place)
        yield Entry(
            "trajectories",
            place,
            _told_of_experts(done, parts) if parts else _unreadable(place),
            _size(place),
            _used(place, HEADER),
            done / room if room else 0.0,
            _is_obsolete(parts, "trajectories"),
        )


def _told_of_experts(done: int, parts: dict[str, Any]) -> str:
    model = parts.get("model", {}).get("name", "unknown")
    return f"{done} experts, {model}, {len(parts.get('epochs', []))} checkpoints, {str(parts.get('data', ''))[:8]}"


def _text(folder: Path) -> Iterator[Entry]:
    for place in _folders(folder / text_passes.FOLDER):
        facts = read_description(place / MANIFEST)
        parts = facts.get("parts", {})
        kind, pieces = str(parts.get("kind", "unknown")), int(parts.get("pieces", 0))
        yield Entry(
            kind=kind,
            path=place,
            told=_told_of_text(parts) if parts else _unreadable(place),
            bytes=_size(place),
            used=_used(place, MANIFEST),
            whole=min(text_passes.pieces_held(place) / pieces, 1.0) if pieces else 0.0,
            obsolete=_is_obsolete(facts, kind),
        )


def _told_of_text(parts: dict[str, Any]) -> str:
    grams = f"1 to {parts.get('n')}-grams in {parts.get('buckets')} buckets by {parts.get('hash')}"
    return f"{parts.get('files')} files of {parts.get('bytes')} bytes, {str(parts.get('corpus', ''))[:8]}, {grams}"


def _checksum(path: Path) -> str | None:
    """The sha256 that the name of one of our files carries."""
    parts = path.name.split(".")
    if len(parts) == 3 and parts[2] in ("npy", "npz") and len(parts[1]) == 64:
        return parts[1]
    return None


def _size(folder: Path) -> int:
    """Bytes of the folder's files; those that a run removes meanwhile do not count."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
