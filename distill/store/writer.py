"""Writes a set: whole and verified, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from distill.contracts import DistilledSet, DocumentSet, Preprocessing, Selection, SoftLabels
from distill.errors import DamagedDataError, InputError
from distill.files import write_atomically
from distill.store import format as fmt
from distill.store.archive import open_archive
from distill.store.checks import check_documents, check_set
from distill.store.sparse import SparseFile


def write_set(distilled: DistilledSet, path: Path) -> None:
    """Write a set to `path`, in the place of what was there.

    The file is built in memory, but for arrays that lie in one piece, written to a temporary name in the same
    folder, read back and verified, synced, and renamed. The same set gives the same bytes (with the same versions
    of h5py and its zlib).

    Raises:
        InputError: the folder cannot be written, or the disk is full.
        DamagedDataError: the set breaks its contract (labels out of range, NaN, ...), or what was written
            does not read back.
    """
    check_set(distilled)
    _write(_pack(distilled), path)


def write_documents(documents: DocumentSet, path: Path) -> None:
    """Write a set of documents, as `write_set` does one of images."""
    check_documents(documents)
    _write(_pack_documents(documents), path)


def _write(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write the datasets of a set, by name."""
    if path.is_dir():
        raise InputError("is a folder", where=str(path), fix="name the file to be written, such as set.h5")
    image, pieces = _build(arrays)

    def write(partial: Path) -> None:
        image.copy_to(partial, pieces)
        _verify(partial, path)

    write_atomically(path, write)


def _verify(partial: Path, path: Path) -> None:
    try:
        with open_archive(partial) as archive:
            for name in archive.arrays:
                archive.verify(name)
    except DamagedDataError as error:
        raise DamagedDataError(
            "what was written does not read back", where=str(path), found=str(error)
        ) from error


def _build(arrays: dict[str, np.ndarray]) -> tuple[SparseFile, list[tuple[int, np.ndarray]]]:
    """The HDF5 file that holds `arrays`, made in order of name; and those it has room for only, with their places."""
    image = SparseFile()
    digests: dict[str, str] = {}
    pieces = []
    with h5py.File(image, "w", libver=fmt.LIBVER) as file:
        for name in sorted(arrays):
            array = arrays[name]
            storage = fmt.storage(name, array.shape, array.itemsize)
            if storage:
                dataset = file.create_dataset(name, data=array, track_times=False, **storage)
            else:
                dataset = _reserve(file, name, array)
                pieces.append((dataset.id.get_offset(), array))
            digests[name] = fmt.digest(array.dtype, array.shape, [array])
            dataset.attrs[fmt.SHA256_ATTRIBUTE] = np.bytes_(digests[name])
        file.attrs[fmt.FORMAT_ATTRIBUTE] = np.bytes_(fmt.FORMAT)
        file.attrs[fmt.VERSION_ATTRIBUTE] = np.int64(fmt.FORMAT_VERSION)
        file.attrs[fmt.CONTENT_ATTRIBUTE] = np.bytes_(fmt.content_digest(digests))
        file.attrs[fmt.COMPLETE_ATTRIBUTE] = np.uint8(1)
    return image, pieces


def _reserve(file: h5py.File, name: str, array: np.ndarray) -> h5py.Dataset:
    """A dataset in one piece that has its place and no content yet."""
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return file.create_dataset(name, shape=array.shape, dtype=array.dtype, track_times=False, dcpl=properties)


def _pack(distilled: DistilledSet) -> dict[str, np.ndarray]:
    """The datasets of a set, by name, little-endian."""
    arrays = {
        fmt.IMAGES: distilled.images.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy(),
        fmt.HARD: distilled.labels.cpu().numpy(),
        fmt.CLASSES: _text(fmt.CLASSES, distilled.classes),
        fmt.TRAIN_RECIPE: _text(fmt.TRAIN_RECIPE, distilled.train.model_dump(mode="json")),
        fmt.PROVENANCE: _text(fmt.PROVENANCE, distilled.provenance),
        **_pack_preprocessing(distilled.preprocessing),
        **(_pack_soft(distilled.soft) if distilled.soft else {}),
        **(_pack_selection(distilled.selection) if distilled.selection else {}),
    }
    return _little_endian(arrays)


def _pack_documents(documents: DocumentSet) -> dict[str, np.ndarray]:
    """The datasets of a set of documents, likewise."""
    arrays = {
        fmt.DOCUMENT_FILES: _text(fmt.DOCUMENT_FILES, documents.files),
        fmt.DOCUMENT_FILE: documents.file,
        fmt.DOCUMENT_ROW: documents.row,
        fmt.DOCUMENT_DIGEST: documents.digest,
        fmt.PROVENANCE: _text(fmt.PROVENANCE, documents.provenance),
        **_pack_selection(documents.selection),
    }
    return _little_endian(arrays)


def _little_endian(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in arrays.items()}


def _pack_preprocessing(preprocessing: Preprocessing) -> dict[str, np.ndarray]:
    arrays = {
        fmt.MEAN: np.array(preprocessing.mean, dtype=np.float64),
        fmt.STD: np.array(preprocessing.std, dtype=np.float64),
    }
    for name, array in (
        (fmt.ZCA, preprocessing.zca),
        (fmt.ZCA_INVERSE, preprocessing.zca_inverse),
        (fmt.ZCA_MEAN, preprocessing.zca_mean),
    ):
        if array is not None:
            arrays[name] = array
    return arrays


def _pack_soft(soft: SoftLabels) -> dict[str, np.ndarray]:
    facts = {"codec": soft.codec, "attributes": soft.attributes}
    return {
        fmt.CODEC: _text(fmt.CODEC, facts),
        **{f"{fmt.SOFT}/{name}": array for name, array in soft.arrays.items()},
    }


def _pack_selection(selection: Selection) -> dict[str, np.ndarray]:
    arrays = {
        fmt.INDICES: selection.indices,
        fmt.WEIGHTS: selection.weights,
        fmt.SCORES: selection.scores,
        fmt.SELECTION_META: _text(fmt.SELECTION_META, selection.meta),
    }
    return arrays if selection.rows is None else {**arrays, fmt.ROWS: selection.rows}


def _text(name: str, value: Any) -> np.ndarray:
    try:
        text = fmt.encode_json(value)
    except ValueError as error:
        raise DamagedDataError(f"{name} cannot be stored as JSON", found=str(error)) from error
    if len(text) > fmt.MAX_TEXT_BYTES:
        raise DamagedDataError(
            f"{name} is too long", found=f"{len(text)} bytes", allowed=f"at most {fmt.MAX_TEXT_BYTES} bytes"
        )
    return text
