"""Your own images, one folder a class.

Either FOLDER/train/CLASS/... and FOLDER/test/CLASS/... (or `val` where there is no `test`), or
FOLDER/CLASS/... alone, from which a share of each class is cut as the test split, the same images for every
seed. A folder named `train` decides: where it exists, the first form is meant. Images may lie in folders
below their class. Classes are numbered in the order of their sorted names, images follow their sorted paths;
hidden files and folders are skipped, other files are counted and told."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from distill.contracts import Progress
from distill.data.base import DEFAULT_TEST, Data, DataConfig, Fraction, Plan, existing
from distill.data.build import EncodedRows, Found
from distill.data.decode import Item, PixelFormat, image_shape
from distill.data.file_list import FileList
from distill.data.rows import entries, share_per_class
from distill.errors import InputError
from distill.machine_paths import MachinePath

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".pbm", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class FolderConfig(DataConfig):
    """Options of `folder`.

    Args:
        folder: holds the class folders, or `train` and `test`.
        test: the share of each class cut as the test split, where there is no test folder; null is 0.2 then.
    """

    name: Literal["folder"] = "folder"
    folder: Annotated[str, MachinePath()]
    test: Fraction | None = None


@dataclass(frozen=True)
class _Tree:
    """Files of one split.

    Args:
        root: the folder above the class folders.
        counts: how many images each class has, by sorted class name.
        files: the images, class by class, sorted by path within each.
        others: how many files have no image suffix.
    """

    root: Path
    counts: dict[str, int]
    files: FileList
    others: int


class Folder(Data):
    """Your images, one folder a class."""

    name = "folder"
    Config = FolderConfig
    originals = "files"

    def find(self, progress: Progress) -> Found:
        train, test, notes = self._trees()
        classes = tuple(train.counts)
        for tree, split in ((train, "training"), (test, "test")):
            if tree is not None:
                _check_classes(tree, classes)
                notes += _ignored(tree, split)
        return Found(
            train=_rows(train, classes, self._root),
            test=_rows(test, classes, self._root) if test is not None else self._share,
            classes=classes,
            notes=tuple(notes),
        )

    def peek(self) -> Plan:
        train, test, _ = self._trees()
        shape = image_shape(_item(train.files[0]), PixelFormat()) if len(train.files) else None
        classes = len(train.counts)
        if test is not None:
            return Plan(classes, shape, len(train.files), len(test.files))
        labels = _labels(train, tuple(train.counts))
        cut = int(share_per_class(labels, self._share, classes=classes).sum())
        return Plan(classes, shape, len(train.files) - cut, cut)

    def folders(self) -> list[Path]:
        """Those of the splits, and of the classes, which may be links that lead elsewhere."""
        root = Path(self.config.folder).expanduser()
        splits = [root / name for name in ("train", "test", "val")] if (root / "train").is_dir() else [root]
        return [*splits, *(below for split in splits if split.is_dir() for below in _class_folders(split))]

    @property
    def _share(self) -> float:
        return DEFAULT_TEST if self.config.test is None else self.config.test

    @property
    def _root(self) -> Path:
        return existing(self.config.folder, option="folder", folder=True)

    def _trees(self) -> tuple[_Tree, _Tree | None, list[str]]:
        root = self._root
        if not (root / "train").is_dir():
            return _tree(root), None, []
        test = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
        if test is None:
            return _tree(root / "train"), None, []
        if self.config.test is not None:
            raise InputError(
                "the data bring their own test split",
                where="data.test",
                found=f"{self.config.test}, and the folder {test}",
                fix="remove data.test",
            )
        return _tree(root / "train"), _tree(test), _which_test(root, test)


def _which_test(root: Path, test: Path) -> list[str]:
    if test.name == "val":
        return ["the folder val is the test split: there is no folder test"]
    return ["the folder val is not used"] if (root / "val").is_dir() else []


def _class_folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _tree(root: Path) -> _Tree:
    folders = _class_folders(root)
    if not folders:
        raise InputError(
            "there is no class folder",
            where=str(root),
            fix="put the images of each class in a folder of its own: FOLDER/CLASS/image.jpg",
        )
    counts: dict[str, int] = {}
    files = FileList(root)
    others = 0
    for folder in folders:
        images, rest = _files_below(folder)
        files.extend(f"{folder.name}/{image}" for image in images)
        counts[folder.name] = len(images)
        others += rest
    return _Tree(root, counts, files, others)


def _files_below(folder: Path) -> tuple[list[str], int]:
    """Paths of images relative to the folder, sorted as text, and how many files are none.

    Links to folders may be loops: not followed.
    """
    images: list[str] = []
    others = 0
    for place, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = "" if place == str(folder) else f"{Path(place).relative_to(folder).as_posix()}/"
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(SUFFIXES):
                images.append(below + name)
            else:
                others += 1
    images.sort()
    return images, others


def _unreadable(error: OSError) -> None:
    raise InputError("the folder cannot be read", where=error.filename, found=error.strerror)


def _check_classes(tree: _Tree, classes: tuple[str, ...]) -> None:
    unknown = [name for name in tree.counts if name not in classes]
    if unknown:
        raise InputError(
            f"class {unknown[0]!r} has test images but no training folder",
            where=str(tree.root / unknown[0]),
            allowed=", ".join(classes[:12]),
        )
    empty = [name for name, count in tree.counts.items() if not count]
    if empty:
        raise InputError(
            f"class {empty[0]!r} is empty",
            where=str(tree.root / empty[0]),
            allowed=f"files ending in {', '.join(sorted(SUFFIXES))}",
            fix="add images to the folder, or remove it",
        )


def _ignored(tree: _Tree, split: str) -> list[str]:
    told = f"{tree.others} files without an image suffix ignored among the {split} images"
    return [told] if tree.others else []


def _labels(tree: _Tree, classes: tuple[str, ...]) -> Tensor:
    """int64 (N,)."""
    counts = torch.tensor([tree.counts.get(name, 0) for name in classes])
    return torch.repeat_interleave(torch.arange(len(classes)), counts)


def _rows(tree: _Tree, classes: tuple[str, ...], folder: Path) -> EncodedRows:
    """The tree's images, told relative to the folder.

    Its classes are some of `classes` and sorted as they are, so rows follow labels.
    """

    def items(rows: Tensor) -> Iterator[Item]:
        return (_item(tree.files[row]) for row in entries(rows))

    return EncodedRows(_labels(tree, classes), str(tree.root), items, folder=folder)


def _item(file: Path) -> Item:
    return Item(str(file), file, file.name)
