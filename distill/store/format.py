"""Format 1 of a set: every name, dtype, attribute, limit, chunk and filter of the file is decided here.

Decisions, and why:

- Images are (N, H, W, Ch). Any image library shows a row as it is, and `permute(0, 3, 1, 2)` of what is read
  is a PyTorch tensor (N, Ch, H, W) in channels_last memory without a copy.
- Text is UTF-8 JSON in 1-d uint8 datasets. Attributes end at 64 KiB, and variable-length strings live in
  HDF5's global heap, which has no checksum and takes more code to read than everything else here together.
- Attributes are scalars: fixed-length strings and integers. What a set means is in datasets only, so that the
  sha256 of the datasets covers it.
- Filters are shuffle, gzip and fletcher32: part of every HDF5 library, no plugin is ever loaded.
- Labels of views are read batch by batch, in any order, and hardly shrink. From MAPPED_BYTES on, an array of soft
  labels is therefore one piece of the file, without filters, which any program can map into memory.
- The file is written in HDF5's 1.10 layout, whose metadata carry checksums and which stores a dataset of one
  chunk without a B-tree; HDF5 reads it since 1.10 (2016).
- Numbers are little-endian whatever machine writes them.

docs/format.md explains the format to readers; this file imports no torch, so that metadata are read at once.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

FORMAT = "distill set"
FORMAT_VERSION = 1
LIBVER = ("v110", "v110")

# Root attributes. `complete` is written last: a file without it was never finished.
FORMAT_ATTRIBUTE = "format"
VERSION_ATTRIBUTE = "format_version"
CONTENT_ATTRIBUTE = "content_sha256"
COMPLETE_ATTRIBUTE = "complete"
ROOT_ATTRIBUTES = frozenset({FORMAT_ATTRIBUTE, VERSION_ATTRIBUTE, CONTENT_ATTRIBUTE, COMPLETE_ATTRIBUTE})
# The one attribute of a dataset.
SHA256_ATTRIBUTE = "sha256"

IMAGES = "images"
CLASSES = "classes"
TRAIN_RECIPE = "train_recipe"
PROVENANCE = "provenance"
LABELS = "labels"
HARD = "labels/hard"
CODEC = "labels/codec"
SOFT = "labels/soft"
MEAN = "preprocessing/mean"
STD = "preprocessing/std"
ZCA = "preprocessing/zca"
ZCA_INVERSE = "preprocessing/zca_inverse"
ZCA_MEAN = "preprocessing/zca_mean"
INDICES = "selection/indices"
WEIGHTS = "selection/weights"
SCORES = "selection/scores"
SELECTION_META = "selection/meta"
ROWS = "selection/rows"
DOCUMENT_FILES = "documents/files"
DOCUMENT_FILE = "documents/file"
DOCUMENT_ROW = "documents/row"
DOCUMENT_DIGEST = "documents/digest"

GROUPS = frozenset({LABELS, SOFT, "preprocessing", "selection", "documents"})


@dataclass(frozen=True)
class Spec:
    """What a dataset may be: numpy dtype strings, and its number of dimensions (None: 1 to 8)."""

    dtypes: tuple[str, ...]
    ndim: int | None


TEXT = Spec(("|u1",), 1)
_SOFT_ARRAY = Spec(("|u1", "<u2", "<u4", "|i1", "<i2", "<i4", "<i8", "<f2", "<f4", "<f8"), None)
_SOFT_NAME = re.compile(r"labels/soft/[a-z][a-z0-9_]{0,62}")
MAX_NDIM = 8

REQUIRED: Mapping[str, Spec] = {
    IMAGES: Spec(("|u1", "<f2"), 4),
    CLASSES: TEXT,
    HARD: Spec(("<i8",), 1),
    MEAN: Spec(("<f8",), 1),
    STD: Spec(("<f8",), 1),
    TRAIN_RECIPE: TEXT,
    PROVENANCE: TEXT,
}
# A set of documents has these, and nothing of images.
DOCUMENTS: Mapping[str, Spec] = {
    DOCUMENT_FILES: TEXT,
    DOCUMENT_FILE: Spec(("<i4",), 1),
    DOCUMENT_ROW: Spec(("<i8",), 1),
    DOCUMENT_DIGEST: Spec(("<u8",), 1),
    INDICES: Spec(("<i8",), 1),
    WEIGHTS: Spec(("<f4",), 1),
    SCORES: Spec(("<f4",), 1),
    SELECTION_META: TEXT,
    PROVENANCE: TEXT,
}
# Optional datasets; those of one mapping come together or not at all.
OPTIONAL: tuple[Mapping[str, Spec], ...] = (
    {ZCA: Spec(("<f4",), 2), ZCA_INVERSE: Spec(("<f4",), 2), ZCA_MEAN: Spec(("<f4",), 1)},
    {INDICES: Spec(("<i8",), 1), WEIGHTS: Spec(("<f4",), 1), SCORES: Spec(("<f4",), 1), SELECTION_META: TEXT},
    {ROWS: Spec(("<i8",), 1)},
)
# A dataset that stands only beside another.
BESIDE: Mapping[str, str] = {ROWS: INDICES}
_SPECS: Mapping[str, Spec] = {
    **REQUIRED,
    **DOCUMENTS,
    **{name: spec for together in OPTIONAL for name, spec in together.items()},
    CODEC: TEXT,
}

# Limits, checked before anything is read or allocated.
MAX_MEMBERS = 32  # links of one group; format 1 needs 7, later codecs a few more
MAX_ATTRIBUTES = 4
MAX_ATTRIBUTE_BYTES = 256
MAX_TEXT_BYTES = 16 << 20
MAX_ARRAY_BYTES = 64 << 30
# Chunks written are at most CHUNK_BYTES, chunks read at most MAX_CHUNK_BYTES. The second bounds what HDF5
# allocates for a chunk whose gzip stream inflates to more than the chunk: 1032 x 1 MiB, freed at once.
CHUNK_BYTES = 256 << 10
MAX_CHUNK_BYTES = 1 << 20
MAPPED_BYTES = 1 << 20
# gzip cannot shrink below 1/1032 (Deutsch, RFC 1951: at best 258 bytes for 2 bits). Constant images come
# close to it and are allowed where any machine has the memory; a large array of data compresses 1 to 20
# times, so that a ratio above 100 is a bomb: 64 GiB from a file of 62 MiB.
MAX_RATIO = 1032
LARGE_BYTES = 256 << 20
MAX_LARGE_RATIO = 100
# A chunk that gzip cannot shrink is stored as it is; fletcher32 adds 4 bytes. zlib may add 5 bytes a 16 KiB
# and 6.
CHUNK_SLACK_BYTES = 1024

FILTERS = frozenset({1, 2, 3})  # HDF5's numbers of deflate (gzip), shuffle, fletcher32
STORAGE: Mapping[str, Any] = {
    "compression": "gzip",
    "compression_opts": 6,
    "shuffle": True,
    "fletcher32": True,
}


def may_be_mapped(name: str) -> bool:
    """Whether dataset `name` may be one piece of the file, without chunks and filters."""
    return _SOFT_NAME.fullmatch(name) is not None


def storage(name: str, shape: tuple[int, ...], itemsize: int) -> Mapping[str, Any]:
    """How h5py is to store a dataset."""
    if may_be_mapped(name) and itemsize * math.prod(shape) >= MAPPED_BYTES:
        return {}
    return {"chunks": chunk_shape(shape, itemsize), **STORAGE}


def spec_of(name: str) -> Spec | None:
    """What dataset `name` may be, None where format 1 has no dataset of this name."""
    if _SOFT_NAME.fullmatch(name):
        return _SOFT_ARRAY
    return _SPECS.get(name)


def holds_documents(names: Iterable[str]) -> bool:
    """Whether a file with datasets `names` is a set of documents, and not one of images."""
    return any(name.startswith("documents/") for name in names)


def unfit(names: Iterable[str]) -> list[str]:
    """The datasets that do not belong into a file with datasets `names`: images beside documents."""
    present = set(names)
    return sorted(present - DOCUMENTS.keys()) if holds_documents(present) else []


def missing(names: Iterable[str]) -> list[str]:
    """The datasets that a file with datasets `names` lacks."""
    present = set(names)
    if holds_documents(present):
        return sorted(DOCUMENTS.keys() - present)
    expected = set(REQUIRED) | {BESIDE[name] for name in present & BESIDE.keys()}
    for together in OPTIONAL:
        if (present | expected) & set(together):
            expected |= set(together)
    if any(name.startswith(f"{SOFT}/") for name in present):
        expected.add(CODEC)
    return sorted(expected - present)


def chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Whole rows of the first axis, as many as CHUNK_BYTES holds; a larger row is cut along the next axis.

    For images this is: whole images to a chunk, and large images in bands of rows. One chunk for each small
    image would cost more in index and gzip headers than in pixels.
    """
    row_bytes = itemsize
    for size in shape[1:]:
        row_bytes *= size
    if row_bytes > CHUNK_BYTES:
        return (1, *chunk_shape(shape[1:], itemsize))
    return (min(shape[0], CHUNK_BYTES // row_bytes), *shape[1:])


def digest(dtype: np.dtype[Any], shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> str:
    """sha256 (hex) of the line `<dtype> <shape>`, such as "<f2 1,10,5", then of the array's bytes in C order.

    Args:
        dtype, shape: of the whole array.
        parts: the array in pieces along its first axis, in order.
    """
    state = hashlib.sha256(f"{dtype.str} {','.join(map(str, shape))}\n".encode())
    for part in parts:
        state.update(np.ascontiguousarray(part).data)
    return state.hexdigest()


def content_digest(digests: Mapping[str, str]) -> str:
    """sha256 (hex) of a whole set: over the lines `<name> <sha256>` of its datasets, in order of name."""
    return hashlib.sha256(
        "".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode()
    ).hexdigest()


def encode_json(value: Any) -> np.ndarray:
    """JSON text as uint8 (bytes,): keys sorted, ASCII escapes, so that equal values are equal bytes.

    Raises:
        ValueError: `value` holds something that JSON does not give back: NaN, a key that is no string, an
            object.
    """
    text = json.dumps(_plain(value), sort_keys=True, allow_nan=False, separators=(",", ":"))
    return np.frombuffer(text.encode(), dtype=np.uint8)


def decode_json(data: np.ndarray) -> Any:
    """The value of a text dataset, uint8 (bytes,).

    Raises:
        ValueError: not UTF-8, not JSON, or nested beyond reason.
    """
    try:
        return json.loads(data.tobytes().decode(), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is not None:
            raise ValueError(f"key {wrong!r} is no string")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{type(value).__name__} {value!r} has no JSON form")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
