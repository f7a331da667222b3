"""Corpora of text: every kind of file gives the same rows, however it is cut and compressed; what is wrong is told."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from distill.errors import (
    DamagedDataError,
    DistillError,
    InputError,
    MemoryExhaustedError,
    UnsafeFileError,
)  # fmt: skip
from distill.text import Corpus, CorpusConfig, find_files, read_blocks, streams, would_be_read
from distill.text import parquet as parquet_files
from distill.text.records import read_records

TEXTS = [
    "one",
    "",
    "zwei drei",
    "d\u00e9j\u00e0 \u65e5\u672c\n\u2028line",
    'tab\tand "quotes"',
    "x" * 5000,
    "last",
]


def lines(texts: list[str], **options: Any) -> bytes:
    return b"".join(
        json.dumps({"id": n, "text": text}, **options).encode() + b"\n" for n, text in enumerate(texts)
    )


def corpus(folder: Path, **options: Any) -> Corpus:
    return find_files(CorpusConfig(files=[str(folder)], **options), where="data.files")


def rows(found: Corpus, *, piece_bytes: int = 1 << 26) -> dict[str, list[str | None]]:
    """All rows by file, with a check of their numbers."""
    every: dict[str, list[str | None]] = {}
    for piece in found.pieces(piece_bytes=piece_bytes):
        read = 0
        for block in read_blocks(piece, found.config):
            assert block.first == read and not block.unreadable
            every.setdefault(piece.file.name, []).extend(block.texts)
            read += len(block.texts)
    return every


def parquet(path: Path, texts: list[str], **options: Any) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    table = pyarrow.table({"id": list(range(len(texts))), "text": texts})
    write_table(table, path, row_group_size=2, **options)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.jsonl": lambda path: path.write_bytes(lines(TEXTS)),
    "a.ndjson": lambda path: path.write_bytes(lines(TEXTS, ensure_ascii=False)),
    "a.json": lambda path: path.write_bytes(b"\xef\xbb\xbf" + lines(TEXTS).replace(b"\n", b"\r\n")),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(lines(TEXTS[:3])) + gzip.compress(lines(TEXTS[3:]))
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(
        zstandard.compress(lines(TEXTS[:3])) + zstandard.compress(lines(TEXTS[3:]))
    ),
    "a.parquet": lambda path: parquet(path, TEXTS),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("read", [1 << 20, 7])
@pytest.mark.parametrize("piece_bytes", [1 << 26, 1, 13, 100])
def test_every_kind_of_file_gives_the_same_rows(
    name: str, read: int, piece_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_READ", read)
    WRITERS[name](tmp_path / name)
    wanted = [text or None for text in TEXTS]
    assert rows(corpus(tmp_path), piece_bytes=piece_bytes) == {name: wanted}


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
@pytest.mark.parametrize("piece_bytes", range(1, 12))
def test_lines_of_text_are_found_wherever_a_file_is_cut(end: str, piece_bytes: int, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n\nbc\n \nd e" + end, encoding="utf-8", newline="")
    wanted = ["a", None, "bc", None, "d e", *([None] if end == "\n\n" else [])]
    assert rows(corpus(tmp_path), piece_bytes=piece_bytes) == {"a.txt": wanted}


def test_a_whole_file_may_be_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\nb\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"c\nd"))
    found = corpus(tmp_path, document="file")
    assert rows(found, piece_bytes=1) == {"a.txt": ["a\nb\n"], "b.md.gz": ["c\nd"]}


def test_files_are_in_the_order_of_names_and_known_by_them(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a/1.txt", "b/10.txt", "a/ignored.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = ["a/1.txt", "b/10.txt", "b/2.txt"]
    orders = [[str(tmp_path)], [str(tmp_path / "b"), str(tmp_path / "a")], [str(tmp_path / "**" / "*.txt")]]
    found = [find_files(CorpusConfig(files=files), where="data.files") for files in orders]
    assert [[file.name for file in each.files] for each in found] == [names] * 3
    assert len({each.identity for each in found}) == 1
    (tmp_path / "a/1.txt").write_text("another size")
    assert corpus(tmp_path).identity != found[0].identity


BROKEN = [
    (b'{"text": "cut', "is no JSON"),
    (b"[1]", "is no JSON object, but list"),
    (b'{"text": 3}', "holds no text in 'text', but int"),
    (b'{"text": null}', "holds no text in 'text', but NoneType"),
    (b'{"txt": "a", "id": 1}', "has no field 'text'; it has 'txt', 'id'"),
    (b'{"text": "\xff"}', "is no JSON"),
    (b"[" * 100_000, "is no JSON"),
]


@pytest.mark.parametrize(("line", "why"), BROKEN)
def test_a_line_that_cannot_be_read_keeps_its_row(line: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["one"]) + line + b"\n" + lines(["three"]))
    found = corpus(tmp_path)
    (block,) = read_blocks(found.pieces()[0], found.config)
    assert block.texts == ["one", None, "three"]
    (unreadable,) = block.unreadable
    assert unreadable.row == 1 and unreadable.why.startswith(why)


def test_what_only_the_standard_library_reads_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half \\ud83d", "x": NaN}\n')
    assert rows(corpus(tmp_path)) == {"a.jsonl": ["half \ud83d"]}


def test_text_that_is_no_utf8_keeps_its_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\nb\xff\nc\n")
    found = corpus(tmp_path)
    (block,) = read_blocks(found.pieces()[0], found.config)
    assert block.texts == ["a", None, "c"] and "byte 1" in block.unreadable[0].why


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("document", ["line", "file"])
def test_a_document_that_is_too_long_is_refused(name: str, document: str, tmp_path: Path) -> None:
    text = "y" * 3000
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet(path, ["a", text])
    else:
        content = lines(["a", text]) if "json" in name else f"a\n{text}\n".encode()
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = corpus(tmp_path, document_bytes=2000, document=document)
    with pytest.raises(InputError, match=r"longer than a document|too long") as caught:
        list(read_blocks(found.pieces()[0], found.config))
    assert name in str(caught.value.where)
    if document == "line" and not name.endswith("parquet"):
        assert str(caught.value.where).endswith("line 2")


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    found = corpus(tmp_path)
    piece = found.pieces()[0]
    reading = read_blocks(piece, found.config)
    path.write_bytes(lines([*TEXTS, "more"]))
    with pytest.raises(InputError, match="has changed"):
        list(reading)
    path.unlink()
    with pytest.raises(InputError, match="is gone"):
        list(read_blocks(piece, found.config))


def test_a_file_that_grows_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_READ", 40)
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    found = corpus(tmp_path)
    reading = read_blocks(found.pieces()[0], found.config)
    next(reading)
    with path.open("ab") as file:
        file.write(lines(["more"]))
    with pytest.raises(InputError, match="has changed"):
        list(reading)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_that_changes_behind_the_last_wanted_row_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_READ", 40)
    path = tmp_path / name
    WRITERS[name](path)
    found = corpus(tmp_path)
    for piece in found.pieces():
        reading = read_blocks(piece, found.config, wanted=np.array([0]))
        next(reading)
        stale = read_blocks(piece, found.config, wanted=np.array([0]))
        next(stale)
        path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(InputError, match="has changed"):
            next(reading)
        stale.close()  # who ends early for reasons of their own is not told another


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "nothing", "other"])
def test_a_damaged_file_is_told(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if damage == "cut":
        content = content[:-3]
    elif damage == "flipped":
        content[middle : middle + 8] = bytes(8)
    else:
        content = bytearray(b"" if damage == "nothing" else b"no such format, of some length at least")
    path.write_bytes(content)
    if damage == "nothing" and not name.endswith("parquet"):
        assert rows(corpus(tmp_path)) == {}
        return
    with pytest.raises(DistillError) as caught:
        found = corpus(tmp_path)
        for piece in found.pieces():
            for block in read_blocks(piece, found.config):
                if block.unreadable:
                    raise DamagedDataError("a flipped byte may leave lines that are no JSON", where=name)
    assert isinstance(caught.value, DamagedDataError) and name in str(caught.value.where)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines without end, from a small file: in bounded memory, until it is out of all proportion."""
    monkeypatch.setattr(streams, "_EXPANSION_FROM", 1 << 22)
    squeezed = zlib.compressobj(9, wbits=31)
    bomb = b"".join(squeezed.compress((b"x" * 63 + b"\n") * (1 << 14)) for _ in range(20)) + squeezed.flush()
    (tmp_path / "a.txt.gz").write_bytes(bomb)
    monkeypatch.setattr(streams, "_EXPANSION", 100)
    found = corpus(tmp_path)
    with pytest.raises(UnsafeFileError, match="100 times"):
        for _ in read_blocks(found.pieces()[0], found.config):
            pass


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
def test_ends_of_lines_out_of_nothing_are_refused(name: str, tmp_path: Path) -> None:
    """Less than 100 KiB that would be 64 million rows: none of them in a list with more than a million others."""
    ends = b"\n" * (1 << 26)
    (tmp_path / name).write_bytes(
        gzip.compress(ends) if name.endswith("gz") else zstandard.compress(ends, 19)
    )
    found = corpus(tmp_path)
    blocks = []
    with pytest.raises(UnsafeFileError, match="more rows than bytes") as caught:
        for block in read_blocks(found.pieces()[0], found.config):
            blocks.append(len(block.texts))
    assert blocks == [1 << 20] and caught.value.where == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_as_many_rows_as_bytes_are_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_ROWS_FROM", 3)
    content = b"\n" * 10_000 if name == "a.txt" else b"a b\n" * 3
    squeeze = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}[name.split(".")[-1]]
    (tmp_path / name).write_bytes(squeeze(content))
    assert len(rows(corpus(tmp_path))[name]) == content.count(b"\n"), "a plain file has a byte for every row"


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("form", ["crumbs", "one"])
def test_what_is_expanded_is_split_in_even_parts(name: str, form: str, tmp_path: Path) -> None:
    """Neither crumbs, of which a long line is slow to join, nor all at once."""
    squeeze = gzip.compress if name.endswith("gz") else zstandard.compress
    parts = [b"z" * 100 + b"\n"] * 12_000 if form == "crumbs" else [(b"z" * 100 + b"\n") * 100_000]
    (tmp_path / name).write_bytes(b"".join(map(squeeze, parts)))
    (piece,) = corpus(tmp_path).pieces()
    sizes = [len(chunk) for chunk in streams._chunks(piece)]
    assert set(sizes[:-1]) == {1 << 20} and sum(sizes) == sum(map(len, parts))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_the_parts_of_a_long_line_are_joined_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is searched for an end of a line alone: what is split in all is the file, not its square."""
    line = b"0123456789" * 10_000
    content = line + b"\nshort\n" + line
    squeeze = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}[name.split(".")[-1]]
    (tmp_path / name).write_bytes(squeeze(content))
    monkeypatch.setattr(streams, "_READ", 512)
    (piece,) = corpus(tmp_path).pieces()
    split: list[int] = []

    class Watched(bytes):
        def split(self, *args: Any) -> list[bytes]:  # type: ignore[override]
            split.append(len(self))
            return bytes(self).split(*args)

        def removeprefix(self, prefix: Any) -> bytes:
            return Watched(bytes(self).removeprefix(prefix))

        def __radd__(self, other: bytes) -> bytes:
            return Watched(other + bytes(self))

    plain = streams._chunks
    monkeypatch.setattr(streams, "_chunks", lambda piece: map(Watched, plain(piece)))
    found = [each for block in streams.lines_of(piece, longest=1 << 20) for each in block]
    assert found == [line, b"short", line]
    assert sum(split) == len(content)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
@pytest.mark.parametrize("start", [0, 100])
def test_a_line_without_end_is_refused_as_soon_as_it_is_too_long(
    name: str, start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also behind the place where a file is cut: the rest of its last line is no more in memory than it may be."""
    content = b"a\n" + b"b" * (1 << 20)
    squeeze = {"txt": bytes, "gz": gzip.compress, "zst": zstandard.compress}[name.split(".")[-1]]
    (tmp_path / name).write_bytes(squeeze(content))
    monkeypatch.setattr(streams, "_READ", 100)
    piece = corpus(tmp_path).pieces(piece_bytes=start or 1 << 26)[0]
    read: list[int] = []
    plain = streams._chunks
    monkeypatch.setattr(
        streams, "_chunks", lambda piece: (read.append(len(each)) or each for each in plain(piece))
    )
    with pytest.raises(InputError, match="longer than a document") as caught:
        list(streams.lines_of(piece, longest=1000))
    assert caught.value.where == f"{tmp_path / name}, line 2"
    assert max(read) == 100 and sum(read) <= 1200


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["none*.jsonl"], "no file of text is there"),
        (["a.png"], "no file of text that is known"),
        (["empty"], "no file"),
    ],
)
def test_files_that_are_not_there_are_refused(files: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        find_files(CorpusConfig(files=[str(tmp_path / each) for each in files]), where="target.files")
    assert caught.value.where == "target.files"


def repeated(path: Path, text: str, count: int) -> None:
    """A file with one value, which `count` rows repeat."""
    import pyarrow
    from pyarrow.parquet import write_table

    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [text])
    options = {"store_schema": False, "dictionary_pagesize_limit": 1 << 30, "compression": "zstd"}
    write_table(pyarrow.table({"text": column}), path, **options)


def test_a_value_that_many_rows_repeat_is_in_memory_once(tmp_path: Path) -> None:
    """Two kilobytes that would be 80 GB: neither a list nor its texts together grow."""
    import pyarrow

    repeated(tmp_path / "a.parquet", "a b " * (1 << 21), 10_000)
    assert (tmp_path / "a.parquet").stat().st_size < 4000
    found = corpus(tmp_path)
    reading = read_blocks(found.pieces()[0], found.config)
    before = pyarrow.total_allocated_bytes()
    for number in range(5):
        block = next(reading)
        assert block.first == number and len(block.texts) == 1 and len(block.texts[0] or "") == 1 << 23
        assert pyarrow.total_allocated_bytes() - before < 300 << 20
    reading.close()


def test_a_value_that_is_too_long_is_refused_before_a_row_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated(tmp_path / "a.parquet", "\u00e9" * 1000, 10)
    at_most = corpus(tmp_path, document_bytes=2000)
    assert rows(at_most) == {"a.parquet": ["\u00e9" * 1000] * 10}
    monkeypatch.setattr(parquet_files, "_texts", None)
    found = corpus(tmp_path, document_bytes=1999)
    with pytest.raises(InputError, match="too long") as caught:
        list(read_blocks(found.pieces()[0], found.config))
    assert (caught.value.found, caught.value.allowed) == ("2000 bytes", "at most 1999"), "bytes, not letters"


@pytest.mark.parametrize("most", [1, 10, 100, 4 << 20])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("length", [0, 500])
def test_rows_of_parquet_are_those_of_the_table(
    most: int, dictionary: bool, length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many bytes a block may have; long rows stand alone, short ones fill it."""
    import pyarrow
    from pyarrow.parquet import write_table

    rng = np.random.default_rng(most)
    words = ["a", "d\u00e9j\u00e0", None, "", " \n", "x" * 50, "\u65e5" * 40]
    texts = [words[place] for place in rng.integers(0, len(words), length)]
    write_table(pyarrow.table({"text": texts}, pyarrow.schema([("text", pyarrow.string())])),
                tmp_path / "a.parquet", row_group_size=100, use_dictionary=dictionary)  # fmt: skip
    monkeypatch.setattr(parquet_files, "_BYTES", most)
    found = corpus(tmp_path)
    blocks = [block.texts for piece in found.pieces() for block in read_blocks(piece, found.config)]
    assert [text for block in blocks for text in block] == [
        text if text and text.strip() else None for text in texts
    ]
    sizes = [sum(len(text.encode()) for text in block if text) for block in blocks]
    assert all(size <= most or sum(map(bool, block)) == 1 for size, block in zip(sizes, blocks, strict=True))


def test_dictionaries_may_have_nulls_and_no_values_at_all() -> None:
    import pyarrow

    def blocks(indices: list[int | None], values: list[str | None]) -> list[list[str | None]]:
        column = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array(indices, pyarrow.int8()), pyarrow.array(values, pyarrow.string()), safe=False
        )
        return list(parquet_files._blocks(column, Path("a"), 3))

    assert blocks([1, None, 0, 2, 1], ["a", None, "bcd", "never used"]) == [[None, None, "a", "bcd", None]]
    assert blocks([None, None], []) == [[None, None]]
    assert blocks([], []) == []
    for wrong in ([0], [-1, None]):
        with pytest.raises(pyarrow.ArrowIndexError):
            blocks([*wrong], [])
    with pytest.raises(pyarrow.ArrowIndexError):
        blocks([0, 2], ["a", "b"])


@pytest.mark.parametrize("large", [True, False])
def test_categories_are_text(large: bool, tmp_path: Path) -> None:
    """As pandas writes them."""
    import pyarrow
    from pyarrow.parquet import write_table

    kind = pyarrow.large_string() if large else pyarrow.string()
    column = pyarrow.array(["a", None, "b", "a"], kind).dictionary_encode()
    write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert rows(corpus(tmp_path)) == {"a.parquet": ["a", None, "b", "a"]}


def test_categories_of_something_else_are_no_text(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(
        pyarrow.table({"text": pyarrow.array([b"a", b"b"]).dictionary_encode()}), tmp_path / "a.parquet"
    )
    found = corpus(tmp_path)
    with pytest.raises(InputError, match="no such column of text"):
        list(read_blocks(found.pieces()[0], found.config))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_blanks_are_no_document_in_any_format(name: str, tmp_path: Path) -> None:
    texts = ["a", " ", "\t \u3000", "", " b "]
    if name == "a.parquet":
        parquet(tmp_path / name, texts)
    else:
        (tmp_path / name).write_bytes(lines(texts) if "json" in name else "\n".join(texts).encode())
    assert rows(corpus(tmp_path)) == {name: ["a", None, None, None, " b "]}


def test_batches_of_parquet_are_as_the_bytes_of_a_row(tmp_path: Path) -> None:
    from pyarrow.parquet import ParquetFile

    def batch(texts: list[str]) -> int:
        parquet(tmp_path / "a.parquet", texts, use_dictionary=False)
        return parquet_files._batch_rows(ParquetFile(tmp_path / "a.parquet", read_dictionary=["text"]), 0)

    assert batch(["x", "y"]) > 100
    assert batch(["x" * 100_000, "y" * 100_000]) == 41
    assert batch(["x" * (5 << 20), "y" * (5 << 20)]) == 1
    repeated(tmp_path / "a.parquet", "x" * (1 << 20), 10_000)
    assert parquet_files._batch_rows(ParquetFile(tmp_path / "a.parquet", read_dictionary=["text"]), 0) == 64


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_parquet_with_any_bytes_wrong_is_damaged_or_read(compression: str, tmp_path: Path) -> None:
    """No error of Arrow's own: of strangers' files it raises many kinds."""
    path = tmp_path / "a.parquet"
    parquet(path, [f"doc {number}" for number in range(6)] * 2, compression=compression)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    told = 0
    for _ in range(300):
        content = np.frombuffer(whole, np.uint8).copy()
        content[rng.integers(0, len(content), rng.choice([1, 4]))] = rng.integers(0, 256)
        path.write_bytes(content.tobytes())
        try:
            found = corpus(tmp_path)
            for piece in found.pieces():
                list(read_blocks(piece, found.config))
            list(read_records(found.files[0], found.config, np.arange(12)))
        except DistillError:
            told += 1
    assert told > 100


@pytest.mark.parametrize(
    "kind", ["ArrowInvalid", "ArrowIndexError", "ArrowTypeError", "ArrowNotImplementedError"]
)
def test_every_error_of_arrow_is_damage(kind: str) -> None:
    import pyarrow

    with (
        pytest.raises(DamagedDataError, match="parquet file is damaged"),
        parquet_files._errors_told(Path("a")),
    ):
        raise getattr(pyarrow, kind)("so")


def test_memory_that_arrow_lacks_is_told() -> None:
    import pyarrow

    with pytest.raises(MemoryExhaustedError) as caught, parquet_files._errors_told(Path("a")):
        raise pyarrow.ArrowMemoryError("malloc of size 7 failed")
    assert caught.value.where == "a" and "row groups" in str(caught.value.fix)
    with pytest.raises(ZeroDivisionError), parquet_files._errors_told(Path("a")):
        raise ZeroDivisionError("our own defects are nobody's damage")


def test_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", TEXTS)
    for field, told in (("txt", "txt"), ("id", "id: int64")):
        found = corpus(tmp_path, field=field)
        with pytest.raises(InputError, match="no such column") as caught:
            list(read_blocks(found.pieces()[0], found.config))
        assert (caught.value.found, caught.value.allowed) == (told, "id, text")


PATTERNS = [
    "a", "a/b", "**", "**/*.jsonl", "*.jsonl", "*/*", "a/**", "a/**/*.txt", "a/*.tx?", "[ab]/*.txt", "**/b/*", "*/.h/*",
    "**/.h/*.txt", "a/x.txt", "./a/../a/x.txt", "**/*", "a/b/**/y.txt",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_which_places_a_corpus_would_take_for_its_own(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `find_files` finds them, were they there."""
    paths = [
        tmp_path / name
        for name in ("x.jsonl", "a/x.txt", "a/b/y.txt", "a/b/c/y.txt", "b/x.txt", "a/.h/x.txt", "a/.x.txt")
    ]
    monkeypatch.chdir(tmp_path)
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    told = {path for path in paths if would_be_read(path, [pattern])}
    for path in paths:
        path.write_text("text")
    found = find_files(CorpusConfig(files=[pattern]), where="data.files").files
    assert told == {file.path.resolve() for file in found}
    assert 0 < len(told) <= len(paths)


def test_copies_of_other_content_are_other_corpora(tmp_path: Path) -> None:
    """Same name, size and time of change, as in images of containers."""
    identities = set()
    for kind in ("one", "two"):
        path = tmp_path / kind / "corpus.jsonl"
        path.parent.mkdir()
        path.write_bytes(b"".join(b'{"text": "%s %06d"}\n' % (kind.encode(), row) for row in range(20_000)))
        os.utime(path, ns=(0, 0))
        corpus = find_files(CorpusConfig(files=[str(path)]), where="data.files")
        identities.add((corpus.identity, corpus.files[0].sample))
        assert (corpus.files[0].name, corpus.files[0].changed) == ("corpus.jsonl", 0)
    assert len(identities) == 2


def test_names_do_not_hang_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a file that is named in two ways is one."""
    for name in ("x/a.jsonl", "y/b.jsonl", "run/deep/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    found = []
    for place, up in (("run", ".."), ("run/deep", "../.."), (".", ".")):
        monkeypatch.chdir(tmp_path / place)
        files = [f"{up}/x", f"{tmp_path}/run/../x/a.jsonl", str(tmp_path / "y")]
        corpus = find_files(CorpusConfig(files=files), where="data.files")
        found.append((corpus.identity, [file.name for file in corpus.files]))
    assert found == [(found[0][0], ["x/a.jsonl", "y/b.jsonl"])] * 3


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("a.jsonl", "._a.jsonl", ".git/b.md", "c/.ipynb_checkpoints/c.jsonl", "c/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    corpus = find_files(CorpusConfig(files=[str(tmp_path)]), where="data.files")
    assert [file.name for file in corpus.files] == ["a.jsonl", "c/d.txt"]
    named = find_files(CorpusConfig(files=[str(tmp_path / "._a.jsonl")]), where="data.files")
    assert len(named.files) == 1
