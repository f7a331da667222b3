"""`distill export` of a set of documents: the documents themselves, from the files of the corpus, or where they lie.

jsonl      the records as they stand: lines of JSON byte for byte, rows of parquet as objects, text as {"text": ...}
parquet    columns `text`, `file`, `row` and `score`; U+FFFD stands for what is no UTF-8
indices    a JSON object a line, in the order of the set; the corpus is not read

Documents are written in the order of the corpus: each file is read once, and one document is in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from distill.contracts import DocumentSet, Progress, Task
from distill.errors import DamagedDataError, InputError
from distill.files import write_atomically
from distill.progress import NullProgress
from distill.set_recipe import read_provenance, recipe_of_set
from distill.store.reader import read_documents
from distill.text import Corpus, digest, would_be_read
from distill.text.data import TextConfig
from distill.text.records import Record, read_records

Written = Literal["jsonl", "parquet"]
Form = Literal["jsonl", "parquet", "indices"]
_UNREAD = ("target", "evaluate")
_ROWS = 4096  # of a parquet row group, at most ...
_ROW_BYTES = 64 << 20  # ... or so many bytes of text


@dataclass(frozen=True)
class Placed:
    """A document on its way out.

    Args:
        record: what it is.
        file: name of its file.
        score: of the set.
    """

    record: Record
    file: str
    score: float


def export_documents(path: Path, overrides: Sequence[str], *, to: Form, out: Path, progress: Progress) -> int:
    """Write a set of documents, or where they lie; how many.

    Args:
        path: the set.
        overrides: `data.key=value` changes to its recipe, such as where the files lie.
        to, out: the form, and the file to be written.
        progress: where it is told.

    Raises:
        InputError: files that are not there or are others, a place among them, a full disk.
        DamagedDataError: the set or a file is damaged.
    """
    documents = read_documents(path)
    if to == "indices":
        if overrides:
            raise InputError("the corpus is not read", where=overrides[0], fix="leave it out")
        write_indices(documents, out)
        return len(documents)
    _refuse_among_corpus(out, documents, path, overrides)
    write_chosen(documents, corpus_of(documents, path, overrides, progress), out, to=to, progress=progress)
    return len(documents)


def corpus_of(documents: DocumentSet, path: Path, overrides: Sequence[str], progress: Progress) -> Corpus:
    """The corpus that a set was chosen from, by its recipe and the arguments.

    Raises:
        InputError: nobody says where the files are, or they are not those of the set.
    """
    made = read_provenance(documents, where=str(path))
    loaded, _ = recipe_of_set(path, made, overrides, progress=progress, without=_UNREAD)
    config = loaded.recipe.data
    if not isinstance(config, TextConfig):
        raise DamagedDataError("the set holds documents, and its recipe names no text", where=str(path))
    corpus = config.open()
    _refuse_absent(documents, corpus)
    return corpus


def _refuse_absent(documents: DocumentSet, corpus: Corpus) -> None:
    """Raise InputError where a file that holds a document of the set is not there; others beside do not matter."""
    absent = sorted(set(documents.files) - {file.name for file in corpus.files})
    if absent:
        raise InputError(
            "files that the documents were chosen from are not there",
            where="data.files",
            found=f"{len(corpus.files)} files, and no {absent[0]} among them",
            fix="name all files as they were, data.files=[...]: their names are told from the folder that they share",
        )


def write_chosen(
    documents: DocumentSet, corpus: Corpus, out: Path, *, to: Written, progress: Progress
) -> None:
    """Write the documents of a set, whole or not at all.

    Raises:
        InputError: a file of the corpus has changed, or the disk refuses.
        DamagedDataError: a document is not where the set says.
    """
    with progress.task(f"write documents as {to}", total=len(documents), unit="document") as task:
        placed = _counted(_placed(documents, corpus), task)
        write = _write_lines if to == "jsonl" else _write_parquet
        write_atomically(out, lambda partial: write(placed, partial))
    progress.note(f"wrote {len(documents)} documents to {out}")


def write_indices(documents: DocumentSet, out: Path) -> None:
    """Write where the documents lie: JSON lines with index, file, row, weight and score, in the order of the set."""
    selection = documents.selection
    columns = (selection.indices, documents.file, documents.row, selection.weights, selection.scores)

    def write(partial: Path) -> None:
        # Names of files may be no UTF-8; JSON has escapes for them.
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as lines:
            for index, file, row, weight, score in zip(*map(np.ndarray.tolist, columns), strict=True):
                told = {"index": index, "file": documents.files[file], "row": row}
                lines.write(json.dumps({**told, "weight": weight, "score": score}, ensure_ascii=False) + "\n")

    write_atomically(out, write)


def _placed(documents: DocumentSet, corpus: Corpus) -> Iterator[Placed]:
    """Every document, file by file in the order of the corpus, row by row; refused where it is not what was chosen."""
    by_name = {file.name: file for file in corpus.files}
    order = np.lexsort((documents.row, documents.file))
    bounds = np.searchsorted(documents.file[order], np.arange(len(documents.files) + 1))
    for number in sorted(range(len(documents.files)), key=documents.files.__getitem__):
        own = order[bounds[number] : bounds[number + 1]]
        name, scores = documents.files[number], documents.selection.scores[own].tolist()
        file, digests = by_name[name], documents.digest[own].tolist()
        records = read_records(file, corpus.config, documents.row[own])
        for record, score, expected in zip(records, scores, digests, strict=True):
            if digest(record.text) != expected:
                raise InputError(
                    "this is not the document that was chosen: the file has changed since",
                    where=f"{file.path}, row {record.row + 1}",
                    fix="name the files as they were, data.files=..., or choose again",
                )
            yield Placed(record, name, score)


def _counted(placed: Iterator[Placed], task: Task) -> Iterator[Placed]:
    for each in placed:
        yield each
        task.advance()


def _write_lines(placed: Iterable[Placed], path: Path) -> None:
    with path.open("wb") as lines:
        for each in placed:
            lines.write(each.record.line + b"\n")


def _write_parquet(placed: Iterable[Placed], path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    schema = pyarrow.schema(
        [
            ("text", pyarrow.string()),
            ("file", pyarrow.string()),
            ("row", pyarrow.int64()),
            ("score", pyarrow.float32()),
        ]
    )
    with ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in _groups(placed):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))


def _groups(placed: Iterable[Placed]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for each in placed:
        file = each.file.encode("utf-8", "backslashreplace").decode()
        rows.append(
            {"text": _utf8(each.record.text), "file": file, "row": each.record.row, "score": each.score}
        )
        size += len(each.record.text)
        if len(rows) == _ROWS or size > _ROW_BYTES:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _utf8(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which JSON may hold and parquet may not."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _refuse_among_corpus(out: Path, documents: DocumentSet, path: Path, overrides: Sequence[str]) -> None:
    """Raise InputError where the file to be written would be taken for one of the corpus by the next run."""
    try:
        made = read_provenance(documents, where=str(path))
        loaded, _ = recipe_of_set(path, made, overrides, progress=NullProgress(), without=_UNREAD)
    except (InputError, DamagedDataError):
        return  # told where the corpus is asked for
    config = loaded.recipe.data
    if isinstance(config, TextConfig) and would_be_read(out, config.corpus_config(config.files).files):
        raise InputError(
            "the corpus is read from there, and what is exported would be taken for some of it",
            where=str(out),
            found=f"a place among {config.files}",
            fix="name a place outside of the corpus with --out",
        )
