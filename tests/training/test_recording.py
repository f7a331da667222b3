"""What is written down while networks train, against plain bookkeeping; and that training does not notice."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.errors import DamagedDataError, InputError
from distill.preprocessing import Transform
from distill.progress import NullProgress
from distill.training import loop
from distill.training.engine import Engine, stackable
from distill.training.job import Job, Pool, Trained
from distill.training.recording import DynamicsRecorder, TrajectoryRow, _write

CPU = torch.device("cpu")
MakeJob = Callable[..., Job]
EPOCHS = 3


def train(jobs: list[Job]) -> list[Trained]:
    return loop.train(jobs, device=CPU, dtype=torch.float32)


def recording(make_job: MakeJob, seeds: int = 2, **options: Any) -> list[Job]:
    asked = {"epochs": EPOCHS, "samples": 30, "lr": 0.2, **options}
    return [replace(make_job(seed=seed, **asked), record_dynamics=True) for seed in range(seeds)]


@pytest.mark.parametrize("count", [1, 3])
def test_samples_are_followed_as_plain_bookkeeping_has_it(
    count: int, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    see = DynamicsRecorder.see

    def noting(self: DynamicsRecorder, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        seen.append((index.clone(), logits.detach().clone(), targets.clone()))
        see(self, index, logits, targets)

    monkeypatch.setattr(DynamicsRecorder, "see", noting)
    results = train(recording(make_job, count))
    for k, result in enumerate(results):
        history: dict[int, list[tuple[bool, float]]] = {sample: [] for sample in range(30)}
        for index, logits, targets in seen:
            for sample, z, y in zip(index[k].tolist(), logits[k].tolist(), targets[k].tolist(), strict=True):
                others = [value for place, value in enumerate(z) if place != y]
                history[sample].append((z[y] > max(others), z[y] - max(others)))
        assert all(len(events) == EPOCHS for events in history.values())
        found = result.dynamics
        assert found is not None
        for sample, events in history.items():
            right = [each for each, _ in events]
            lost = sum(before and not after for before, after in itertools.pairwise(right))
            assert int(found.forgetting[sample]) == lost
            assert bool(found.learned[sample]) == any(right)
            assert float(found.margin[sample]) == pytest.approx(sum(m for _, m in events) / EPOCHS, abs=1e-4)
        assert int(found.forgetting.sum()) > 0, "nothing was forgotten: the test would not see a fault"
        assert not found.learned.all()


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_recorded_belongs_to_the_sample_of_that_place(count: int, make_job: MakeJob) -> None:
    """A network that hardly moves has the margins of its initial weights, sample by sample."""
    jobs = [
        replace(job, indices=torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:30])
        for seed, job in enumerate(recording(make_job, count, lr=1e-12, augment="none"))
    ]
    for job, result in zip(jobs, train(jobs), strict=True):
        assert job.indices is not None and result.dynamics is not None
        images, labels = job.pool.images[job.indices], job.pool.targets[job.indices]
        with torch.no_grad():
            logits = loop.initial_network(job)(Transform(job.pool.preprocessing)(images))
        own = logits.gather(1, labels[:, None])[:, 0]
        others = logits.masked_fill(torch.nn.functional.one_hot(labels, 10).bool(), -torch.inf).amax(dim=1)
        torch.testing.assert_close(result.dynamics.margin, own - others, rtol=1e-4, atol=1e-5)
        assert torch.equal(result.dynamics.learned, own > others)
        assert not result.dynamics.forgetting.any()


@pytest.mark.parametrize("model", ["convnet", "batch_norm"])
@pytest.mark.parametrize("count", [1, 2])
def test_recording_changes_nothing(count: int, model: str, make_job: MakeJob, tmp_path: Path) -> None:
    jobs = [replace(job, keep_epochs=(0, 2)) for job in recording(make_job, count, model=model)]
    path = empty_array(tmp_path, jobs[0], experts=count, epochs=(0, 1))
    jobs = [replace(job, trajectory=TrajectoryRow(path, k, (0, 1))) for k, job in enumerate(jobs)]
    plain = [replace(job, record_dynamics=False, keep_epochs=(), trajectory=None) for job in jobs]
    for recorded, without in zip(train(jobs), train(plain), strict=True):
        assert without.dynamics is None
        assert recorded.loss == without.loss
        assert all(torch.equal(recorded.state[name], without.state[name]) for name in without.state)


def empty_array(folder: Path, job: Job, *, experts: int, epochs: tuple[int, ...]) -> Path:
    """An array of NaN with room for the job's network."""
    path = folder / "weights.npy"
    size = sum(value.numel() for value in loop.initial_network(job).parameters())
    np.save(path, np.full((experts, len(epochs), size), np.nan, dtype="<f4"))
    return path


@pytest.mark.parametrize("stacked", [False, True])
def test_a_trajectory_goes_to_its_row_and_nowhere_else(
    stacked: bool, make_job: MakeJob, tmp_path: Path
) -> None:
    epochs = (0, 2, 3)
    jobs = [
        replace(make_job("convnet", seed=seed, epochs=3, lr=0.2), keep_epochs=epochs) for seed in range(2)
    ]
    path = empty_array(tmp_path, jobs[0], experts=4, epochs=epochs)
    jobs = [
        replace(job, trajectory=TrajectoryRow(path, row, epochs))
        for job, row in zip(jobs, (2, 0), strict=True)
    ]
    results = train(jobs) if stacked else [train([job])[0] for job in jobs]
    array = np.load(path)
    for row, result in zip((2, 0), results, strict=True):
        for place, epoch in enumerate(epochs):
            values = [value.flatten() for value in result.checkpoints[epoch].values()]
            assert np.array_equal(array[row, place], torch.cat(values).numpy())
        assert not np.array_equal(array[row, 1], array[row, 2]), "a copy"
    assert np.isnan(array[[1, 3]]).all()


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The array has holes: through a mapping, a full disk would end the process with SIGBUS."""
    path = tmp_path / "weights.npy"
    np.save(path, np.zeros((1, 2, 5), dtype="<f4"))
    whole = Path.open

    @contextmanager
    def full(self: Path, *arguments: Any) -> Any:
        with whole(self, *arguments) as file:
            yield Full(file)

    class Full:
        def __init__(self, file: IO[bytes]) -> None:
            self.file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(InputError, match="the disk is full") as caught:
        _write(TrajectoryRow(path, 0, (0, 1)), 0, torch.ones(5))
    assert caught.value.where == str(path)


def test_an_array_that_was_replaced_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "weights.npy"
    np.save(path, np.zeros((1, 2, 5), dtype="<f4"))
    with pytest.raises(DamagedDataError, match="replaced while experts trained") as caught:
        _write(TrajectoryRow(path, 0, (0, 1)), 0, torch.ones(6))
    assert caught.value.where == str(path)
    assert caught.value.found == "rows of [2, 5]"
    assert (np.load(path) == 0).all()


def test_workers_record_too(make_job: MakeJob) -> None:
    jobs = [replace(job, keep_epochs=(1,)) for job in recording(make_job, 2)]
    alone = [train([job])[0] for job in jobs]
    with Engine(CPU, precision="float32", progress=NullProgress(), way="workers") as engine:
        together = engine.train(jobs, title="record")
    for a, b in zip(alone, together, strict=True):
        assert a.dynamics is not None and b.dynamics is not None
        assert torch.equal(a.dynamics.forgetting, b.dynamics.forgetting)
        torch.testing.assert_close(a.dynamics.margin, b.dynamics.margin, rtol=1e-4, atol=1e-4)
        assert b.checkpoints.keys() == {1}


@pytest.mark.parametrize("stacked", [False, True])
def test_weights_are_kept_at_the_epochs_named(stacked: bool, make_job: MakeJob) -> None:
    jobs = [replace(make_job("batch_norm", seed=seed, epochs=4), keep_epochs=(0, 2, 4)) for seed in range(2)]
    results = train(jobs) if stacked else [train([job])[0] for job in jobs]
    shorter = [
        replace(job, config=job.config.model_copy(update={"epochs": 2, "schedule": "constant"}))
        for job in jobs
    ]
    for job, result, short in zip(jobs, results, shorter, strict=True):
        assert list(result.checkpoints) == [0, 2, 4]
        initial = loop.initial_network(job).state_dict()
        assert all(torch.equal(result.checkpoints[0][name], initial[name]) for name in initial)
        assert all(torch.equal(result.checkpoints[4][name], result.state[name]) for name in initial)
        until = train([short])[0].state
        for name in initial:
            torch.testing.assert_close(result.checkpoints[2][name], until[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(result.checkpoints[2]["body.0.weight"], result.state["body.0.weight"]), (
            "a copy"
        )


def test_jobs_that_keep_different_epochs_share_a_stack(make_job: MakeJob) -> None:
    jobs = [replace(make_job(seed=0), keep_epochs=(1,)), make_job(seed=1)]
    assert stackable(jobs) == [[0, 1]]
    assert [list(result.checkpoints) for result in train(jobs)] == [[1], []]
    assert stackable([replace(jobs[0], record_dynamics=True), jobs[1]]) == [[0], [1]]


@pytest.mark.parametrize(
    ("options", "found"), [({"mix": "mixup"}, "mix: mixup"), ({"soft": True}, "soft targets")]
)
def test_blended_samples_cannot_be_followed(
    options: dict[str, Any], found: str, make_job: MakeJob, soft_digits: Pool
) -> None:
    pool = {"pool": soft_digits} if options.pop("soft", False) else {}
    with pytest.raises(InputError, match="how samples fare cannot be recorded") as caught:
        train(recording(make_job, 1, **pool, **options))
    assert caught.value.found == found
