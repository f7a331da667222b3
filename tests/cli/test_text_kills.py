"""`distill run` over text, interrupted and killed: it goes on to the same bytes, and does nothing twice."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dataselect import corpus_passes
from distill.text import Corpus

Call = Callable[..., Result]
PASSES = {
    "counts": "count n-grams of data",
    "scores": "score documents",
    "chosen": "count n-grams of the choice",
}
FILES = 24
# As the command does it, but for a pause behind every piece, so that there is time to be killed.
PROGRAM = """
import sys, time
from dataselect import corpus_passes
write = corpus_passes.write_bytes_atomically

def write_and_wait(path, data):
    write(path, data)
    time.sleep(0.05)

corpus_passes.write_bytes_atomically = write_and_wait
from distill.cli import main
main(["run", "text.yaml", "steps.0.dsir.count=200", "--out", sys.argv[1], "--quiet"])
"""


def asked(folder: Path, task: str) -> list[int]:
    """Pieces that each part of a run had to do in a pass."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["total"] for event in events if (event["event"], event.get("task")) == ("started", task)]


def kept(folder: Path, pattern: str) -> list[Path]:
    """What a run in the folder has left in its cache, and of its choice in its folder."""
    cache = cache_of(folder)
    return [*cache.glob(f"text/*/{pattern}"), *(folder / ".resume" / "step-0").glob(pattern)]


def cache_of(folder: Path) -> Path:
    return folder.parent / f"cache-{folder.name}"


def done(folder: Path) -> dict[str, int]:
    """The pieces that are finished, and when they were."""
    return {
        str(path): path.stat().st_mtime_ns for path in kept(folder, "*.npz") if not path.name.startswith(".")
    }


def spent(folder: Path) -> float:
    """Seconds that the finished pieces took."""
    lines = [line for path in kept(folder, ".cost") for line in path.read_text().splitlines()]
    return sum(float(line.split()[3]) for line in lines)


@pytest.mark.parametrize("kind", PASSES)
def test_an_interrupted_run_goes_on_and_does_nothing_twice(
    kind: str, call: Call, text_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Corpus.pieces, "__kwdefaults__", {"piece_bytes": 1500})
    monkeypatch.setenv("DISTILL_CACHE", str(cache_of(tmp_path / "whole")))
    assert call("run", text_recipe, "--out", "whole", "--quiet").exit_code == 0
    monkeypatch.setenv("DISTILL_CACHE", str(cache_of(tmp_path / "cut")))
    (pieces,) = asked(tmp_path / "whole", PASSES[kind])
    write, written = corpus_passes.write_bytes_atomically, []

    def stop_behind_the_third(path: Path, data: bytes) -> None:
        write(path, data)
        written.append(path.name)
        time.sleep(0.05)
        if sum(name.startswith(kind) for name in written) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_passes, "write_bytes_atomically", stop_behind_the_third)
        cut = call("run", text_recipe, "--out", "cut")
    assert cut.exit_code == 130 and "goes on from here" in cut.stderr
    before = done(tmp_path / "cut")
    assert {Path(path).name for path in before} == set(written)
    assert not (tmp_path / "cut" / "set.h5").exists()
    saved = spent(tmp_path / "cut")
    assert saved >= 0.05 * (len(written) - 1), "what the last piece cost is not known yet"

    again: list[str] = []

    def note(path: Path, data: bytes) -> None:
        again.append(path.name)
        write(path, data)

    monkeypatch.setattr(corpus_passes, "write_bytes_atomically", note)
    resumed = call("run", text_recipe, "--out", "cut")
    assert resumed.exit_code == 0, resumed.output
    assert ("going on with the interrupted run" in resumed.stderr) == (kind == "chosen")
    assert not set(again) & set(written)
    # The folder of a run that has chosen nothing yet begins anew, with what the cache holds.
    first = [pieces] if kind == "chosen" else []
    of_target = sum(asked(tmp_path / "whole", "count n-grams of target")) if kind == "counts" else 0
    left = pieces - max(3 - of_target, 0)
    assert asked(tmp_path / "cut", PASSES[kind]) == [*first, *([left] if left else [])]
    assert (tmp_path / "cut" / "set.h5").read_bytes() == (tmp_path / "whole" / "set.h5").read_bytes()
    assert not (tmp_path / "cut" / ".resume").exists()
    report = json.loads((tmp_path / "cut" / "report.json").read_text(encoding="utf-8"))
    assert report["cost"]["selector dsir"]["seconds"] > saved


@pytest.mark.parametrize("moment", ["write_documents", "write_report"])
def test_an_interruption_behind_the_passes_loses_nothing(
    moment: str, call: Call, text_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill import document_run

    monkeypatch.setenv("DISTILL_CACHE", str(cache_of(tmp_path / "whole")))
    assert call("run", text_recipe, "--out", "whole", "--quiet").exit_code == 0
    monkeypatch.setenv("DISTILL_CACHE", str(cache_of(tmp_path / "cut")))

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(document_run, moment, stop)
        assert call("run", text_recipe, "--out", "cut").exit_code == 130
    assert not (tmp_path / "cut" / "report.json").exists()
    monkeypatch.setattr(corpus_passes, "write_bytes_atomically", stop)
    resumed = call("run", text_recipe, "--out", "cut")
    assert resumed.exit_code == 0, resumed.output
    assert (tmp_path / "cut" / "set.h5").read_bytes() == (tmp_path / "whole" / "set.h5").read_bytes()


def test_documents_are_written_after_an_interruption(
    call: Call, text_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself is finished; half of documents.jsonl is no documents.jsonl."""
    from distill.exporting import documents

    def stop_behind_the_fifth(placed: Any, path: Path) -> None:
        with path.open("wb") as lines:
            for number, each in enumerate(placed):
                lines.write(each.record.line + b"\n")
                if number == 4:
                    raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(documents, "_write_lines", stop_behind_the_fifth)
        assert call("run", text_recipe, "--out", "out", "--materialise", "jsonl").exit_code == 130
    assert not [path for path in (tmp_path / "out").iterdir() if "documents" in path.name]
    assert (tmp_path / "out" / "set.h5").exists()
    again = call("run", text_recipe, "--out", "out", "--materialise", "jsonl")
    assert again.exit_code == 0 and "is finished" in again.stderr
    assert len((tmp_path / "out" / "documents.jsonl").read_bytes().splitlines()) == 12


def start(folder: Path, out: str, *, workers: int) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(sys.path)
    cache = str(cache_of(folder / out))
    env = {**os.environ, "PYTHONPATH": path, "DISTILL_WORKERS": str(workers), "DISTILL_CACHE": cache}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, out], cwd=folder, env=env, start_new_session=True)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_run_goes_on_to_the_same_bytes(corpus: Path, text_recipe: Path, tmp_path: Path) -> None:
    """Killed in every pass, by one process and by two, and once interrupted by Ctrl-C."""
    lines = (corpus / "c.jsonl").read_bytes().splitlines(keepends=True)
    for number in range(FILES):
        content = b"".join(lines[number:] + lines[:number])
        name = corpus / "more" / f"{number}.jsonl{'.gz' if number % 3 == 0 else ''}"
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(gzip.compress(content) if name.suffix == ".gz" else content)
    assert start(tmp_path, "whole", workers=1).wait() == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    before: dict[str, int] = {}
    seconds = 0.0
    moments = [
        ("counts", 5, signal.SIGKILL, 1),
        ("counts", 14, signal.SIGINT, 2),
        ("scores", 4, signal.SIGKILL, 2),
        ("chosen", 6, signal.SIGKILL, 1),
    ]
    for kind, count, how, workers in moments:
        process = start(tmp_path, "cut", workers=workers)
        while sum(Path(path).name.startswith(kind) for path in done(cut)) < count:
            assert process.poll() is None, "too quick to be interrupted"
            time.sleep(0.01)
        process.send_signal(how)
        assert process.wait(60) == (130 if how == signal.SIGINT else -signal.SIGKILL)
        now = done(cut)
        assert before.items() <= now.items(), "a finished piece was computed again"
        assert len(now) > len(before)
        assert not {path.name for path in cut.iterdir()} & {"set.h5", "report.json", "report.html"}
        saved = spent(cut)
        assert saved > seconds, "the part before is counted too"
        before, seconds = now, saved
    assert start(tmp_path, "cut", workers=2).wait() == 0
    assert (cut / "set.h5").read_bytes() == (whole / "set.h5").read_bytes()
    assert not (cut / ".resume").exists()
    report = json.loads((cut / "report.json").read_text(encoding="utf-8"))
    assert report["cost"]["selector dsir"]["seconds"] > seconds
    assert before.items() <= now.items() and len(before) > FILES
