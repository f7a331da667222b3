"""What a dry run tells of time and memory: starting counts, and more work is never told to be less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distill.dry_run import PROCESS_BYTES, START_SECONDS, WORKERS_SECONDS
from distill.pipeline import dry_run

TINY = {
    "data": {"name": "digits", "cap": 30},
    "train": {"epochs": 2},
    "steps": [{"soft_label": {"ipc": 3, "teacher": {"model": "mlp", "train": {"epochs": 1}}}}],
    "evaluate": {"students": ["mlp"], "seeds": 2},
}
UNITS = {"MB": 1e6, "GB": 1e9}


def told(tmp_path: Path, *overrides: str) -> tuple[float, float]:
    """Seconds and bytes."""
    text = dry_run(TINY, overrides, out=tmp_path / "out", device="cpu")
    seconds = re.search(r"time     about ([\d.,]+) s", text)
    memory = re.search(r"memory   about ([\d.]+) ([MG]B)", text)
    assert seconds is not None and memory is not None, text
    return float(seconds[1].replace(",", "")), float(memory[1]) * UNITS[memory[2]]


@pytest.mark.parametrize(("workers", "processes"), [(1, 1), (2, 3)])
def test_a_tiny_run_takes_what_starting_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, processes: int
) -> None:
    monkeypatch.setenv("DISTILL_WORKERS", str(workers))
    start = START_SECONDS + (WORKERS_SECONDS if workers > 1 else 0)
    seconds, memory = told(tmp_path)
    assert start <= seconds < start + 2
    assert processes * PROCESS_BYTES <= memory < 1.1 * processes * PROCESS_BYTES
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "more",
    [
        "evaluate.seeds=200",
        "train.epochs=2000",
        "evaluate.full_epochs=2000",
        "steps.0.teacher.train.epochs=9000",
    ],
)
def test_more_work_takes_longer(tmp_path: Path, more: str) -> None:
    assert told(tmp_path, more)[0] > told(tmp_path)[0] + 1


def test_data_still_to_be_fetched_are_not_checked_and_it_says_so(tmp_path: Path) -> None:
    text = dry_run(
        TINY, [f"data={{name: mnist, folder: {tmp_path}/none}}"], out=tmp_path / "out", device="cpu"
    )
    assert "not checked" in text
    assert "at most 60000 for train and valid, 10000 test" in text
    assert list(tmp_path.iterdir()) == []


MATCHING = "steps.0={trajectory: {ipc: 1, experts: {model: mlp, count: 2}, iterations: 40, inner_steps: 20}}"


@pytest.mark.parametrize(
    "more",
    [
        "steps.0.experts.count=400",
        "steps.0.iterations=40000",
        "steps.0.inner_steps=20000",
        "steps.0.students=1000",
        "steps.0.start_epochs.last=4000",
    ],
)
def test_more_matching_takes_longer(tmp_path: Path, more: str) -> None:
    assert told(tmp_path, MATCHING, more)[0] > told(tmp_path, MATCHING)[0] + 1


def test_matching_tells_its_memory_and_its_disk(tmp_path: Path) -> None:
    def text(*overrides: str) -> str:
        big = "steps.0.experts.model={name: convnet, width: 128}"
        return dry_run(TINY, [MATCHING, big, *overrides], out=tmp_path / "out", device="cpu")

    def cached(plan: str) -> float:
        found = re.search(r"cache about ([\d.]+) ([kMG]B)", plan)
        assert found is not None, plan
        return float(found[1]) * {"kB": 1e3, **UNITS}[found[2]]

    few, many = text("steps.0.start_epochs.last=0"), text("steps.0.start_epochs.last=27")
    assert cached(many) == pytest.approx(10 * cached(few), rel=0.02), "30 checkpoints instead of 3"
    longer = (MATCHING, "steps.0.experts.model=convnet", "steps.0.inner_steps=3000")
    assert told(tmp_path, *longer, "steps.0.gradient=unroll")[1] > 2 * told(tmp_path, *longer)[1]
