"""A set as FOLDER/CLASS/IMAGE, as `data.name=folder` and torchvision read it, with indices.jsonl beside."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from distill.contracts import DistilledSet
from distill.errors import InputError
from distill.exporting.indices import facts, line
from distill.exporting.names import FileNames, class_folders
from distill.exporting.pictures import Picture

Link = Literal["hard", "symbolic"]

INDICES = "indices.jsonl"
# A folder called `train` would be read as the training split, and no class can have the name of the file above.
_RESERVED = ("train", INDICES)


def write_folder(
    distilled: DistilledSet, pictures: Iterable[Picture], root: Path, *, link: Link | None
) -> None:
    """Write each image into the folder of its class.

    Args:
        distilled: the set.
        pictures: its images, in its order.
        root: an empty folder.
        link: the kind of links to make, where all pictures are files; None copies them.

    Raises:
        InputError: a class that can have no folder, or a file system without such links.
    """
    folders = class_folders(distilled.classes, reserved=_RESERVED)
    names = FileNames()
    with (root / INDICES).open("xb") as lines:
        for picture in pictures:
            folder = folders[int(distilled.labels[picture.number])]
            name = names.name(folder, picture.file, number=picture.number, suffix=picture.suffix)
            (root / folder).mkdir(exist_ok=True)
            _put(picture, root / folder / name, link)
            told = facts(distilled, picture.number, path=picture.path)
            lines.write(line({**told, "file": f"{folder}/{name}"}))


def _put(picture: Picture, place: Path, link: Link | None) -> None:
    if link is None:
        with place.open("xb") as file:
            file.write(picture.encoded())
        return
    assert isinstance(picture.payload, Path), "refused before"
    original = picture.payload.resolve()
    try:
        if link == "hard":
            os.link(original, place)
        else:
            place.symlink_to(original)
    except OSError as error:
        raise InputError(
            f"a {link} link cannot be made",
            where="--link",
            found=f"{error.strerror}, for {original}",
            fix="use --link symbolic, or copy without --link"
            if link == "hard"
            else "copy the files, without --link",
        ) from error
