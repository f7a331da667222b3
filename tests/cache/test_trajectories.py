"""Trajectories: what is read is what was trained, whatever happened in between."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distill.cache import Cache
from distill.cache import experts as experts_module
from distill.cache import trajectories as trajectories_module
from distill.cache.experts import ExpertConfig, record_trajectories
from distill.cache.trajectories import Layout, Trajectories, TrajectoryFolder, damaged_experts
from distill.contracts import Context, Source, Split
from distill.costs import Costs
from distill.errors import DamagedDataError, InputError
from distill.locks import Lock
from distill.models import build
from distill.progress import NullProgress
from distill.training.config import TrainConfig
from distill.training.engine import Engine, Way
from distill.training.job import Job

CPU = torch.device("cpu")
Record = Callable[..., Trajectories]


def config(**changes: Any) -> ExpertConfig:
    train = {"epochs": 3, "batch_size": 16, "lr": 0.1, "augment": "crop"}
    return ExpertConfig.model_validate(
        {"model": {"name": "convnet", "width": 3}, "train": train, "experts": 2, **changes}
    )


@pytest.fixture
def source(make_split: Callable[..., Split]) -> Source:
    return Source("random", ("a", "b", "c"), make_split(), make_split(5, 1), (0.4, 0.5), (0.2, 0.3))


@pytest.fixture
def record(make_cache: Callable[[], Cache], source: Source, told: Any, tmp_path: Path) -> Record:
    def run(asked: ExpertConfig, *, way: Way = "serial", seed: int = 0) -> Trajectories:
        with Engine(CPU, precision="float32", progress=NullProgress(), way=way) as engine:
            ctx = Context(seed, CPU, make_cache(), engine, Costs(engine), told, TrainConfig(), tmp_path)
            return record_trajectories(ctx, source, asked)

    return run


def whole(trajectories: Trajectories) -> np.ndarray:
    """Every checkpoint: (experts, checkpoints, P)."""
    experts, checkpoints, _ = trajectories.shape
    return np.stack([[trajectories.read(e, c).numpy() for c in range(checkpoints)] for e in range(experts)])


def test_checkpoints_are_the_weights_as_they_were(record: Record, source: Source, trained: list[Job]) -> None:
    """The released code on a CPU keeps views, so that all of its checkpoints are the last."""
    found = record(config())
    size = sum(
        value.numel()
        for value in build(config().model, image_shape=(2, 8, 8), classes=3, seed=0).parameters()
    )
    assert found.shape == (2, 4, size)
    assert found.epochs == (0, 1, 2, 3)
    initial = experts_module.initial_network(trained[0])
    first = found.layout.views(found.read(0, 0))
    assert list(first) == [name for name, _ in initial.named_parameters()]
    assert all(torch.equal(first[name], value) for name, value in initial.named_parameters())
    moved = [float((found.read(0, epoch + 1) - found.read(0, epoch)).norm()) for epoch in range(3)]
    assert min(moved) > 0
    with Engine(CPU, precision="float32", progress=NullProgress(), way="serial") as engine:
        (again,) = engine.train([replace(trained[1], trajectory=None, keep_state=True)], title="again")
    last = found.layout.views(found.read(1, 3))
    assert all(torch.equal(last[name], again.state[name]) for name in last)


@pytest.mark.parametrize("way", ["stack", "workers"])
def test_every_way_of_training_writes_them(way: Way, record: Record) -> None:
    alone = whole(record(config()))
    other = record(config(every=3), way=way)
    assert other.epochs == (0, 3)
    np.testing.assert_allclose(whole(other), alone[:, [0, 3]], atol=1e-4)
    assert not np.allclose(whole(record(config(), seed=1)), alone, atol=1e-4), "another seed"


def test_it_is_trained_once_and_more_are_added(record: Record, trained: list[Job]) -> None:
    two = whole(record(config()))
    assert np.array_equal(whole(record(config())), two)
    assert len(trained) == 2
    found = record(config(experts=5))
    assert found.shape[0] == 5
    assert np.array_equal(whole(found)[:2], two)
    assert len(trained) == 5
    assert np.load(found.path, mmap_mode="r").shape == found.shape, "numpy alone can read it"
    assert record(config()).shape[0] == 2
    assert len(trained) == 5


def test_the_header_tells_what_the_numbers_are(record: Record) -> None:
    found = record(config())
    header = json.loads((found.path.parent / "header.json").read_text())
    assert header["epochs"] == [0, 1, 2, 3]
    assert [entry["name"] for entry in header["parameters"]] == list(found.layout.shapes)
    assert sum(int(np.prod(entry["shape"])) for entry in header["parameters"]) == found.shape[2]


def test_views_of_several_checkpoints_by_name(record: Record) -> None:
    found = record(config())
    stacked = torch.stack([found.read(0, 1), found.read(1, 2)])
    views = found.layout.views(stacked)
    assert views["body.0.weight"].shape == (2, 3, 2, 3, 3)
    assert torch.equal(views["classifier.bias"][1], found.layout.views(found.read(1, 2))["classifier.bias"])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is mapped in")
def test_reading_touches_the_checkpoint_alone(tmp_path: Path) -> None:
    """The pages of the others stay out of memory."""
    shape = (4, 8, 1 << 16)
    path = tmp_path / "weights.npy"
    array = np.lib.format.open_memmap(path, mode="w+", dtype="<f4", shape=shape)
    array[:] = 1
    array.flush()
    del array
    found = Trajectories(path, Layout({"w": (1 << 16,)}, tuple(range(8))), 4)
    before = resident_bytes(path)
    found.read(2, 3)
    touched = resident_bytes(path) - before
    assert 0 < touched <= 2 * (4 << 16) + (1 << 20)
    assert touched < path.stat().st_size / 4


def resident_bytes(path: Path) -> int:
    """Bytes of the file that this process has mapped in."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_an_interrupted_run_trains_the_missing_experts(
    record: Record, trained: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = record(config(experts=3))
    expected, folder = whole(found), found.path.parent
    shutil.rmtree(folder)
    finish = TrajectoryFolder.finish

    def interrupted(self: TrajectoryFolder, expert: int) -> None:
        if expert == 1:
            raise KeyboardInterrupt
        finish(self, expert)

    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryFolder, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record(config(experts=3))
    trained.clear()
    assert np.array_equal(whole(record(config(experts=3))), expected)
    assert [job.label for job in trained] == ["expert 1", "expert 2"]


@pytest.mark.parametrize("damage", ["a number", "the file cut", "the file gone"])
def test_damaged_rows_are_trained_again(damage: str, record: Record, trained: list[Job], told: Any) -> None:
    found = record(config())
    expected, path = whole(found), found.path
    trained.clear()
    if damage == "a number":
        array = np.load(path, mmap_mode="r+")
        array[1, 2, 5] += 1
        array.flush()
        assert damaged_experts(path.parent) == [1]
    elif damage == "the file cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.unlink()
    assert np.array_equal(whole(record(config())), expected)
    assert [job.label for job in trained] == (
        ["expert 1"] if damage == "a number" else ["expert 0", "expert 1"]
    )
    if damage == "a number":
        assert told.warnings == [f"expert 1 in {path} is damaged and will be trained again"]
    assert damaged_experts(path.parent) == []


def replaced(weights: np.ndarray, how: str) -> np.ndarray:
    experts, checkpoints, parameters = weights.shape
    if how == "fewer weights":
        return weights[:, :, : parameters // 2]
    if how == "other epochs":
        return weights[:, : checkpoints - 1]
    if how == "the same bytes":  # so that every row has its checksum
        return weights.reshape(experts, parameters, checkpoints)
    if how == "by columns":
        return np.asfortranarray(weights)
    assert how == "float64"
    return weights.astype("<f8")


@pytest.mark.parametrize("how", ["fewer weights", "other epochs", "the same bytes", "by columns", "float64"])
def test_a_file_that_was_replaced_is_made_anew(
    how: str, record: Record, trained: list[Job], told: Any
) -> None:
    found = record(config())
    expected, path = whole(found), found.path
    np.save(path, replaced(np.load(path), how))
    trained.clear()
    assert np.array_equal(whole(record(config())), expected)
    assert np.array_equal(np.load(path), expected)
    assert [job.label for job in trained] == ["expert 0", "expert 1"]
    assert told.warnings == [
        f"expert {number} in {path} is damaged and will be trained again" for number in range(2)
    ]
    assert damaged_experts(path.parent) == []


def test_experts_behind_the_last_of_the_header_are_trained_again(record: Record, trained: list[Job]) -> None:
    """Their bytes are there, but nobody who reads the file would find them."""
    found = record(config())
    expected, path = whole(found), found.path
    np.save(path, expected[:1])
    with path.open("ab") as file:
        file.write(expected[1].tobytes())
    trained.clear()
    assert np.array_equal(whole(record(config())), expected)
    assert np.array_equal(np.load(path), expected)
    assert [job.label for job in trained] == ["expert 1"]


@pytest.mark.parametrize(
    ("shape", "found"),
    [(None, "no such array"), ((2, 3, 4), "float32 (2, 3, 4)"), ((1, 4, 3), "float32 (1, 4, 3)")],
)
def test_an_array_of_another_shape_is_not_read(
    shape: tuple[int, ...] | None, found: str, tmp_path: Path
) -> None:
    path, layout = tmp_path / "weights.npy", Layout({"w": (3,)}, tuple(range(4)))
    if shape is not None:
        np.save(path, np.zeros(shape, dtype="<f4"))
    with pytest.raises(DamagedDataError, match="not the one that was written") as caught:
        Trajectories(path, layout, 2)
    assert caught.value.where == str(path)
    assert caught.value.found == found
    assert caught.value.allowed == "float32 (2, 4, 3), or more experts"


@pytest.mark.parametrize("asked", [3, 5])
def test_a_file_that_was_cut_loses_the_experts_behind_the_cut(
    asked: int, record: Record, trained: list[Job], told: Any
) -> None:
    found = record(config(experts=3))
    expected, path = whole(found), found.path
    os.truncate(path, path.stat().st_size - 4)
    trained.clear()
    assert damaged_experts(path.parent) == [2]
    assert np.array_equal(whole(record(config(experts=2))), expected[:2])
    assert trained == []
    assert np.array_equal(whole(record(config(experts=asked)))[:3], expected)
    assert [job.label for job in trained] == [f"expert {number}" for number in range(2, asked)]
    assert told.warnings == [f"expert 2 in {path} is damaged and will be trained again"]
    assert len(np.load(path, mmap_mode="r")) == asked


def test_a_first_run_that_is_killed_leaves_a_partial_file(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which `distill cache gc` and later runs know and remove."""
    created = []

    def killed(shape: tuple[int, int, int], path: Path) -> None:
        created.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(trajectories_module, "_create", killed)
    with pytest.raises(KeyboardInterrupt):
        record(config())
    assert [path.suffix for path in created] == [".partial"]
    assert not created[0].exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"name": "convnet", "width": 4}},
        {"train": {"epochs": 2, "batch_size": 16, "lr": 0.1, "augment": "crop"}},
        {"train": {"epochs": 3, "batch_size": 16, "lr": 0.2, "augment": "crop"}},
        {"every": 3},
    ],
)
def test_another_configuration_is_another_trajectory(
    change: dict[str, Any], record: Record, trained: list[Job]
) -> None:
    first = record(config())
    assert record(config(**change)).path != first.path
    assert len(trained) == 4


def test_a_network_with_running_statistics_is_refused(record: Record) -> None:
    with pytest.raises(InputError, match="statistics beside its parameters") as caught:
        record(config(model={"name": "convnet", "width": 3, "norm": "batch"}))
    assert "norm: instance" in str(caught.value)


def test_checkpoints_further_apart_than_the_training_is_long_are_refused() -> None:
    assert config(every=3).every == 3
    with pytest.raises(ValidationError, match="every is 4, but training ends after 3 epochs"):
        config(every=4)


@pytest.mark.skipif(os.name == "nt", reason="needs advisory locks")
@pytest.mark.parametrize("trained_meanwhile", [False, True])
def test_a_run_waits_for_another_that_trains_the_same(
    trained_meanwhile: bool,
    record: Record,
    trained: list[Job],
    told: Any,
    tmp_path: Path,
) -> None:
    found = record(config())
    folder, expected = found.path.parent, whole(found)
    shutil.move(folder, tmp_path / "kept")
    folder.mkdir()
    other = Lock(folder / ".lock", shared=False)
    assert other.take()

    def end_other() -> None:
        until = time.monotonic() + 60
        while not told.notes and time.monotonic() < until:
            time.sleep(0.01)
        if trained_meanwhile:
            for path in (tmp_path / "kept").glob("[!.]*"):
                shutil.copy(path, folder)
        other.release()

    trained.clear()
    thread = threading.Thread(target=end_other)
    thread.start()
    again = record(config())
    thread.join()
    assert told.notes == ["another run trains these experts; waiting for it"]
    assert np.array_equal(whole(again), expected)
    assert len(trained) == (0 if trained_meanwhile else 2)


WORKER = textwrap.dedent(
    """
    # Run as: worker CACHE WAY. Records trajectories of twelve experts.
    import sys
    from pathlib import Path
    import torch
    from distill.cache import Cache
    from distill.cache.experts import ExpertConfig, record_trajectories
    from distill.contracts import Context, Source, Split
    from distill.costs import Costs
    from distill.progress import NullProgress
    from distill.training.config import TrainConfig
    from distill.training.engine import Engine

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (640, 1, 16, 16), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(640) % 10, "fingerprint")
    empty = Split(images[:0], split.labels[:0], "empty")
    source = Source("random", tuple("abcdefghij"), split, empty, (0.5,), (0.25,))
    asked = ExpertConfig.model_validate(
        {"model": {"name": "convnet", "width": 16}, "train": {"epochs": 6, "batch_size": 64}, "experts": 12}
    )
    device = torch.device("cpu")
    with Engine(device, precision="float32", progress=NullProgress(), way=sys.argv[2]) as engine:
        cache = Cache(Path(sys.argv[1]), device=device, progress=NullProgress())
        ctx = Context(0, device, cache, engine, Costs(engine), NullProgress(), TrainConfig(), Path("."))
        record_trajectories(ctx, source, asked)
    """
)


def start(cache: Path, way: Way) -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; exec({WORKER!r})"
    return subprocess.Popen([sys.executable, "-c", code, cache, way], stderr=subprocess.PIPE)


def end(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    """Exit code, and what was said until the last worker had ended."""
    _, said = process.communicate(timeout=300)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
@pytest.mark.parametrize("way", ["serial", "workers"])
def test_kills_lose_no_finished_expert(way: Way, tmp_path: Path) -> None:
    """Killed while the first expert trains, and then five times soon after an expert was finished."""
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    assert end(start(plain, way)) == (0, b"")
    draws, finished = random.Random(0), set[str]()

    def progress() -> set[str]:
        return {path.name for pattern in ("weights.npy", "expert-*") for path in killed.rglob(pattern)}

    for _ in range(6):
        process = start(killed, way)
        while progress() == finished and process.poll() is None:
            time.sleep(0.002)
        time.sleep(draws.uniform(0, 0.1))
        process.kill()
        assert end(process) == (-signal.SIGKILL, b"")
        assert finished < progress()
        finished = progress()
    assert 1 < len(finished) < 1 + 12, "killed between the first expert and the last"
    assert end(start(killed, way)) == (0, b"")
    (one,), (other,) = plain.rglob("weights.npy"), killed.rglob("weights.npy")
    assert one.read_bytes() == other.read_bytes()
    assert len(progress()) == 1 + 12
    assert damaged_experts(other.parent) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs advisory locks")
def test_two_processes_train_each_expert_once(tmp_path: Path) -> None:
    processes = [start(tmp_path / "cache", "serial") for _ in range(2)]
    assert [end(process) for process in processes] == [(0, b""), (0, b"")]
    (path,) = (tmp_path / "cache").rglob("weights.npy")
    assert damaged_experts(path.parent) == []
    assert len(list(path.parent.glob("expert-*"))) == 12
