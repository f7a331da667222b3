"""`distill cache`: what is listed, what is removed, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from distill.cache import identity
from distill.cache.folder import claim
from distill.cache.upkeep import Entry, entries, remove, surplus
from distill.errors import InputError

from .conftest import Call

RECIPE = """\
seed: 3
data: {name: digits, cap: 30}
train: {epochs: 1, batch_size: 20, augment: crop}
steps:
  - herding: {ipc: 3, network: {model: {name: mlp, width: 8}, train: {epochs: 1}}}
evaluate: {students: [{name: mlp, width: 8}], seeds: 2, against: []}
"""


@pytest.fixture
def filled(tmp_path: Path, call: Call) -> Path:
    """The cache's folder after a run."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert call("run", "tiny.yaml").exit_code == 0
    return tmp_path / "cache"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_the_cache_holds(filled: Path, call: Call) -> None:
    listed = call("cache", "ls")
    assert listed.exit_code == 0, listed.output
    assert [line.split()[0] for line in listed.stdout.splitlines()[:-1]].count("network") == 1
    assert listed.stdout.splitlines()[-1].startswith("3 entries, ")
    assert "270 images of" in listed.stdout
    found = json.loads(call("cache", "ls", "--json").stdout)
    assert {entry["kind"] for entry in found} == {"features", "logits", "network"}
    assert all(entry["whole"] == 1 and not entry["obsolete"] for entry in found)
    elsewhere = call("cache", "ls", "--folder", filled)
    assert elsewhere.stdout == listed.stdout


def test_gc_removes_what_was_unused_longest(filled: Path, call: Call) -> None:
    found = json.loads(call("cache", "ls", "--json").stdout)
    for number, entry in enumerate(sorted(found, key=lambda entry: entry["kind"])):
        path = Path(entry["path"])
        when = time.time() - 86400 * (10 - number)
        os.utime(path / "manifest.json" if path.is_dir() else path, (when, when))
    before = names(filled)
    told = call("cache", "gc", "--unused-days", "8.5", "--dry-run")
    assert "2 entries" in told.stdout and "would be removed" in told.stdout
    assert names(filled) == before
    assert call("cache", "gc", "--unused-days", "8.5").exit_code == 0
    left = json.loads(call("cache", "ls", "--json").stdout)
    assert [entry["kind"] for entry in left] == ["network"]
    assert "0 entries" in call("cache", "gc", "--max-bytes", "1 GB").stdout
    assert "1 entries" in call("cache", "gc", "--max-bytes", "10 B").stdout
    assert names(filled) <= {"distill-cache.json", ".lock"}


def test_gc_removes_what_earlier_versions_made(filled: Path, call: Call) -> None:
    manifest = next(filled.rglob("manifest.json"))
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "producer": facts["producer"] - 1}))
    partial = filled / "rows" / ".rows-a.1.partial"
    partial.write_bytes(b"half")
    assert "obsolete" in call("cache", "ls").stdout
    assert "1 entries" in call("cache", "gc").stdout
    assert not manifest.exists()
    assert not partial.exists()


def test_gc_removes_networks_of_earlier_versions(
    filled: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(identity._OTHERS, "network", identity.producer_version("network") + 1)
    found = json.loads(call("cache", "ls", "--json").stdout)
    assert {entry["kind"] for entry in found if entry["obsolete"]} == {"network"}
    assert call("cache", "gc").exit_code == 0
    left = json.loads(call("cache", "ls", "--json").stdout)
    assert left and all(entry["kind"] != "network" for entry in left)


@pytest.mark.parametrize("text", [None, "nonsense", "[]", '{"parts": 3}'])
def test_rows_without_a_manifest_are_listed_kept_and_told_of_again(
    text: str | None, filled: Path, call: Call
) -> None:
    manifest = next(filled.rglob("manifest.json"))
    before = manifest.read_bytes()
    manifest.unlink()
    if text is not None:
        manifest.write_text(text)
    listed = call("cache", "ls")
    assert listed.stdout.splitlines()[-1].startswith("3 entries, ")
    assert f"key {manifest.parent.name[:8]}, not readable" in listed.stdout
    assert "0 entries" in call("cache", "gc").stdout, "the rows may be good"
    assert call("run", "tiny.yaml", "--out", "again").exit_code == 0
    assert manifest.read_bytes() == before
    manifest.unlink()
    assert "3 entries" in call("cache", "gc", "--max-bytes", "0").stdout
    assert names(filled) <= {"distill-cache.json", ".lock"}


def test_a_removal_that_is_interrupted_leaves_what_tells_of_the_rest(
    filled: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = next(filled.rglob("manifest.json"))
    (entry,) = [each for each in entries(filled) if each.path == manifest.parent]

    def refused(path: Path, **options: bool) -> None:
        raise OSError(errno.EACCES, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(InputError, match="cannot be written"):
            remove(filled, [entry])
    assert manifest.exists()
    remove(filled, [entry])
    assert not manifest.parent.exists()


def test_gc_leaves_a_cache_that_is_in_use_alone(filled: Path, call: Call) -> None:
    before = names(filled)
    run = claim(filled)
    refused = call("cache", "gc", "--max-bytes", "0")
    assert refused.exit_code == 2
    assert "a run uses the cache" in refused.stderr
    assert names(filled) == before
    run.release()
    assert call("cache", "gc", "--max-bytes", "0").exit_code == 0


def test_verify_finds_what_reading_does_not_look_for(filled: Path, call: Call) -> None:
    """A bit that turned over without the file's time."""
    assert call("cache", "verify").exit_code == 0
    path = next(filled.rglob("rows-*.npy"))
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    found = call("cache", "verify")
    assert found.exit_code == 3
    assert f"damaged: {path}" in found.stdout
    assert "cache verify --remove" in found.stderr
    assert path.exists()
    removed = call("cache", "verify", "--remove")
    assert removed.exit_code == 0
    assert not path.exists()
    assert call("cache", "verify").exit_code == 0


def test_files_that_a_run_removes_meanwhile(
    filled: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed, and gone before they are looked at: partial files, and sums that newer ones replace."""
    gone = [
        next(filled.rglob("rows-*.npy")).with_name(name) for name in (".a.partial", f"sums.{'0' * 64}.npy")
    ]
    listed = Path.iterdir
    globbed = Path.rglob

    def with_gone(paths: Iterable[Path], folder: Path) -> Iterator[Path]:
        yield from paths
        if folder in gone[0].parents:
            yield from gone

    monkeypatch.setattr(Path, "iterdir", lambda path: with_gone(listed(path), path))
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: with_gone(globbed(path, pattern), path))
    assert call("cache", "ls").exit_code == 0
    found = call("cache", "verify")
    assert found.exit_code == 0, found.output
    assert "3 files, 3 whole" in found.stdout


@pytest.mark.parametrize("command", [["ls"], ["gc"], ["verify"]])
def test_a_folder_that_is_no_cache(command: list[str], tmp_path: Path, call: Call) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    refused = call("cache", *command, "--folder", "mine")
    assert refused.exit_code == 2
    assert "there is no cache" in refused.stderr
    assert names(tmp_path / "mine") == {"thesis.txt"}


@pytest.mark.parametrize("size", ["much", "-1", "5 GX"])
def test_a_size_that_is_none(size: str, filled: Path, call: Call) -> None:
    refused = call("cache", "gc", f"--max-bytes={size}")
    assert refused.exit_code == 2
    assert "not a number of bytes" in refused.stderr


def entry(name: str, size: int, used: float, obsolete: bool = False) -> Entry:
    return Entry("features", Path(name), "", size, used, 1.0, obsolete)


def test_what_is_surplus() -> None:
    found = [entry("new", 10, 400), entry("mid", 20, 300), entry("old", 30, 200), entry("odd", 5, 500, True)]

    def removed(**options: float | None) -> list[str]:
        asked = {"max_bytes": None, "unused_days": None, **options}
        return [each.path.name for each in surplus(found, **asked)]  # type: ignore[arg-type]

    assert removed() == ["odd"]
    assert removed(max_bytes=60) == ["odd"]
    assert removed(max_bytes=59) == ["odd", "old"]
    assert removed(max_bytes=0) == ["odd", "old", "mid", "new"]
    assert set(removed(unused_days=1)) == {"odd", "new", "mid", "old"}


@pytest.mark.parametrize("days", ["nan", "inf", "-1", "many"])
def test_days_that_are_no_number(filled: Path, call: Call, days: str) -> None:
    before = names(filled)
    assert call("cache", "gc", "--unused-days", days).exit_code == 2
    assert names(filled) == before
