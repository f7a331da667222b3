"""What a set's file holds, for `distill inspect`. Imports no torch, so that it answers at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.errors import DamagedDataError
from distill.store import format as fmt
from distill.store.archive import Archive, StoredArray, open_archive

_DIGEST = re.compile("[0-9a-f]{40,}")


def summarise(path: Path, *, verify: bool) -> dict[str, Any]:
    """Describe a set in JSON-able values under stable names.

    `bytes` are those of the file: images and labels as stored, after compression; aux is all else, such as
    preprocessing, provenance and HDF5's own; total is the size of the file.

    Args:
        path: the file.
        verify: compare every array with its sha256; the entries of `arrays` then say `verified: true`, else
            null.

    Raises:
        InputError, DamagedDataError, UnsafeFileError: as in `open_archive`; DamagedDataError for a wrong
            sha256.
    """
    with open_archive(path) as archive:
        if verify:
            for name in archive.arrays:
                archive.verify(name)
        verified = True if verify else None
        if fmt.holds_documents(archive.arrays):
            return _document_summary(archive, verified=verified)
        return _summary(archive, verified=verified)


def _document_summary(archive: Archive, *, verified: bool | None) -> dict[str, Any]:
    files = archive.document(fmt.DOCUMENT_FILES, list, verify=False)
    return {
        "path": str(archive.path),
        "format_version": fmt.FORMAT_VERSION,
        "content_sha256": archive.content_sha256,
        "documents": {"count": archive.arrays[fmt.DOCUMENT_ROW].shape[0], "files": len(files)},
        "bytes": {"total": archive.file_bytes},
        "selection": _selection(archive),
        "provenance": archive.document(fmt.PROVENANCE, dict, verify=False),
        "arrays": _arrays(archive, verified=verified),
    }


def _summary(archive: Archive, *, verified: bool | None) -> dict[str, Any]:
    classes = archive.document(fmt.CLASSES, list, verify=False)
    return {
        "path": str(archive.path),
        "format_version": fmt.FORMAT_VERSION,
        "content_sha256": archive.content_sha256,
        "images": _form(archive.arrays[fmt.IMAGES]),
        "classes": classes,
        "images_per_class": _counts(archive, len(classes)),
        "labels": {"hard": _form(archive.arrays[fmt.HARD]), "soft": _soft(archive)},
        "bytes": _bytes(archive),
        "preprocessing": _preprocessing(archive),
        "train_recipe": archive.document(fmt.TRAIN_RECIPE, dict, verify=False),
        "selection": _selection(archive),
        "provenance": archive.document(fmt.PROVENANCE, dict, verify=False),
        "arrays": _arrays(archive, verified=verified),
    }


def _arrays(archive: Archive, *, verified: bool | None) -> list[dict[str, Any]]:
    return [
        {
            "name": array.name,
            **_form(array),
            "stored_bytes": array.stored_bytes,
            "sha256": array.sha256,
            "verified": verified,
        }
        for array in archive.arrays.values()
    ]


def _counts(archive: Archive, classes: int) -> list[int]:
    labels = archive.read(fmt.HARD, verify=False)
    if len(wrong := labels[(labels < 0) | (labels >= classes)]):
        raise DamagedDataError(
            f"{len(wrong)} labels are out of range",
            where=f"{archive.path}, dataset {fmt.HARD}",
            found=", ".join(map(str, wrong[:5].tolist())),
            allowed=f"0 to {classes - 1}, the {classes} classes",
        )
    return [int(count) for count in np.bincount(labels, minlength=classes)]


def _weights(archive: Archive) -> dict[str, float]:
    weights = archive.read(fmt.WEIGHTS, verify=False)
    if not (weights.size and np.isfinite(weights).all()):
        raise DamagedDataError(
            "selection weights are not weights of mean 1",
            where=f"{archive.path}, dataset {fmt.WEIGHTS}",
            allowed="finite numbers",
        )
    return {"least": float(weights.min()), "greatest": float(weights.max())}


def _form(array: StoredArray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": array.dtype.name}


def _soft(archive: Archive) -> dict[str, Any] | None:
    """The codec, its attributes beside it, and the form of its arrays."""
    if fmt.CODEC not in archive.arrays:
        return None
    facts = archive.document(fmt.CODEC, dict, verify=False)
    attributes = facts.get("attributes")
    prefix = f"{fmt.SOFT}/"
    return {
        **(attributes if isinstance(attributes, dict) else {}),
        "codec": facts.get("codec"),
        "arrays": {
            name.removeprefix(prefix): _form(array)
            for name, array in archive.arrays.items()
            if name.startswith(prefix)
        },
    }


def _bytes(archive: Archive) -> dict[str, int]:
    images = archive.arrays[fmt.IMAGES].stored_bytes
    prefix = f"{fmt.LABELS}/"
    labels = sum(array.stored_bytes for array in archive.arrays.values() if array.name.startswith(prefix))
    total = archive.file_bytes
    return {"images": images, "labels": labels, "aux": total - images - labels, "total": total}


def _preprocessing(archive: Archive) -> dict[str, Any]:
    return {
        "mean": archive.read(fmt.MEAN, verify=False).tolist(),
        "std": archive.read(fmt.STD, verify=False).tolist(),
        "zca": fmt.ZCA in archive.arrays,
    }


def _selection(archive: Archive) -> dict[str, Any] | None:
    if fmt.INDICES not in archive.arrays:
        return None
    return {
        "count": archive.arrays[fmt.INDICES].shape[0],
        "rows": fmt.ROWS in archive.arrays,
        "weights": _weights(archive),
        "meta": archive.document(fmt.SELECTION_META, dict, verify=False),
    }


def describe(summary: Mapping[str, Any]) -> str:
    """The summary as lines for people."""
    return _lines(summary, _document_rows(summary) if "documents" in summary else _image_rows(summary))


def _document_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    documents = summary["documents"]
    files = "1 file" if documents["files"] == 1 else f"{documents['files']:,} files"
    return [
        ("format", str(summary["format_version"])),
        ("documents", f"{documents['count']:,} in {files}; their texts are not in the set"),
        ("bytes", f"{summary['bytes']['total']:,}"),
        ("selection", _describe_choice(summary["selection"])),
        *_describe_targets(summary["selection"]["meta"].get("targets")),
        ("provenance", _pairs(summary["provenance"]) or "none"),
        ("sha256", summary["content_sha256"]),
    ]


def _describe_choice(selection: Mapping[str, Any]) -> str:
    """What documents were chosen from, as far as the set tells."""
    meta = selection["meta"]
    corpus = meta.get("corpus")
    told = [f"{selection['count']:,} documents"]
    if isinstance(corpus, dict):
        told.append(f"of {_short(corpus.get('documents'))} in {_short(corpus.get('files'))} files")
    return " ".join(told) + f"; {_short(meta.get('passed'))} passed the filter"


def _describe_targets(targets: Any) -> list[tuple[str, str]]:
    """A line for each target."""
    known = [target for target in targets if isinstance(target, dict)] if isinstance(targets, list) else []
    return [
        (
            "target" if number == 0 else "",
            f"{_short(target.get('name'))}: {_short(target.get('chosen'))} chosen for it; KL divergence "
            f"{_short(target.get('kl_corpus'))} of the corpus, {_short(target.get('kl_chosen'))} of the choice; "
            f"effective size {_short(target.get('effective'))}",
        )
        for number, target in enumerate(known)
    ]


def _image_rows(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    count, height, width, channels = summary["images"]["shape"]
    size = summary["bytes"]
    return [
        ("format", str(summary["format_version"])),
        ("images", f"{count} of {height} x {width} x {channels}, {summary['images']['dtype']}"),
        ("classes", f"{len(summary['classes'])}: {_some(summary['classes'])}"),
        ("images a class", _describe_counts(summary["images_per_class"])),
        ("labels", _describe_labels(summary["labels"])),
        (
            "bytes",
            " + ".join(f"{part} {size[part]:,}" for part in ("images", "labels", "aux"))
            + f" = {size['total']:,}",
        ),
        ("preprocessing", _describe_preprocessing(summary["preprocessing"])),
        ("train recipe", _pairs(summary["train_recipe"])),
        ("selection", _describe_selection(summary["selection"])),
        ("target", _target(summary["provenance"])),
        ("provenance", _pairs(summary["provenance"]) or "none"),
        ("sha256", summary["content_sha256"]),
    ]


def _lines(summary: Mapping[str, Any], rows: Iterable[tuple[str, str]]) -> str:
    lines = [
        summary["path"],
        *(f"  {label:<14} {text}" for label, text in rows if text),
        "",
        *_table(summary["arrays"]),
    ]
    return "\n".join(map(_printable, lines))


def _describe_counts(counts: Sequence[int]) -> str:
    """Empty where all classes have as many images."""
    least, most = min(filter(None, counts), default=0), max(counts, default=0)
    empty = f"none of {counts.count(0)} of {len(counts)} classes" if 0 in counts else ""
    if least == most and not empty:
        return ""
    return ", ".join(filter(None, [str(most) if least == most else f"{least} to {most}", empty]))


def _target(provenance: Mapping[str, Any]) -> str:
    """The data that the set resembles, by the recipe that made it; empty where that names none."""
    recipe = provenance.get("recipe")
    target = recipe.get("target") if isinstance(recipe, dict) else None
    return _short(target.get("name")) if isinstance(target, dict) else ""


def _describe_labels(labels: Mapping[str, Any]) -> str:
    soft = labels["soft"]
    if soft is None:
        return "hard"
    arrays = ", ".join(
        f"{name} {form['dtype']} {_dims(form['shape'])}" for name, form in soft["arrays"].items()
    )
    facts = {key: value for key, value in soft.items() if key not in ("codec", "arrays")}
    return f"hard; soft by codec {soft['codec']}{f' ({arrays})' if arrays else ''}, {_pairs(facts)}"


def _describe_preprocessing(preprocessing: Mapping[str, Any]) -> str:
    mean, std = (" ".join(f"{value:.4g}" for value in preprocessing[key]) for key in ("mean", "std"))
    return f"mean {mean}, std {std}{', ZCA' if preprocessing['zca'] else ''}"


def _describe_selection(selection: Mapping[str, Any] | None) -> str:
    if selection is None:
        return "none"
    known = "" if selection["rows"] else "their rows in the data not kept"
    least, greatest = selection["weights"]["least"], selection["weights"]["greatest"]
    weighted = f"weights {least:.4g} to {greatest:.4g}" if least < greatest else ""
    told = [f"{selection['count']} samples of the source", weighted, known, _pairs(selection["meta"])]
    return ", ".join(filter(None, told))


def _table(arrays: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line an array, in columns."""
    states = {True: "verified", None: "not verified"}
    rows = [
        (
            a["name"],
            a["dtype"],
            _dims(a["shape"]),
            f"{a['stored_bytes']:,}",
            a["sha256"][:12],
            states[a["verified"]],
        )
        for a in arrays
    ]
    rows.insert(0, ("array", "dtype", "shape", "bytes", "sha256", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _printable(text: str) -> str:
    """Control characters escaped: names in a file come from strangers, and terminals obey such characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _dims(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _pairs(facts: Mapping[str, Any]) -> str:
    """`key value` for each simple fact; nested ones by their keys only, the JSON form shows them whole."""
    return ", ".join(f"{key} {_short(value)}" for key, value in facts.items())


def _short(value: Any) -> str:
    """A value in few letters."""
    if isinstance(value, dict):
        return f"{{{_some(value)}}}"
    if isinstance(value, list):
        named = [_short(each) for each in value if not isinstance(each, dict | list)]
        return f"{{{_some(named)}}}" if len(named) == len(value) else f"{{{len(value)} of them}}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    return "none" if value is None else str(value)


def _some(names: Iterable[Any], limit: int = 10) -> str:
    every = [str(name) for name in names]
    return ", ".join(every[:limit]) + (f", ... {len(every) - limit} more" if len(every) > limit else "")
