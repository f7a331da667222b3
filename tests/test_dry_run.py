"""What a dry run tells of time and memory: starting counts, and more work is never told to be less."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from distill import pipeline
from distill.dry_run import PROCESS_BYTES, START_SECONDS, WORKERS_SECONDS
from distill.errors import DistillError, InputError
from distill.labels import labelling
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


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of workers would hide that of matching."""
    monkeypatch.setenv("DISTILL_WORKERS", "1")


LABELLING = "steps.0={soft_label: {ipc: 20, teacher: {model: resnet18, train: {epochs: 1}}, views: {}}}"


@pytest.mark.parametrize(
    "more",
    ["train.epochs=30", "evaluate.against=[random, random_soft]"],
)
def test_labelling_more_views_takes_longer(tmp_path: Path, more: str) -> None:
    base = (
        LABELLING,
        "train.epochs=10",
        "evaluate.against=[random]",
        "evaluate.students=[{name: mlp, width: 4}]",
    )
    assert told(tmp_path, *base, more)[0] > told(tmp_path, *base)[0] + 1


def test_online_labels_that_students_cannot_share_take_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = (LABELLING, "train.epochs=10", "evaluate.students=[{name: mlp, width: 4}]")
    stored = told(tmp_path, *base)[0]
    assert told(tmp_path, *base, "steps.0.views.labels=online")[0] == pytest.approx(stored, rel=0.1)
    monkeypatch.setattr(labelling, "_SHARED_BYTES", 0)
    assert told(tmp_path, *base, "steps.0.views.labels=online")[0] > stored + 1


def test_labels_of_views_take_room_in_the_set(tmp_path: Path) -> None:
    def told_bytes(*overrides: str) -> float:
        asked = [LABELLING, "train.epochs=10000", *overrides]
        found = re.search(
            r"set at most ([\d.]+) ([kMG]B)", dry_run(TINY, asked, out=tmp_path / "out", device="cpu")
        )
        assert found is not None
        return float(found[1]) * {"kB": 1e3, **UNITS}[found[2]]

    classes, images = 10, 200
    assert told_bytes() == pytest.approx(2 * classes * images * 10_000, rel=0.05)
    assert told_bytes("steps.0.views.passes=1000") == pytest.approx(2 * classes * images * 1000, rel=0.05)
    assert told_bytes("steps.0.views.labels=online") < 2 * classes * images * 100


def test_looking_for_flat_minima_costs_twice(tmp_path: Path) -> None:
    """A step of GSAM takes two gradients; matching itself is next to nothing here."""
    longer = (MATCHING, "steps.0.iterations=1", "steps.0.start_epochs.last=9000")
    start, plain = told(tmp_path)[0], told(tmp_path, *longer)[0]
    flat = told(tmp_path, *longer, "steps.0.experts.gsam_rho=0.01")[0]
    assert flat - start == pytest.approx(2 * (plain - start), rel=0.1)


def test_students_take_memory_together_on_a_gpu_and_in_turn_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_worker: None
) -> None:
    longer = (MATCHING, "steps.0.experts.model=convnet", "steps.0.inner_steps=3000")
    many = (*longer, "steps.0.students=20")
    assert told(tmp_path, *many)[1] == told(tmp_path, *longer)[1]
    monkeypatch.setattr(pipeline, "choose_device", lambda name: torch.device("cuda"))
    assert told(tmp_path, *many)[1] > 5 * told(tmp_path, *longer)[1]


def test_the_way_back_keeps_the_weights_of_every_step(tmp_path: Path, one_worker: None) -> None:
    """4 bytes a parameter and step; segments keep one in k."""
    width = "steps.0.experts.model={name: mlp, width: 2000, depth: 1}"
    few, many = (told(tmp_path, MATCHING, width, f"steps.0.inner_steps={steps}")[1] for steps in (1, 4001))
    parameters = 2000 * (64 + 1) + 10 * (2000 + 1)
    assert many - few == pytest.approx(4000 * 4 * parameters, rel=0.2)
    segments = (MATCHING, width, "steps.0.inner_steps=4001", "steps.0.segment=100")
    assert told(tmp_path, *segments)[1] < few + (many - few) / 10


def test_fitting_the_whitening_takes_memory(tmp_path: Path, one_worker: None) -> None:
    cifar = f"data={{name: cifar10, folder: {tmp_path}/none}}"
    plain, whitened = (told(tmp_path, MATCHING, cifar, f"steps.0.zca={zca}")[1] for zca in ("false", "true"))
    expected = 24 * (3 * 32 * 32) ** 2
    assert whitened - plain == pytest.approx(expected, rel=0.2), "networks come after it, and take less"


@pytest.mark.parametrize(
    ("options", "where", "said"),
    [
        ("inner_batch=11", "steps.1.trajectory.inner_batch", "1 to 10, or null for all"),
        (
            "experts.model={name: convnet, norm: batch}",
            "steps.1.trajectory.experts.model",
            "networks without batch norm",
        ),
        ("experts.model={name: convnet, depth: 7}", "steps.1.trajectory.experts.model", "depth 1 to 3"),
    ],
)
def test_what_a_later_step_will_refuse_is_refused(
    tmp_path: Path, options: str, where: str, said: str
) -> None:
    recipe = {**TINY, "steps": [{"kcenter": {"ipc": 1}}, {"trajectory": {"iterations": 3}}]}
    assert "would run 2 steps" in dry_run(recipe, out=tmp_path / "out", device="cpu")
    with pytest.raises(InputError) as caught:
        dry_run(recipe, [f"steps.1.{options}"], out=tmp_path / "out", device="cpu")
    assert (caught.value.where, caught.value.allowed) == (where, said)


def test_an_option_with_one_value_tells_it(tmp_path: Path) -> None:
    recipe = {**TINY, "steps": [{"glister": {"ipc": 1, "features": "pixels"}}]}
    with pytest.raises(
        DistillError, match="not one of the allowed values\n  found: pixels\n  allowed: last_layer"
    ):
        dry_run(recipe, out=tmp_path / "out", device="cpu")


def test_weights_that_are_not_there_are_missed_by_a_dry_run(tmp_path: Path) -> None:
    encoder = {"name": "timm/tf_efficientnet_lite0", "weights": str(tmp_path / "absent.safetensors")}
    step = {"kcenter": {"ipc": 1, "features": "encoder", "encoder": encoder}}
    with pytest.raises(InputError, match="weights"):
        dry_run({**TINY, "steps": [step]}, out=tmp_path / "out", device="cpu")
