"""What a set must satisfy beyond its types, before it is written and after it is read."""

from __future__ import annotations

import math

import numpy as np
import torch

from distill.contracts import DistilledSet, DocumentSet, Preprocessing, Selection
from distill.errors import DamagedDataError
from distill.labels import codecs

# float32 weights of mean 1 are off by rounding only; a sum in place of a mean is off by far more.
_MEAN_TOLERANCE = 1e-4


def check_set(distilled: DistilledSet) -> None:
    """Raise DamagedDataError, naming the part, where a set breaks the contract of `DistilledSet`."""
    _check_images(distilled.images)
    _check_labels(distilled)
    _check_preprocessing(distilled.preprocessing, tuple(distilled.images.shape[1:]))
    if distilled.soft is not None:
        codecs.check(distilled.soft, images=len(distilled.images), classes=len(distilled.classes))
    if distilled.selection is not None:
        _check_selection(distilled.selection, len(distilled.images))


def check_documents(documents: DocumentSet) -> None:
    """Raise DamagedDataError, naming the part, where a set breaks the contract of `DocumentSet`."""
    count, files = len(documents.row), len(documents.files)
    _require(count > 0, "the set holds no document", found="0", allowed="1 or more")
    _check_selection(documents.selection, count, of="documents")
    infinite = int((~np.isfinite(documents.selection.scores)).sum())
    _require(
        infinite == 0, "scores of documents are not finite", found=f"{infinite} of {count}", allowed="numbers"
    )
    for name, array, dtype in (
        ("file", documents.file, np.int32),
        ("row", documents.row, np.int64),
        ("digest", documents.digest, np.uint64),
    ):
        _require(
            array.dtype == dtype and array.shape == (count,),
            f"documents/{name} does not match the others",
            found=f"{array.dtype} {array.shape}",
            allowed=f"{np.dtype(dtype)} ({count},)",
        )
    _require(
        int(documents.file.min()) >= 0
        and int(documents.file.max()) < files
        and int(documents.row.min()) >= 0,
        "documents lie in files that the set does not name",
        found=f"files {int(documents.file.min())} to {int(documents.file.max())}",
        allowed=f"0 to {files - 1}, rows from 0",
    )
    _require(
        len(set(documents.files)) == files,
        "a file is named twice",
        found=f"{len(set(documents.files))} names of {files}",
        allowed="each file once",
    )
    order = np.lexsort((documents.row, documents.file))
    file, row = documents.file[order], documents.row[order]
    twice = int(((file[1:] == file[:-1]) & (row[1:] == row[:-1])).sum())
    _require(
        twice == 0,
        "documents are not distinct",
        found=f"{twice} of {count} more than once",
        allowed="each document at most once",
    )


def _require(sound: bool, what: str, *, found: object, allowed: str) -> None:
    if not sound:
        raise DamagedDataError(what, found=str(found), allowed=allowed)


def _check_images(images: torch.Tensor) -> None:
    _require(
        images.dtype in (torch.uint8, torch.float16) and images.ndim == 4 and images.numel() > 0,
        "the images of a set have the wrong form",
        found=f"{images.dtype} {tuple(images.shape)}",
        allowed="uint8 or float16 (N, Ch, H, W), none of them 0",
    )
    if images.is_floating_point():
        broken = int((~images.isfinite()).flatten(1).any(dim=1).sum())
        _require(
            broken == 0,
            "images of the set hold NaN or infinite pixels",
            found=f"{broken} of {len(images)} images",
            allowed="finite pixels",
        )


def _check_labels(distilled: DistilledSet) -> None:
    labels, count = distilled.labels, len(distilled.classes)
    _require(
        labels.dtype == torch.int64 and labels.shape == (len(distilled.images),),
        "hard labels do not match the images",
        found=f"{labels.dtype} {tuple(labels.shape)}",
        allowed=f"torch.int64 ({len(distilled.images)},)",
    )
    wrong = labels[(labels < 0) | (labels >= count)]
    _require(
        len(wrong) == 0,
        f"{len(wrong)} labels are out of range",
        found=", ".join(map(str, wrong[:5].tolist())),
        allowed=f"0 to {count - 1}, the {count} classes",
    )


def _check_preprocessing(preprocessing: Preprocessing, image_shape: tuple[int, ...]) -> None:
    mean, std, channels = preprocessing.mean, preprocessing.std, image_shape[0]
    _require(
        len(mean) == len(std) == channels and all(map(math.isfinite, (*mean, *std))) and min(std) > 0,
        "mean and std do not fit the images",
        found=f"mean {mean}, std {std}",
        allowed=f"{channels} finite numbers each, std above 0",
    )
    arrays = (preprocessing.zca, preprocessing.zca_inverse, preprocessing.zca_mean)
    if all(array is None for array in arrays):
        return
    size = math.prod(image_shape)
    for array, shape in zip(arrays, [(size, size), (size, size), (size,)], strict=True):
        _require(
            array is not None
            and array.dtype == np.float32
            and array.shape == shape
            and bool(np.isfinite(array).all()),
            "the ZCA arrays do not fit the images",
            found="none" if array is None else f"{array.dtype} {array.shape}",
            allowed=f"zca, zca_inverse and zca_mean together, finite float32 {shape}",
        )


def _check_selection(selection: Selection, images: int, *, of: str = "images") -> None:
    for name, array, dtype in (
        ("indices", selection.indices, np.int64),
        ("weights", selection.weights, np.float32),
        ("scores", selection.scores, np.float32),
        ("rows", selection.rows, np.int64),
    ):
        if array is None:  # rows: sets of before they were kept have none
            continue
        _require(
            array.dtype == dtype and array.shape == (images,),
            f"selection {name} do not match the {of}",
            found=f"{array.dtype} {array.shape}",
            allowed=f"{np.dtype(dtype)} ({images},)",
        )
    for name, numbers in (("indices", selection.indices), ("rows", selection.rows)):
        if numbers is None:
            continue
        distinct = len(np.unique(numbers))
        _require(
            distinct == images and int(numbers.min()) >= 0,
            f"selection {name} are not distinct and non-negative",
            found=f"{distinct} distinct of {images}, the least {int(numbers.min())}",
            allowed="each sample at most once",
        )
    weights = selection.weights
    mean = float(weights.mean(dtype=np.float64))
    _require(
        bool((weights >= 0).all()) and abs(mean - 1) <= _MEAN_TOLERANCE,
        "selection weights are not weights of mean 1",
        found=f"mean {mean:g}, least {float(weights.min()):g}",
        allowed="mean 1, none below 0",
    )
