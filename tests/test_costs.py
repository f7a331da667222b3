"""The ledger of costs: seconds and peak memory of each stage, cached work included."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distill.contracts import Preprocessing
from distill.costs import CostedLedger, Costs
from distill.evaluation.results import StageCost
from distill.models import model_config
from distill.progress import NullProgress
from distill.training.config import TrainConfig
from distill.training.engine import Engine
from distill.training.job import Job, Pool
from distill.training.memory import peak_bytes, reset_peak

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(CPU, precision="float32", progress=NullProgress(), way="serial") as engine:
        yield engine


@pytest.fixture
def costs(engine: Engine) -> Costs:
    return Costs(engine)


def job() -> Job:
    pool = Pool(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4), Preprocessing((0.0,), (1.0,)))
    train = TrainConfig(epochs=1, augment="none")
    return Job(model=model_config("mlp"), classes=4, config=train, pool=pool, seed=0)


def touch(size: int) -> None:
    """Use `size` bytes and give them back to the system."""
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, 4096):
            memory[page] = 1


def peak_can_be_reset() -> bool:
    touch(200 * MIB)
    high = peak_bytes(CPU)
    reset_peak(CPU)
    return peak_bytes(CPU) < high - 100 * MIB


def test_seconds_are_measured_in_order(costs: Costs) -> None:
    with costs.stage("first"):
        time.sleep(0.05)
    with costs.stage("second"):
        pass
    assert list(costs.stages) == ["first", "second"]
    assert 0.05 <= costs.stages["first"].seconds < 5
    assert costs.stages["second"].seconds < 0.05
    assert not costs.stages["first"].cached


def test_a_stage_that_failed_is_not_entered(costs: Costs) -> None:
    with pytest.raises(ValueError, match="failed"), costs.stage("first"):
        raise ValueError("failed")
    assert costs.stages == {}


def test_parts_of_an_interrupted_evaluation_are_added(tmp_path: Path, engine: Engine) -> None:
    """Three processes: two are cut off after a student each, the third finishes."""
    path = tmp_path / "students.jsonl"
    for part in range(3):
        costs = Costs(engine)
        with pytest.raises(KeyboardInterrupt), costs.stage("evaluate"):
            ledger = CostedLedger(path, identity="set", costs=costs)
            assert len(ledger.known) == part
            time.sleep(0.2)
            ledger.add(f"job {part}", 0.5)
            raise KeyboardInterrupt
    costs = Costs(engine)
    with costs.stage("evaluate"):
        CostedLedger(path, identity="set", costs=costs)
    assert 0.6 <= costs.stages["evaluate"].seconds < 5
    assert not costs.stages["evaluate"].cached
    with costs.stage("other"):
        CostedLedger(path, identity="another set", costs=costs)
    assert costs.stages["other"].seconds < 0.2, "what students of another set cost is not this one's"


def test_the_peak_of_an_earlier_part_counts(costs: Costs) -> None:
    with costs.stage("evaluate"):
        costs.go_on(StageCost(100.0, 1 << 60, cached=True))
        costs.go_on(StageCost(10.0, None))
    cost = costs.stages["evaluate"]
    assert (cost.seconds, cost.peak_bytes, cost.cached) == (pytest.approx(110, abs=5), 1 << 60, True)


def test_a_ledger_without_a_file_keeps_no_cost(costs: Costs, tmp_path: Path) -> None:
    with costs.stage("evaluate"):
        CostedLedger(None, identity="set", costs=costs).add("job", 0.5)
    assert list(tmp_path.iterdir()) == []


def test_cached_work_is_charged_to_its_stage_alone(costs: Costs) -> None:
    with costs.stage("before"):
        pass
    with costs.stage("cached"):
        costs.charge("one", seconds=100.0, peak_bytes=1 << 60)
        costs.charge("other", seconds=20.0, peak_bytes=5)
        costs.charge("one", seconds=100.0, peak_bytes=1 << 60)  # read again, paid once
    with costs.stage("after"):
        costs.mark_cached()
    assert costs.stages["cached"].seconds == pytest.approx(120, abs=5)
    assert costs.stages["cached"].peak_bytes == 1 << 60
    assert [costs.stages[name].cached for name in ("before", "cached", "after")] == [False, True, True]
    assert costs.stages["after"].seconds < 5
    assert costs.stages["after"].peak_bytes < 1 << 60


def test_what_a_stage_has_made_costs_nothing_to_read_again(costs: Costs) -> None:
    with costs.stage("made"):
        costs.made("one")
        costs.charge("one", seconds=100.0, peak_bytes=1)
    with costs.stage("read"):
        costs.charge("one", seconds=100.0, peak_bytes=1)
    assert costs.stages["made"].seconds < 50 and not costs.stages["made"].cached
    assert costs.stages["read"].seconds >= 100


def test_the_peak_is_that_of_the_stage_and_not_of_its_last_training(costs: Costs, engine: Engine) -> None:
    """Memory that was given back before a training began still was the stage's peak."""
    if not peak_can_be_reset():
        pytest.skip("this system keeps the peak of the process's whole life")
    with costs.stage("small"):
        engine.train([job()], title="small")
    with costs.stage("large"):
        touch(200 * MIB)
        engine.train([job()], title="large")
    assert costs.stages["large"].peak_bytes > costs.stages["small"].peak_bytes + 100 * MIB


def test_the_memory_of_workers_is_added(
    costs: Costs, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_worker_peak", 1 << 50)
    with costs.stage("without"):
        pass
    with costs.stage("with"):
        engine._worker_peak = 1 << 50
    assert costs.stages["without"].peak_bytes < 1 << 50, "of an earlier stage"
    assert costs.stages["with"].peak_bytes == pytest.approx((1 << 50) + peak_bytes(CPU), abs=1 << 30)
    assert engine.take_worker_peak() == 0
