"""What experts that are kept cost the run that uses them, and that those trained later are the same to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.cache import Cache
from distill.cache.experts import ExpertConfig, record_trajectories
from distill.cache.trajectories import Trajectories
from distill.contracts import Context, Source, Split
from distill.progress import NullProgress
from distill.training import engine as engine_module
from distill.training.config import TrainConfig
from distill.training.engine import Engine
from distill.training.job import Job

CPU = torch.device("cpu")


class Ledger:
    """A `Costs` that remembers what it is told."""

    def __init__(self) -> None:
        self.charges: list[dict[str, float]] = []
        self.unknown = 0

    def charge(self, result: str, **cost: float) -> None:
        self.charges.append(cost)

    def made(self, result: str) -> None:
        pass

    def mark_cached(self) -> None:
        self.unknown += 1


@pytest.fixture
def record(
    make_cache: Callable[[], Cache], make_split: Callable[..., Split], told: Any, tmp_path: Path
) -> Callable[[int], Ledger]:
    source = Source("random", ("a", "b", "c"), make_split(), make_split(0), (0.4, 0.5), (0.2, 0.3))

    def run(experts: int) -> Ledger:
        asked = {
            "model": {"name": "mlp", "width": 4, "depth": 1},
            "train": {"epochs": 1, "augment": "none"},
            "experts": experts,
        }
        ledger = Ledger()
        with Engine(CPU, precision="float32", progress=NullProgress(), way="serial") as engine:
            costs: Any = ledger
            ctx = Context(0, CPU, make_cache(), engine, costs, told, TrainConfig(), tmp_path)
            record_trajectories(ctx, source, ExpertConfig.model_validate(asked))
        return ledger

    return run


def costs_in(folder: Path) -> Sequence[Path]:
    return sorted(folder.rglob("cost-*.json"))


def test_kept_experts_are_charged_and_fresh_ones_are_not(
    record: Callable[[int], Ledger], tmp_path: Path
) -> None:
    assert record(2).charges == []
    again = record(3)
    assert len(again.charges) == 2
    assert all(cost["seconds"] > 0 and cost["peak_bytes"] > 0 for cost in again.charges)
    assert again.unknown == 0
    assert record(1).charges == again.charges[:1]
    assert len(costs_in(tmp_path)) == 3


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"seconds": null, "peak_bytes": 1}'])
def test_a_cost_that_is_not_known_any_more(
    content: str | None, record: Callable[[int], Ledger], tmp_path: Path
) -> None:
    record(2)
    first = costs_in(tmp_path)[0]
    if content is None:
        first.unlink()
    else:
        first.write_text(content)
    ledger = record(2)
    assert (len(ledger.charges), ledger.unknown) == (1, 1)


@pytest.fixture
def record_wide(make_cache: Callable[[], Cache], told: Any, tmp_path: Path) -> Callable[[], Trajectories]:
    """Three experts so wide that more threads than one round otherwise, trained in the way that `auto` chooses."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 16, 16), generator=generator, dtype=torch.uint8)
    train = Split(images, torch.arange(64) % 3, "fingerprint")
    empty = Split(images[:0], train.labels[:0], "empty")
    source = Source("random", ("a", "b", "c"), train, empty, (0.5,) * 3, (0.25,) * 3)
    asked = {
        "model": {"name": "convnet", "width": 128},
        "train": {"epochs": 2, "batch_size": 32},
        "experts": 3,
    }

    def run() -> Trajectories:
        with Engine(CPU, precision="float32", progress=NullProgress()) as engine:
            costs: Any = Ledger()
            ctx = Context(0, CPU, make_cache(), engine, costs, told, TrainConfig(), tmp_path)
            return record_trajectories(ctx, source, ExpertConfig.model_validate(asked))

    return run


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    ("workers", "missing"),
    [("2", (0,)), pytest.param("4", (0, 1), marks=pytest.mark.slow)],
    ids=["one, in this process", "two, on four cores"],
)
def test_missing_experts_become_what_they_were(
    workers: str,
    missing: tuple[int, ...],
    record_wide: Callable[[], Trajectories],
    trained: list[Job],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether three train side by side or fewer, with cores to spare that one network would keep busy."""
    monkeypatch.setenv("DISTILL_WORKERS", workers)
    monkeypatch.setattr(engine_module, "useful_threads", lambda flops: 2)
    path = record_wide().path
    expected = np.load(path)
    held = np.load(path, mmap_mode="r+")
    held[list(missing)] = 0
    held.flush()
    trained.clear()
    assert np.array_equal(np.load(record_wide().path), expected)
    assert [job.label for job in trained] == [f"expert {number}" for number in missing]
