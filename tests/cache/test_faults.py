"""Damaged, missing and foreign files, full disks, kills, and two processes at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.cache import Cache, Features, Logits, Network, Rows, shards
from distill.cache.rows import StoredRows
from distill.contracts import Split
from distill.errors import InputError

BOTH = (Features(), Logits())
MakeCache = Callable[..., Cache]


def first_folder(rows: Rows) -> Path:
    assert isinstance(rows, StoredRows)
    return rows.files[0].parent


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("rows-*.npy"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that is no leftover of a kill, by its path in the folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, flip_a_bit, empty])
@pytest.mark.parametrize("number", [0, 5])
def test_a_damaged_shard_is_computed_again(
    damage: Callable[[Path], None],
    number: int,
    make_cache: MakeCache,
    split: Split,
    network: Network,
    told: Any,
) -> None:
    make_cache().request(split, network, BOTH)
    before = contents(make_cache().folder)
    path = shard_files(make_cache().folder)[number]
    damage(path)
    cache = make_cache()
    answers = cache.request(split, network, BOTH)
    span = int(path.name.split("-")[1]), int(path.name.split("-")[2].split(".")[0])
    assert cache.images_forwarded == span[1] - span[0], "nothing else is computed again"
    assert contents(cache.folder) == before
    assert told.warnings == [f"{path} is damaged and will be computed again"]
    assert torch.isfinite(answers[Features()].read(slice(None))).all()


def test_a_missing_shard_alone_is_computed(
    make_cache: MakeCache, split: Split, network: Network, told: Any
) -> None:
    make_cache().request(split, network, BOTH)
    before = contents(make_cache().folder)
    next(path for path in shard_files(make_cache().folder) if "0000000016-" in path.name).unlink()
    cache = make_cache()
    cache.request(split, network, BOTH)
    assert cache.images_forwarded == 16
    assert contents(cache.folder) == before
    assert told.warnings == []


def test_a_shard_that_another_process_removed_is_computed(
    make_cache: MakeCache, split: Split, network: Network, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removed after it was listed: that is no fault of the user's."""
    make_cache().request(split, network, BOTH)
    first = shard_files(make_cache().folder)[0]
    os.utime(first)  # so that it is summed again
    state_of = shards.state_of

    def removed(path: Path, sha256: str) -> shards.State:
        first.unlink(missing_ok=True)
        return state_of(path, sha256)

    monkeypatch.setattr(shards, "state_of", removed)
    cache = make_cache()
    cache.request(split, network, BOTH)
    assert cache.images_forwarded == 16
    assert told.warnings == []


def test_sums_that_another_process_replaces_meanwhile(
    make_cache: MakeCache, split: Split, make_network: Callable[..., Network], told: Any, monkeypatch: Any
) -> None:
    network = make_network({"name": "convnet", "width": 4, "norm": "batch"})
    make_cache().statistics(split, network)
    (path,) = make_cache().folder.rglob("sums-*.npy")
    (path.parent / ".checked").unlink()
    state_of = shards.state_of

    def replaced(path: Path, sha256: str) -> shards.State:
        path.unlink()
        return state_of(path, sha256)

    monkeypatch.setattr(shards, "state_of", replaced)
    make_cache().statistics(split, network)
    assert told.warnings == []


def test_a_shard_is_what_numpy_saves(tmp_path: Path, told: Any) -> None:
    folder = shards.ShardFolder(tmp_path, rows=6, progress=told)
    values = np.arange(24, dtype=np.float32).reshape(4, 6).T  # not contiguous
    shard = folder.write(range(6), values)
    np.save(tmp_path / "expected.npy", np.ascontiguousarray(values))
    data = shard.path.read_bytes()
    assert data == (tmp_path / "expected.npy").read_bytes()
    assert shard.sha256 == hashlib.sha256(data).hexdigest()


def test_a_shard_is_written_without_a_copy(tmp_path: Path, told: Any) -> None:
    folder = shards.ShardFolder(tmp_path, rows=1024, progress=told)
    values = np.ones((1024, 1024), np.float32)
    tracemalloc.start()
    folder.write(range(1024), values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values.nbytes / 4


def test_files_of_other_names_are_left_alone(make_cache: MakeCache, split: Split, network: Network) -> None:
    make_cache().request(split, network, BOTH)
    other = shard_files(make_cache().folder)[0].with_name("rows-mine.npy")
    other.write_bytes(b"mine")
    cache = make_cache()
    cache.request(split, network, BOTH)
    assert cache.images_forwarded == 0
    assert other.read_bytes() == b"mine"


def test_the_manifest_tells_what_the_rows_are(make_cache: MakeCache, split: Split, network: Network) -> None:
    answers = make_cache().request(split, network, BOTH)
    manifest = json.loads((first_folder(answers[Features()]) / "manifest.json").read_text())
    assert manifest["rows"] == 37
    assert manifest["parts"]["data"] == split.fingerprint
    assert manifest["parts"]["layer"] == "penultimate"
    assert manifest["parts"]["network"] == network.identity


def test_a_foreign_folder_is_refused_and_untouched(make_cache: MakeCache, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files and is no cache") as caught:
        make_cache()
    assert caught.value.where == str(folder)
    assert "cache.folder" in str(caught.value.fix)
    assert contents(folder) == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("marker", ['{"format": 2}', "[]", "{}", "null", "nonsense", '{"format": "1"}'])
def test_another_format_is_refused(marker: str, make_cache: MakeCache, tmp_path: Path) -> None:
    make_cache()
    (tmp_path / "cache" / "distill-cache.json").write_text(marker)
    with pytest.raises(InputError, match="the cache has another format") as caught:
        make_cache()
    assert caught.value.allowed == "1"
    assert contents(tmp_path / "cache") == {"distill-cache.json": marker.encode()}


def test_a_folder_that_another_process_claims_at_this_moment(
    make_cache: MakeCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked for the marker, then listed the folder: the other's files would make it look foreign."""
    exists = Path.exists

    def claimed_meanwhile(path: Path, **options: Any) -> bool:
        found = exists(path, **options)
        if path.name == "distill-cache.json" and not found:
            path.write_text('{"format": 1}')
            (path.parent / "rows").mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(Path, "exists", claimed_meanwhile)
    make_cache()


def test_a_path_that_is_a_file(tmp_path: Path, told: Any) -> None:
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InputError, match="cannot be written"):
            Cache(folder, device=torch.device("cpu"), progress=told)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_cache_on_a_disk_that_may_only_be_read_is_refused(
    make_cache: MakeCache, split: Split, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_cache().folder
    opened = os.open

    def only_read(path: Any, flags: int, *mode: int, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", only_read)
    with pytest.raises(InputError, match="cannot be written: Read-only file system") as caught:
        make_cache()
    assert caught.value.where == str(folder)


def test_files_of_another_user_serve_although_nothing_is_noted_of_them(
    make_cache: MakeCache, split: Split, network: Network, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that both may write to: the manifest's time and the note of checksums stay as they are."""
    make_cache().request(split, network, BOTH)
    for path in make_cache().folder.rglob(".checked"):
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in make_cache().folder.rglob("manifest.json")}
    opened = Path.open

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def noting_refused(path: Path, mode: str = "r", **options: Any) -> Any:
        return refuse() if path.name == ".checked" and "a" in mode else opened(path, mode, **options)

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(Path, "open", noting_refused)
    cache = make_cache()
    cache.request(split, network, BOTH)
    assert cache.images_forwarded == 0
    assert told.warnings == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "cannot be written: Permission denied")],
)
def test_a_shard_that_cannot_be_written_leaves_nothing(
    number: int,
    message: str,
    make_cache: MakeCache,
    split: Split,
    network: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = make_cache()
    for quantity in BOTH:
        cache._folder(quantity, split, network)
    write_parts = shards._write_parts

    def fails_half_way(parts: Sequence[memoryview], path: Path) -> None:
        write_parts(parts[:1], path)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_parts", fails_half_way)
        with pytest.raises(InputError, match=message) as caught:
            cache.request(split, network, BOTH)
    assert caught.value.exit_code == 2
    assert shard_files(cache.folder) == []
    assert not list(cache.folder.rglob("*.partial"))
    assert len(cache.logits(split, network)) == 37, "the folder serves again once there is room"


def test_leftovers_of_kills_are_removed_when_they_are_old(
    make_cache: MakeCache, split: Split, network: Network
) -> None:
    folder = first_folder(make_cache().logits(split, network))
    old, young = folder / ".rows-a.1.partial", folder / ".rows-b.2.partial"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    make_cache().logits(split, network)
    assert not old.exists()
    assert young.exists(), "another process may be writing it"


SCRIPT = textwrap.dedent(
    """
    # Run as: script PLAIN KILLED SHARED. Prints JSON. Children are forked before torch computes anything.
    import hashlib, json, os, signal, sys
    from pathlib import Path
    import torch
    from distill import cache as cache_module, files
    from distill.cache import Cache, Features, Logits, Network, rows, shards
    from distill.contracts import Preprocessing, Split
    from distill.models import build, model_config
    from distill.progress import NullProgress

    shards.SHARD_ROWS = rows.SHARD_ROWS = cache_module.SHARD_ROWS = 8

    def work(folder, out):
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (30, 1, 8, 8), generator=generator, dtype=torch.uint8)
        split = Split(images, torch.zeros(30, dtype=torch.int64), "fingerprint")
        config = model_config({"name": "mlp", "width": 4})
        state = build(config, image_shape=(1, 8, 8), classes=3, seed=0).state_dict()
        network = Network(config, (1, 8, 8), 3, Preprocessing((0.0,), (1.0,)), state, {})
        cache = Cache(Path(folder), device=torch.device("cpu"), progress=NullProgress())
        cache.request(split, network, [Features(), Logits()])
        os.write(out, str(cache.images_forwarded).encode())

    def die_before_rename(count):
        replace = os.replace
        def replacing(source, target):
            nonlocal count
            count -= 1
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        files.os.replace = replacing

    def die_half_written(count):
        sync = files.sync
        def syncing(path):
            nonlocal count
            count -= path.name.endswith(".partial")
            if count == 0:
                os.truncate(path, 40)
                os.kill(os.getpid(), signal.SIGKILL)
            sync(path)
        files.sync = syncing

    def child(folder, trouble=lambda: None):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                trouble()
                work(folder, write)
                code = 0
            finally:
                os._exit(code)
        os.close(write)
        return pid, read

    def end(pid, read):
        with os.fdopen(read, "rb") as pipe:
            told = pipe.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), told

    plain, killed, shared = sys.argv[1:]
    result = {"plain": end(*child(plain))}
    troubles = [
        lambda: die_half_written(1),  # the marker
        lambda: die_before_rename(2),  # a manifest
        lambda: die_half_written(4),  # the second shard
        lambda: die_before_rename(3),  # a later one
    ]
    result["killed"] = [end(*child(killed, trouble)) for trouble in troubles]
    result["resumed"] = end(*child(killed))
    result["again"] = end(*child(killed))
    result["together"] = [end(*started) for started in [child(shared) for _ in range(3)]]
    print(json.dumps(result))
    """
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_and_other_processes_leave_the_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("plain", "killed", "shared")]
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path[:] = eval(sys.argv.pop(1)); exec({SCRIPT!r})",
            repr(sys.path),
        ]
        + [str(folder) for folder in folders],
        capture_output=True,
        timeout=120,
        check=False,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["plain"] == [0, "30"]
    assert [code for code, _ in result["killed"]] == [-signal.SIGKILL] * 4
    code, forwarded = result["resumed"]
    assert code == 0
    assert 0 < int(forwarded) < 30, "whole shards of the killed runs were kept"
    assert result["again"] == [0, "0"]
    assert [code for code, _ in result["together"]] == [0, 0, 0], ended.stderr
    plain, killed, shared = (contents(folder) for folder in folders)
    assert len(plain) == 1 + 2 + 2 * 4
    assert plain == killed == shared
