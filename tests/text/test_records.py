"""Documents as they stand: every format gives its records whole; rows that hold no document are told."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import zstandard

from distill.errors import DamagedDataError, DistillError, InputError
from distill.text import Corpus, CorpusConfig, find_files, read_blocks, streams
from distill.text import parquet as parquet_files
from distill.text.records import Record, read_records

TEXTS = ["one", "", "zwei\tdrei", "d\u00e9j\u00e0 \u65e5\u672c", "x" * 3000, 'a "quoted" one', "last"]
LINES = [
    f'{{"id" :{number},  "text":{json.dumps(text, ensure_ascii=number % 2 == 0)}, "x": 1.0e0}}'.encode()
    for number, text in enumerate(TEXTS)
]
WRITERS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: b"\n".join(LINES),
    "a.json": lambda: b"\xef\xbb\xbf" + b"\r\n".join(LINES) + b"\r\n",
    "a.jsonl.gz": lambda: gzip.compress(b"\n".join(LINES[:2]) + b"\n") + gzip.compress(b"\n".join(LINES[2:])),
    "a.jsonl.zst": lambda: zstandard.compress(b"\n".join(LINES)),
    "a.txt": lambda: "\n".join(TEXTS).encode(),
    "a.md.gz": lambda: gzip.compress("\n".join(TEXTS).encode()),
}
KINDS = [*WRITERS, "a.parquet"]


def corpus(path: Path, **options: Any) -> Corpus:
    return find_files(CorpusConfig(files=[str(path)], **options), where="data.files")


def parquet(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path, row_group_size=3)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Corpus]:
    """write(name, **options): a corpus of this file."""

    def write(name: str, **options: Any) -> Corpus:
        path = tmp_path / name
        if name == "a.parquet":
            parquet(path, {"id": list(range(len(TEXTS))), "text": TEXTS})
        else:
            path.write_bytes(WRITERS[name]())
        return corpus(path, **options)

    return write


def records(found: Corpus, rows: Sequence[int]) -> list[Record]:
    return list(read_records(found.files[0], found.config, np.array(rows, dtype=np.int64)))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("read", [1 << 20, 11])
@pytest.mark.parametrize("rows", [[0], [6], [0, 2, 3, 4, 5, 6], [2, 5], []])
def test_every_format_gives_the_rows_that_are_asked_for(
    name: str, read: int, rows: list[int], write: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_READ", read)
    found = records(write(name), rows)
    assert [(each.row, each.text) for each in found] == [(row, TEXTS[row]) for row in rows]
    for each in found:
        assert b"\n" not in each.line
        if "json" in name:
            assert each.line == LINES[each.row], "byte for byte"
        elif name == "a.parquet":
            assert json.loads(each.line) == {"id": each.row, "text": each.text}
        else:
            assert json.loads(each.line) == {"text": each.text}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rows", "row"), [([0, 1], 2), ([1], 2), ([6, 7], 8), ([0, 900], 901), ([7], 8)])
def test_a_row_that_is_no_document_is_told(
    name: str, rows: list[int], row: int, write: Callable[..., Corpus]
) -> None:
    found = write(name)
    with pytest.raises(DamagedDataError, match="is not there") as caught:
        records(found, rows)
    assert caught.value.where == f"{found.files[0].path}, row {row}"


@pytest.mark.parametrize("line", [b"{", b'{"text": 3}', b"[]", b'{"txt": "a"}', b"", b"   "])
def test_a_line_that_cannot_be_read_is_no_document(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES[0] + b"\n" + line + b"\n" + LINES[2])
    found = corpus(tmp_path / "a.jsonl")
    assert [each.text for each in records(found, [0, 2])] == [TEXTS[0], TEXTS[2]], "nobody asked for it"
    with pytest.raises(DamagedDataError, match="is not there"):
        records(found, [0, 1, 2])


@pytest.mark.parametrize("name", ["a.txt", "a.md.gz"])
def test_a_whole_file_is_one_document(name: str, write: Callable[..., Corpus]) -> None:
    found = write(name, document="file")
    (record,) = records(found, [0])
    assert record.row == 0 and record.text == "\n".join(TEXTS)
    assert json.loads(record.line) == {"text": record.text} and b"\n" not in record.line
    with pytest.raises(DamagedDataError, match="is not there"):
        records(found, [0, 1])


def test_another_field_is_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes"}\n')
    (tmp_path / "a.txt").write_text("line\n")
    assert records(corpus(tmp_path / "a.jsonl", field="body"), [0])[0].text == "yes"
    assert json.loads(records(corpus(tmp_path / "a.txt", field="body"), [0])[0].line) == {"body": "line"}


def test_columns_that_json_does_not_know_become_text(tmp_path: Path) -> None:
    day = datetime.date(2020, 2, 3)
    columns = {"text": ["a", "größer"], "day": [day, None], "raw": [b"\xff", b""], "list": [[1, 2], None]}
    parquet(tmp_path / "a.parquet", columns)
    first, second = (json.loads(each.line) for each in records(corpus(tmp_path / "a.parquet"), [0, 1]))
    assert first == {"text": "a", "day": "2020-02-03", "raw": "/w==", "list": [1, 2]}
    assert second == {"text": "größer", "day": None, "raw": "", "list": None}


def test_records_of_parquet_are_json_that_every_reader_takes(tmp_path: Path) -> None:
    """NaN and infinities are none; bytes have no letters, wherever they stand."""
    import pyarrow

    columns = {
        "text": ["a"],
        "x": [float("nan")],
        "half": pyarrow.array(np.array([np.inf], np.float16)),
        "nested": [[{"x": float("-inf"), "y": 0.5, "raw": b"\xff"}]],
        "map": pyarrow.array([[("k", float("nan"))]], pyarrow.map_(pyarrow.string(), pyarrow.float64())),
    }
    parquet(tmp_path / "a.parquet", columns)
    (record,) = records(corpus(tmp_path / "a.parquet"), [0])
    assert orjson.loads(record.line) == {
        "text": "a", "x": None, "half": None, "nested": [{"x": None, "y": 0.5, "raw": "/w=="}], "map": [["k", None]],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_blanks_are_no_document(name: str, tmp_path: Path) -> None:
    if name == "a.parquet":
        parquet(tmp_path / name, {"text": ["a", " \t"]})
    else:
        (tmp_path / name).write_text('{"text": "a"}\n{"text": " \\t"}\n')
    with pytest.raises(DamagedDataError, match="is not there"):
        records(corpus(tmp_path / name), [1])


@pytest.mark.parametrize("most", [1, 1000, 4 << 20])
def test_records_of_parquet_are_those_of_the_table(
    most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However few rows a batch has: columns of every kind, with and without dictionaries."""
    import pyarrow
    from pyarrow.parquet import write_table

    count = 300
    rng = np.random.default_rng(0)
    texts = [f"text {number % 7}" for number in range(count)]
    table = pyarrow.table({
        "text": pyarrow.array(texts, pyarrow.large_string()),
        "raw": [None if number % 5 == 0 else f"{number % 11}" for number in range(count)],
        "kind": pyarrow.array([f"{number % 3}" for number in range(count)]).dictionary_encode(),
        "number": rng.integers(0, 9, count),
        "list": [[f"{number % 2}"] * (number % 4) for number in range(count)],
    })  # fmt: skip
    write_table(table, tmp_path / "a.parquet", row_group_size=70)
    monkeypatch.setattr(parquet_files, "_BYTES", most)
    found = corpus(tmp_path / "a.parquet")
    every = table.to_pylist()
    for rows in ([0], [69, 70, 299], [5, 6, 150], list(range(count))):
        assert [json.loads(each.line) for each in records(found, rows)] == [every[row] for row in rows]


def test_only_wanted_rows_of_wide_tables_are_made(tmp_path: Path) -> None:
    """A picture that all rows repeat, 400 MB if each had its own: a batch is small."""
    import pyarrow
    from pyarrow.parquet import write_table

    rng = np.random.default_rng(0)
    table = pyarrow.table({
        "text": [f"d {number}" for number in range(2000)],
        "same": pyarrow.array([rng.bytes(200_000)] * 2000, pyarrow.binary()),
    })  # fmt: skip
    write_table(table, tmp_path / "a.parquet")
    del table
    found = corpus(tmp_path / "a.parquet")
    allocated = pyarrow.total_allocated_bytes()
    reading = read_records(found.files[0], found.config, np.array([5, 1500]))
    for row in (5, 1500):
        assert next(reading).row == row
        assert pyarrow.total_allocated_bytes() - allocated < 200 << 20


def test_half_a_pair_of_surrogates_stays(tmp_path: Path) -> None:
    line = b'{"text": "half \\ud83d"}'
    (tmp_path / "a.jsonl").write_bytes(line)
    (record,) = records(corpus(tmp_path / "a.jsonl"), [0])
    assert (record.text, record.line) == ("half \ud83d", line)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_changed_is_refused(name: str, write: Callable[..., Corpus]) -> None:
    found = write(name)
    path = found.files[0].path
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InputError, match="has changed"):
        records(found, [0])


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_changes_while_it_is_read_is_refused(name: str, write: Callable[..., Corpus]) -> None:
    """Also where nothing behind the last of the rows is read."""
    found = write(name)
    path = found.files[0].path
    reading = read_records(found.files[0], found.config, np.array([0]))
    next(reading)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(InputError, match="has changed"):
        next(reading)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n".join(LINES))[:-12])
    found = corpus(tmp_path / "a.jsonl.gz")
    with pytest.raises(DistillError) as caught:
        records(found, [6])
    assert isinstance(caught.value, DamagedDataError)


# Blocks of which only some rows are wanted.


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("piece_bytes", [1 << 26, 200])
@pytest.mark.parametrize("read", [1 << 20, 50])
def test_wanted_rows_are_those_of_the_whole(
    name: str, piece_bytes: int, read: int, write: Callable[..., Corpus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_READ", read)
    found = write(name)
    for piece in found.pieces(piece_bytes=piece_bytes):
        every = [text for block in read_blocks(piece, found.config) for text in block.texts]
        for wanted in ([], [0], [len(every) - 1], list(range(0, len(every), 2)), list(range(len(every)))):
            wanted = [row for row in wanted if 0 <= row < len(every)]  # a piece within a long line has none
            rows = np.array(wanted, dtype=np.int64)
            read_rows: dict[int, str | None] = {}
            for block in read_blocks(piece, found.config, wanted=rows):
                assert block.first == len(read_rows) and not block.unreadable
                read_rows |= {block.first + place: text for place, text in enumerate(block.texts)}
            assert [read_rows[row] for row in wanted] == [every[row] for row in wanted]
            if not wanted:
                assert len(read_rows) <= len(every)


def test_lines_that_nobody_wants_are_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{\n{"text": "a"}\n{\n')
    found = corpus(tmp_path)
    (block,) = read_blocks(found.pieces()[0], found.config, wanted=np.array([1]))
    assert block.texts == [None, "a", None] and not block.unreadable


def test_what_comes_behind_the_last_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's end is damaged, which only who reads it sees."""
    monkeypatch.setattr(streams, "_READ", 64)
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": "".join(rng.choice(list("abcdefgh"), 200))}) for _ in range(50)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode())[:-20])
    found = corpus(tmp_path)
    (piece,) = found.pieces()
    blocks = list(read_blocks(piece, found.config, wanted=np.array([0, 3])))
    texts = [text for block in blocks for text in block.texts]
    assert texts[0] == json.loads(lines[0])["text"] and texts[3] == json.loads(lines[3])["text"]
    assert len(texts) < 50
    with pytest.raises(DamagedDataError):
        list(read_blocks(piece, found.config, wanted=np.array([49])))
