"""A corpus of the text that this machine has: documentation and source code, in documents of about 3.5 KB.

Files are read as UTF-8 and cut at line ends into documents of like size; what is not UTF-8, what is there twice, and
what has lines that nobody wrote (more than 16 KB) is left out. The order is that of a hash of their paths, so that
every part of the corpus is like the whole, and every run on this machine makes the same one. The first documents of
documentation are the target and not in the corpus. Where the machine has less text than is asked for, it comes again,
each document behind a line that no other copy has.

FOLDER/corpus/NUMBER.jsonl    lines {"text": ...}, in eight files
FOLDER/sample/NUMBER.jsonl    documents of all of it, evenly spaced, in as many files as there are workers
FOLDER/target.jsonl           documentation
FOLDER/facts.json             what was asked for, and what is there (`Made`); written last
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

DOCUMENT = 3500  # bytes, about
SHORTEST_FILE = 500
LONGEST_FILE = 4 << 20
LONGEST_LINE = 16 << 10
FILES = 8
TARGET = 300  # documents

DOCUMENTATION = {".rst", ".md", ".txt"}
SOURCE = {".py", ".pyi", ".h", ".hpp", ".cuh", ".c", ".js", ".html", ".pl", ".pm", ".sh"}


@dataclass(frozen=True)
class Made:
    """A corpus.

    Attributes:
        folder: where it lies.
        megabytes, sample_megabytes, workers: what was asked for.
        bytes, documents: of the corpus.
        sample_bytes, sample_documents: of the sample.
        copies: how often the machine's text was taken, whole or in part.
    """

    folder: str
    megabytes: float
    sample_megabytes: float
    workers: int
    bytes: int
    documents: int
    sample_bytes: int
    sample_documents: int
    copies: int

    @property
    def corpus(self) -> Path:
        return Path(self.folder) / "corpus"

    @property
    def sample(self) -> Path:
        return Path(self.folder) / "sample"

    @property
    def target(self) -> Path:
        return Path(self.folder) / "target.jsonl"


def make_corpus(folder: Path, *, megabytes: float, sample_megabytes: float, workers: int) -> Made:
    """The corpus in `folder`: the one that is there if it is what is asked for, else a new one."""
    facts = folder / "facts.json"
    asked = (str(folder), megabytes, sample_megabytes, workers)
    if facts.exists():
        made = Made(**json.loads(facts.read_text()))
        if (made.folder, made.megabytes, made.sample_megabytes, made.workers) == asked:
            return made
        facts.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    paths = _text_files()
    _write([folder / "target.jsonl"], itertools.islice(_documents(paths, DOCUMENTATION), TARGET))
    copies = _Copies(paths)
    corpus = [folder / "corpus" / f"{number}.jsonl" for number in range(FILES)]
    documents, size = _write(corpus, copies.documents(), at_most=int(megabytes * 1e6))
    every = max(1, int(size / (sample_megabytes * 1e6)))
    sample = [folder / "sample" / f"{number}.jsonl" for number in range(workers)]
    lines = (line for path in corpus for line in path.open("rb"))
    few, small = _write_lines(sample, itertools.islice(lines, 0, None, every), int(sample_megabytes * 1e6))
    made = Made(*asked, size, documents, small, few, copies.begun)
    facts.write_text(json.dumps(asdict(made)))
    return made


class _Copies:
    """The machine's documents, without those of the target, again and again.

    Attributes:
        begun: copies so far.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.begun = 0
        self._paths = paths

    def documents(self) -> Iterator[str]:
        while True:
            self.begun += 1
            left = TARGET
            for path in self._paths:
                for text in _documents([path], DOCUMENTATION | SOURCE):
                    if left and path.suffix in DOCUMENTATION:
                        left -= 1
                    else:
                        yield text if self.begun == 1 else f"Copy {self.begun}\n{text}"


def _text_files() -> list[Path]:
    """Files of text under the folders where packages lie, each once, in the order of a hash of its path."""
    here = sysconfig.get_paths()
    roots = [here["purelib"], here["platlib"], here["stdlib"], "/usr/share", "/usr/lib", "/usr/include"]
    found = {
        Path(os.path.realpath(parent)) / name
        for root in dict.fromkeys(roots)
        for parent, _, names in os.walk(root)
        for name in names
        if Path(name).suffix in DOCUMENTATION | SOURCE
    }
    order = sorted(found, key=lambda path: hashlib.sha256(os.fsencode(path)).digest())
    return _each_once(path for path in order if path.is_file() and not path.is_symlink())


def _each_once(paths: Iterable[Path]) -> list[Path]:
    """Those that can be read as text, and whose content no other one before has."""
    seen: set[bytes] = set()
    kept = []
    for path in paths:
        content = _content(path)
        own = hashlib.sha256(content).digest()
        if content and own not in seen:
            seen.add(own)
            kept.append(path)
    return kept


def _content(path: Path) -> bytes:
    """Nothing where it is no text that somebody wrote."""
    try:
        if not SHORTEST_FILE <= path.stat().st_size <= LONGEST_FILE:
            return b""
        content = path.read_bytes()
        content.decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return b""
    return b"" if max(map(len, content.split(b"\n"))) > LONGEST_LINE or b"\0" in content else content


def _documents(paths: Iterable[Path], suffixes: set[str]) -> Iterator[str]:
    for path in paths:
        if path.suffix in suffixes:
            yield from _cut(_content(path).decode("utf-8"))


def _cut(text: str) -> Iterator[str]:
    """Parts of like size that end where lines do."""
    size = len(text) / max(1, round(len(text) / DOCUMENT))
    part: list[str] = []
    done = place = 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        place += len(line)
        if place >= (done + 1) * size - 1:
            yield "".join(part)
            part, done = [], int(place / size)
    if part:
        yield "".join(part)


def _write(paths: list[Path], texts: Iterable[str], at_most: int | None = None) -> tuple[int, int]:
    """Lines of JSON: how many, and their bytes."""
    lines = (json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)
    return _write_lines(paths, lines, at_most)


def _write_lines(paths: list[Path], lines: Iterable[bytes], at_most: int | None) -> tuple[int, int]:
    """One file after the other, of like size; without a limit all go into the first."""
    written = size = 0
    each = iter(lines)
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for line in each:
                file.write(line)
                size += len(line)
                written += 1
                if at_most is not None and size >= at_most * (number + 1) / len(paths):
                    break
    return written, size
