"""`distill export`: a set as files that other programs read. The originals where it is a selection, else its images.

A set may come from a stranger. What it says of its data is followed only as far as the caller wants: no path in it is
(see `set_recipe`), and nothing is downloaded unless an argument asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Literal, get_args

from distill.contracts import DistilledSet, Progress, Task
from distill.data.base import Data, DataConfig
from distill.data.build import Found
from distill.data.rows import empty_classes
from distill.errors import InputError
from distill.exporting.changed import Compared
from distill.exporting.data_folders import refuse_among_data
from distill.exporting.documents import export_documents
from distill.exporting.folder import Link, write_folder
from distill.exporting.indices import write_indices
from distill.exporting.originals import Originals, check_comparable, originals_in
from distill.exporting.pictures import Picture, pixels
from distill.exporting.shards import DEFAULT_SHARD_BYTES, check_kinds, write_shards
from distill.exporting.staging import refuse_occupied, reserved, staged_folder
from distill.files import write_atomically
from distill.progress import open_progress
from distill.recipe import LoadedRecipe
from distill.registry import DATA, lookup
from distill.set_recipe import Made, read_provenance, recipe_of_set
from distill.store.reader import is_of_documents, read_set

Form = Literal["folder", "webdataset", "indices", "jsonl", "parquet"]
# What a set says of its run besides the data; a mistake or a missing path there is none of ours.
_UNREAD = ("target", "evaluate")
# What of the data decides which images a run is given: an export writes all that the set holds.
_CHOOSING = ("classes", "cap", "valid", "bad_images")
_NO_FILES = {"members": "members of archives", "pixels": "pixels in arrays"}


@dataclass(frozen=True)
class Wish:
    """What is to be exported, and how.

    Args:
        to: the form.
        out: the folder, or the file of indices.
        originals: the originals, or the set's own images (for indices: the originals' paths, or none); None is the
            originals where the set is a selection.
        link: make links to the originals in place of copies; for folders.
        shard_bytes: the most that a shard takes, unless one sample alone takes more; None is 1 GB.
    """

    to: Form
    out: Path
    originals: bool | None = None
    link: Link | None = None
    shard_bytes: int | None = None


def export(
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    to: Form,
    out: Path | str,
    originals: bool | None = None,
    link: Link | None = None,
    shard_bytes: int | None = None,
    quiet: bool = False,
) -> int:
    """Write a set as files, whole or not at all.

    Args:
        path: the set.
        overrides: `data.key=value` changes to the set's recipe, such as where the data lie.
        to, out, originals, link, shard_bytes: what is to be written, and where; see `Wish`.
        quiet: tell warnings only.

    Returns:
        How many images, or documents.

    Raises:
        InputError: options that do not go together, a place that is taken or that the data are read from, data that are
            not there, that changed or that cannot be written so, a full disk.
        DamagedDataError: the set or the data are damaged.
    """
    path = Path(path)
    wish = Wish(to, Path(out), originals, link, shard_bytes)
    _check(wish, overrides)
    refuse_occupied(wish.out)
    if is_of_documents(path):
        return _export_documents(path, overrides, wish, quiet=quiet)
    _refuse_documents(wish, path)
    distilled = read_set(path)
    _check_set(distilled, path, wish, overrides)
    refuse_among_data(wish.out, distilled, path, overrides, without=_UNREAD)
    with open_progress(None, quiet=quiet) as progress, reserved(wish.out):
        found = _originals(distilled, path, wish, overrides, progress)
        _tell_empty(distilled, progress)
        _write(distilled, found, wish, progress)
        what = "lines" if wish.to == "indices" else "images of the set" if found is None else "originals"
        progress.note(f"exported {len(distilled)} {what} to {wish.out}")
    return len(distilled)


def _export_documents(path: Path, overrides: Sequence[str], wish: Wish, *, quiet: bool) -> int:
    """Write a set of documents."""
    given = [option for option, value in (("--originals", wish.originals), ("--link", wish.link)) if value]
    if wish.to not in ("jsonl", "parquet", "indices") or given or wish.originals is False:
        raise InputError(
            "the set is one of documents",
            where=str(path),
            found=given[0] if given else "--pixels" if wish.originals is False else f"--to {wish.to}",
            allowed="--to jsonl, parquet or indices",
        )
    with open_progress(None, quiet=quiet) as progress, reserved(wish.out):
        return export_documents(path, overrides, to=wish.to, out=wish.out, progress=progress)


def _refuse_documents(wish: Wish, path: Path) -> None:
    if wish.to in ("jsonl", "parquet"):
        raise InputError(
            "the set is one of images",
            where=str(path),
            found=f"--to {wish.to}",
            allowed="--to folder, webdataset or indices",
        )


def _check(wish: Wish, overrides: Sequence[str]) -> None:
    """Refuse values that are none, and options that would be ignored."""
    for value, allowed, where in ((wish.to, Form, "--to"), (wish.link, Link, "--link")):
        if value is not None and value not in get_args(allowed):
            raise InputError(
                "there is nothing of this name",
                where=where,
                found=repr(value),
                allowed=", ".join(get_args(allowed)),
            )
    if wish.link is not None and (wish.to != "folder" or wish.originals is False):
        raise InputError(
            "links are made to originals in a folder", where="--link", fix="use --to folder without --pixels"
        )
    if wish.shard_bytes is not None and wish.to != "webdataset":
        raise InputError("there are no shards", where="--shard-bytes", allowed="--to webdataset")
    if wish.shard_bytes is not None and wish.shard_bytes < 1:
        raise InputError("no shard can be so small", where="--shard-bytes", allowed="1 byte or more")
    if overrides and wish.originals is False:
        raise InputError("the data are not read", where=overrides[0], fix="leave --pixels out")
    other = [argument for argument in overrides if argument.partition("=")[0].split(".")[0] != "data"]
    if other:
        raise InputError(
            "an export reads only the data of the recipe", where=other[0], allowed="data.KEY=VALUE"
        )


def _check_set(distilled: DistilledSet, path: Path, wish: Wish, overrides: Sequence[str]) -> None:
    """Refuse what the set does not hold, and options that would be ignored for it."""
    if distilled.selection is None:
        _refuse_made(path, wish, overrides)
        return
    if distilled.selection.rows is not None or wish.originals is False:
        return
    if wish.to != "indices" or wish.originals or overrides:
        raise InputError(
            "the set does not tell where in the data its images were found",
            where=str(path),
            allowed="a set with selection/rows",
            fix="make it again with this version of distill, or write what the set holds with --pixels",
        )


def _refuse_made(path: Path, wish: Wish, overrides: Sequence[str]) -> None:
    """Refuse to look for originals of images that a distiller made."""
    asked = [
        *(["--to indices"] if wish.to == "indices" else []),
        *(["--originals"] if wish.originals else []),
        *(["--link"] if wish.link else []),
        *overrides,
    ]
    if asked:
        raise InputError(
            "the set is no selection: its images were made, and have no originals",
            where=str(path),
            found=asked[0],
            fix="write its images with --to folder or --to webdataset",
        )


def _originals(
    distilled: DistilledSet, path: Path, wish: Wish, overrides: Sequence[str], progress: Progress
) -> Originals | None:
    """Where the originals are; None where they are not asked for, or not needed and not there."""
    selection = distilled.selection
    if wish.originals is False or selection is None or selection.rows is None:
        return None
    needed = wish.to != "indices" or bool(wish.originals or overrides)
    data = made = found = None
    with _excused(needed, progress):
        data, made = _data(distilled, path, overrides, progress)
        if wish.to == "indices" and data.originals == "pixels":
            if needed:
                raise InputError(
                    "the data are no files whose paths could be told", where=f"data.name={data.name}"
                )
            return None
    if data is None or made is None:
        return None
    _check_links(data, wish)
    check_comparable(distilled, data.config.pixel_format)
    with _excused(needed, progress):
        found = _found(data, progress)
    if found is None:
        return None
    originals = originals_in(Compared(found, data.config, made), distilled)
    if wish.to == "webdataset":
        check_kinds(originals.files())
    return originals


@contextmanager
def _excused(needed: bool, progress: Progress) -> Iterator[None]:
    """Warn of data that are not here instead, where they are not needed."""
    try:
        yield
    except InputError as error:
        if needed:
            raise
        progress.warn(f"the data are not here, and the paths of the originals left out: {error}")


def _check_links(data: Data, wish: Wish) -> None:
    if wish.link is not None and data.originals != "files":
        raise InputError(
            "the originals are no files of their own, to which links could be made",
            where="--link",
            found=f"data.name={data.name}: {_NO_FILES[data.originals]}",
            fix="copy them, without --link",
        )


def _data(
    distilled: DistilledSet, path: Path, overrides: Sequence[str], progress: Progress
) -> tuple[Data, Made]:
    """The data of the set's recipe, which download nothing unless an argument says so, and what the set says."""
    made = read_provenance(distilled, where=str(path))
    loaded, _ = recipe_of_set(path, made, overrides, progress=progress, without=_UNREAD)
    _refuse_choosing(loaded)
    config = loaded.recipe.data
    assert isinstance(config, DataConfig), "a name in distill.registry.DATA"
    if getattr(config, "download", False) and not loaded.by_argument("data", "download"):
        config = config.model_copy(update={"download": False})
    cls: type[Data] = lookup(config.name, DATA, what="data").load()
    return cls(config), made


def _refuse_choosing(loaded: LoadedRecipe) -> None:
    """Refuse arguments that would be ignored, and might be taken for a choice among the images of the set."""
    for name in _CHOOSING:
        if loaded.by_argument("data", name):
            raise InputError(
                "an export writes every image of the set, and does not read this",
                where=loaded.where("data", name),
                fix="leave it out; to have fewer, take them from the export, where indices tell classes and rows",
            )


def _found(data: Data, progress: Progress) -> Found:
    """What the data hold; where they might be downloaded and are not to be, no folder is made for them either."""
    config = data.config
    if getattr(config, "download", None) is not False:
        return data.find(progress)
    absent = InputError(
        f"{data.name} could not be found, and an export downloads nothing unasked",
        where=f"data.folder ({config.root})",
        fix="name the folder where it lies, data.folder=..., or add data.download=true",
    )
    if not config.root.is_dir():
        raise absent
    try:
        return data.find(progress)
    except InputError as error:
        absent.found = error.found
        raise absent from error


def _tell_empty(distilled: DistilledSet, progress: Progress) -> None:
    empty = empty_classes(distilled.labels, distilled.classes)
    if empty:
        names = ", ".join(map(repr, empty[:10]))
        progress.note(f"{len(empty)} of {len(distilled.classes)} classes have no image in the set: {names}")


def _write(distilled: DistilledSet, originals: Originals | None, wish: Wish, progress: Progress) -> None:
    with progress.task(f"export to {wish.to}", total=len(distilled), unit="image") as task:
        if wish.to == "indices":
            paths: Iterable[str | None] = repeat(None, len(distilled))
            if originals is not None:
                pictures = originals.pictures(spool=wish.out.parent, payloads=False)
                paths = (picture.path for picture in _counted(pictures, task))
            write_atomically(wish.out, lambda partial: write_indices(distilled, paths, partial))
            return
        with staged_folder(wish.out) as root:
            pictures = pixels(distilled, progress) if originals is None else originals.pictures(spool=root)
            if wish.to == "folder":
                write_folder(distilled, _counted(pictures, task), root, link=wish.link)
            else:
                size = wish.shard_bytes or DEFAULT_SHARD_BYTES
                write_shards(distilled, _counted(pictures, task), root, shard_bytes=size)


def _counted(pictures: Iterable[Picture], task: Task) -> Iterator[Picture]:
    for picture in pictures:
        yield picture
        task.advance()
