"""What is kept in memory, what must make room, and that neither changes what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.cache import tiers as tiers_module
from distill.cache.rows import StoredRows
from distill.cache.tiers import Level, Tiers, free_host_bytes, map_file

CPU = torch.device("cpu")
SHARD = 16 * 4 * 4  # bytes of a shard of 16 rows of 4 float32


def write(folder: Path, shards: int, *, start: int = 0) -> list[Path]:
    """Shards of 16 rows; row r holds [r, r, r, r] + start."""
    folder.mkdir()
    paths = []
    for number in range(shards):
        values = np.arange(number * 16, number * 16 + 16, dtype=np.float32)[:, None] + np.zeros(4, np.float32)
        paths.append(folder / f"{number}.npy")
        np.save(paths[-1], values + start)
    return paths


def kept(level: Level) -> list[str]:
    """Names of the shards in a tier, the array that was used last at the end."""
    return [f"{array.name}{path.stem}" for array, shards in level.arrays.items() for path in shards]


def tiers(device_shards: int, host_shards: int) -> Tiers:
    return Tiers(CPU, device_bytes=device_shards * SHARD, host_bytes=host_shards * SHARD)


def read(tiers: Tiers, path: Path) -> Tensor:
    """The shard, which must be what the file holds."""
    values = tiers.get(path)
    assert np.array_equal(values, np.load(path))
    return values


def test_the_device_first_then_the_host_then_the_disk(tmp_path: Path) -> None:
    paths = write(tmp_path / "a", 5)
    kept_by = tiers(2, 2)
    for path in paths:
        read(kept_by, path)
    assert kept(kept_by.on_device) == ["a0", "a1"]
    assert kept(kept_by.on_host) == ["a2", "a3"]
    assert kept_by.on_device.bytes == kept_by.on_host.bytes == 2 * SHARD


def test_a_scan_larger_than_the_tiers_finds_its_beginning_again(tmp_path: Path) -> None:
    paths = write(tmp_path / "a", 5)
    kept_by = tiers(2, 1)
    for _ in range(3):
        for path in paths:
            read(kept_by, path)
    assert kept(kept_by.on_device) == ["a0", "a1"]
    assert kept(kept_by.on_host) == ["a2"]


def test_the_array_used_longest_ago_makes_room(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / name, 2, start=number) for number, name in enumerate("abc"))
    kept_by = tiers(4, 2)
    for path in [*a, *b]:
        read(kept_by, path)
    read(kept_by, a[0])  # now b is the one used longest ago
    read(kept_by, c[0])
    assert kept(kept_by.on_device) == ["b0", "a0", "a1", "c0"]
    assert kept(kept_by.on_host) == ["b1"], "it went one tier down"
    read(kept_by, c[1])
    assert kept(kept_by.on_device) == ["a0", "a1", "c0", "c1"]
    d = write(tmp_path / "d", 2)
    read(kept_by, d[0])
    assert kept(kept_by.on_host) == ["b1", "a1"], "and the host forgets another of b"
    assert kept_by.on_device.bytes <= kept_by.on_device.limit
    assert kept_by.on_host.bytes <= kept_by.on_host.limit


def test_what_was_kept_is_not_read_again(tmp_path: Path) -> None:
    (path,) = write(tmp_path / "a", 1)
    for kept_by in (tiers(1, 0), tiers(0, 1)):
        first = kept_by.get(path)
        assert kept_by.get(path).data_ptr() == first.data_ptr()
    without = tiers(0, 0)
    assert without.get(path).data_ptr() != 0
    assert kept(without.on_device) == kept(without.on_host) == []


def test_nothing_is_pushed_out_for_what_does_not_fit_anyway(tmp_path: Path) -> None:
    (small,) = write(tmp_path / "a", 1)
    (tmp_path / "b").mkdir()
    large = tmp_path / "b" / "0.npy"
    np.save(large, np.zeros((100, 4), np.float32))
    kept_by = tiers(1, 1)
    read(kept_by, small)
    read(kept_by, large)
    assert kept(kept_by.on_device) == ["a0"]
    assert kept(kept_by.on_host) == []


def test_rows_changed_in_place_are_noticed(tmp_path: Path) -> None:
    """They would be served to the next who asks."""
    (path,) = write(tmp_path / "a", 1)
    kept_by = tiers(0, 1)
    kept_by.get(path)[3:5].add_(1)
    with pytest.raises(AssertionError, match="changed in place"):
        kept_by.get(path)
    assert np.array_equal(map_file(path), np.load(path)), "the file is untouched"


@pytest.mark.parametrize(("device_shards", "host_shards"), [(0, 0), (1, 0), (0, 2), (1, 1), (9, 9)])
def test_rows_are_the_same_wherever_they_are_kept(
    device_shards: int, host_shards: int, tmp_path: Path
) -> None:
    paths = write(tmp_path / "a", 4)
    rows = StoredRows(tuple(paths), (64, 4), tiers(device_shards, host_shards))
    whole = np.concatenate([np.load(path) for path in paths])
    for _ in range(2):
        assert np.array_equal(rows.read(slice(None)), whole)
        for size in (5, 16, 64):
            assert all(np.array_equal(block, whole[where]) for where, block in rows.blocks(size))
        indices = torch.tensor([63, 0, 17, 17, 40])
        assert np.array_equal(rows.take(indices), whole[indices])


def test_free_memory_is_told() -> None:
    assert 1 << 20 < free_host_bytes() < 1 << 50


def group(folder: Path, *, version: int, limit: str, used: int, idle: int = 0) -> None:
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    for name, text in zip(names, (f"{limit}\n", f"{used}\n"), strict=False):
        (folder / name).write_text(text)
    (folder / "memory.stat").write_text(f"anon 7\n{names[2]} {idle}\n")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 1000 kB available and no control groups."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:  1000 kB\n")
    monkeypatch.setattr(tiers_module, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(tiers_module, "_GROUPS", tmp_path / "groups")
    return tmp_path


def test_without_limits_what_the_machine_has_is_free(machine: Path) -> None:
    assert free_host_bytes() == 1000 * 1024
    (machine / "proc" / "self" / "cgroup").write_text("3:cpu:/a\n0::/a\n")
    assert free_host_bytes() == 1000 * 1024
    group(machine / "groups" / "a", version=2, limit="max", used=5)
    assert free_host_bytes() == 1000 * 1024


@pytest.mark.parametrize(
    ("version", "told", "place"), [(2, "0::/job/step", ""), (1, "4:cpuset,memory:/job/step", "memory")]
)
def test_a_limit_of_the_job_or_its_container_counts(
    version: int, told: str, place: str, machine: Path
) -> None:
    (machine / "proc" / "self" / "cgroup").write_text(f"2:cpu:/\n{told}\n")
    root = machine / "groups" / place
    group(root / "job" / "step", version=version, limit="5000", used=2000, idle=500)
    assert free_host_bytes() == 5000 - 2000 + 500
    group(root / "job", version=version, limit="9000", used=6500)
    assert free_host_bytes() == 2500, "the group around it has less"
    group(root, version=version, limit="900", used=1000)
    assert free_host_bytes() == 0


def test_a_container_sees_its_own_group_as_the_root(machine: Path) -> None:
    (machine / "proc" / "self" / "cgroup").write_text("4:memory:/outside/that/is/not/seen\n")
    group(machine / "groups" / "memory", version=1, limit="4000", used=1000)
    assert free_host_bytes() == 3000


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc tells what is open")
def test_shards_that_are_kept_hold_no_file_open(tmp_path: Path) -> None:
    """A process may open about a thousand files, and an array may have more shards."""
    paths = write(tmp_path / "a", 50)
    kept_by = tiers(0, 50)
    opened = Path("/proc/self/fd")
    before = len(list(opened.iterdir()))
    for path in paths:
        read(kept_by, path)
    assert len(kept(kept_by.on_host)) == 50
    assert len(list(opened.iterdir())) == before


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2048, 32)])
def test_a_mapped_file_is_what_numpy_reads(shape: tuple[int, int], dtype: type, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    assert np.array_equal(map_file(tmp_path / "a.npy"), values)
