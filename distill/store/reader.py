"""Reads a set that anyone may have made: `archive` refuses what could harm, this file gives the set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from distill.contracts import DistilledSet, DocumentSet, Preprocessing, Selection, SoftLabels
from distill.errors import DamagedDataError, InputError
from distill.store import format as fmt
from distill.store.archive import Archive, open_archive
from distill.store.checks import check_documents, check_set
from distill.training.config import TrainConfig


def read_set(path: Path, *, verify: bool = True) -> DistilledSet:
    """Read a set; nothing in it is ever executed or unpickled.

    Args:
        path: the file.
        verify: compare every array with its sha256.

    Returns:
        The set; its images (N, Ch, H, W) are in channels_last memory, a view of what is stored.

    Raises:
        InputError: no such file, or it may not be read.
        DamagedDataError: no HDF5 file, truncated, unfinished, another version, a wrong sha256, or a broken
            contract.
        UnsafeFileError: the file could do harm; see `archive`.
        MemoryExhaustedError: it does not fit the host's memory.
    """
    with open_archive(path) as archive:
        if fmt.holds_documents(archive.arrays):
            raise InputError(
                "is a set of documents, where one of images is read",
                where=str(path),
                fix="look at it with `distill inspect`, and write its documents with `distill export --to jsonl`",
            )
        distilled = _Unpacking(archive, verify).distilled()
    with _damage_in(path):
        check_set(distilled)
    return distilled


def read_documents(path: Path, *, verify: bool = True) -> DocumentSet:
    """Read a set of documents.

    Args, raises: as `read_set`.
    """
    with open_archive(path) as archive:
        if not fmt.holds_documents(archive.arrays):
            raise InputError("is a set of images, where one of documents is read", where=str(path))
        documents = _Unpacking(archive, verify).documents()
    with _damage_in(path):
        check_documents(documents)
    return documents


def is_of_documents(path: Path) -> bool:
    """Whether a set is one of documents. Errors: as `read_set`."""
    with open_archive(path) as archive:
        return fmt.holds_documents(archive.arrays)


@contextmanager
def _damage_in(path: Path) -> Iterator[None]:
    """Name the file in what is wrong with its content."""
    try:
        yield
    except DamagedDataError as error:
        raise DamagedDataError(
            error.what, where=str(path), found=error.found, allowed=error.allowed, fix=error.fix
        ) from error


class _Unpacking:
    """One pass over an open archive."""

    def __init__(self, archive: Archive, verify: bool) -> None:
        self.archive = archive
        self.verify = verify

    def distilled(self) -> DistilledSet:
        images = torch.from_numpy(self._array(fmt.IMAGES)).permute(0, 3, 1, 2)
        return DistilledSet(
            images=images,
            labels=torch.from_numpy(self._array(fmt.HARD)),
            classes=self._names(fmt.CLASSES),
            preprocessing=self._preprocessing(),
            train=self._train(),
            soft=self._soft() if fmt.CODEC in self.archive.arrays else None,
            selection=self._selection() if fmt.INDICES in self.archive.arrays else None,
            provenance=self._facts(fmt.PROVENANCE),
        )

    def documents(self) -> DocumentSet:
        return DocumentSet(
            selection=self._selection(),
            files=self._names(fmt.DOCUMENT_FILES),
            file=self._array(fmt.DOCUMENT_FILE),
            row=self._array(fmt.DOCUMENT_ROW),
            digest=self._array(fmt.DOCUMENT_DIGEST),
            provenance=self._facts(fmt.PROVENANCE),
        )

    def _array(self, name: str) -> Any:
        """The array in this machine's byte order, which torch asks for."""
        array = self.archive.read(name, verify=self.verify)
        return array.astype(array.dtype.newbyteorder("="), copy=False)

    def _facts(self, name: str) -> dict[str, Any]:
        return self.archive.document(name, dict, verify=self.verify)

    def _wrong(self, name: str, found: str, allowed: str) -> DamagedDataError:
        return DamagedDataError(
            "the text does not hold what belongs here",
            where=f"{self.archive.path}, dataset {name}",
            found=found,
            allowed=allowed,
        )

    def _names(self, name: str) -> tuple[str, ...]:
        names = self.archive.document(name, list, verify=self.verify)
        if not all(isinstance(each, str) for each in names):
            raise self._wrong(name, "something else", "a list of names")
        return tuple(names)

    def _train(self) -> TrainConfig:
        try:
            return TrainConfig.model_validate(self._facts(fmt.TRAIN_RECIPE))
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise self._wrong(fmt.TRAIN_RECIPE, f"{place}: {problem['msg']}", "a train recipe") from error

    def _preprocessing(self) -> Preprocessing:
        zca = {}
        if fmt.ZCA in self.archive.arrays:
            names = {"zca": fmt.ZCA, "zca_inverse": fmt.ZCA_INVERSE, "zca_mean": fmt.ZCA_MEAN}
            zca = {field: self._array(name) for field, name in names.items()}
        mean, std = self._array(fmt.MEAN), self._array(fmt.STD)
        return Preprocessing(mean=tuple(mean.tolist()), std=tuple(std.tolist()), **zca)

    def _soft(self) -> SoftLabels:
        facts = self._facts(fmt.CODEC)
        codec, attributes = facts.get("codec"), facts.get("attributes")
        if not isinstance(codec, str) or not isinstance(attributes, dict):
            raise self._wrong(fmt.CODEC, ", ".join(facts), "codec and attributes")
        prefix = f"{fmt.SOFT}/"
        names = [name for name in self.archive.arrays if name.startswith(prefix)]
        return SoftLabels(codec, {name.removeprefix(prefix): self._array(name) for name in names}, attributes)

    def _selection(self) -> Selection:
        return Selection(
            indices=self._array(fmt.INDICES),
            weights=self._array(fmt.WEIGHTS),
            scores=self._array(fmt.SCORES),
            meta=self._facts(fmt.SELECTION_META),
            rows=self._array(fmt.ROWS) if fmt.ROWS in self.archive.arrays else None,
        )
