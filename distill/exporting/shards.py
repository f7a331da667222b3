"""A set as tar shards, which `data.name=webdataset` and the WebDataset library read.

A sample is NUMBER.cls (its class number), NUMBER.json (see `indices`) and NUMBER.EXTENSION (the image), NUMBER being
its position in the set, in 8 digits. classes.txt has the class names, escaped as those of folders are. The same set
gives the same bytes: members are sorted, and have no time and no owner.
"""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import count
from pathlib import Path

from distill.contracts import DistilledSet
from distill.data.decode import Item
from distill.data.shards import IMAGE_EXTENSIONS, LABEL_EXTENSION
from distill.errors import InputError
from distill.exporting.indices import facts
from distill.exporting.names import class_folders
from distill.exporting.pictures import Picture, suffix_of

CLASSES = "classes.txt"
DEFAULT_SHARD_BYTES = 10**9

Members = Sequence[tuple[str, bytes]]


def check_kinds(files: Iterable[Item]) -> None:
    """Raise InputError where some files are of a kind that shards do not hold; none is read."""
    others: Counter[str] = Counter()
    first = ""
    for file in files:
        suffix = suffix_of(file.file)
        if _extension(suffix) not in IMAGE_EXTENSIONS:
            first = first or file.name
            others[suffix] += 1
    if others:
        raise InputError(
            "shards do not hold files of this kind",
            where=first,
            found=", ".join(f"{count} of {suffix}" for suffix, count in sorted(others.items())),
            allowed=", ".join(sorted(IMAGE_EXTENSIONS)),
            fix="use --to folder, or write the set's own images with --pixels",
        )


def write_shards(
    distilled: DistilledSet,
    pictures: Iterable[Picture],
    root: Path,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write train-000000.tar and so on.

    Args:
        distilled: the set.
        pictures: its images, in its order, of shards' kinds.
        root: an empty folder.
        shard_bytes: the most that a shard takes, unless one sample alone takes more.

    Raises:
        InputError: class names that cannot be told apart.
    """
    names = class_folders(distilled.classes)
    (root / CLASSES).write_text("".join(f"{name}\n" for name in names), encoding="utf-8", newline="\n")
    samples = (_sample(distilled, picture) for picture in pictures)
    waiting = next(samples, None)
    for number in count():
        if waiting is None:
            return
        with tarfile.open(root / f"train-{number:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
            waiting = _fill(shard, waiting, samples, shard_bytes)


def _fill(shard: tarfile.TarFile, first: Members, rest: Iterator[Members], most: int) -> Members | None:
    """Add samples while they fit; the first that does not, None once there are no more."""
    size = 0
    sample: Members | None = first
    while sample is not None:
        size += sum(tarfile.BLOCKSIZE + _padded(len(data), tarfile.BLOCKSIZE) for _, data in sample)
        if sample is not first and _padded(size + 2 * tarfile.BLOCKSIZE, tarfile.RECORDSIZE) > most:
            return sample
        for name, data in sample:
            member = tarfile.TarInfo(name)  # time 0, owner 0, mode 644
            member.size = len(data)
            shard.addfile(member, BytesIO(data))
        sample = next(rest, None)
    return None


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _extension(suffix: str) -> str:
    return suffix.removeprefix(".").lower()


def _sample(distilled: DistilledSet, picture: Picture) -> Members:
    extension = _extension(picture.suffix)
    assert extension in IMAGE_EXTENSIONS, "refused before"
    label = int(distilled.labels[picture.number])
    told = json.dumps(facts(distilled, picture.number, path=picture.path))
    members = {LABEL_EXTENSION: str(label).encode(), "json": told.encode(), extension: picture.encoded()}
    return [(f"{picture.number:08d}.{each}", members[each]) for each in sorted(members)]
