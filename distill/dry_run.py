"""What a run would do: its files, and rough bounds on memory, disk and time. Nothing is read beyond a cheap look.

Times come from counted floating-point operations and the rates below, which are measurements of one machine
(tools/bench/students.py on 2 cores of a 2.5 GHz Xeon; a GPU's is the same order for small images). They tell
minutes from hours, no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.cache import default_folder
from distill.contracts import Estimate, Method, StepKind
from distill.data import Plan, plan
from distill.errors import InputError
from distill.models import describe
from distill.models.cost import forward_cost
from distill.recipe import Recipe
from distill.report.quantities import seconds, size
from distill.run_folder import RunFolder
from distill.training.config import Strict, TrainConfig
from distill.training.engine import worker_count

FLOPS_A_SECOND = {"cpu": 4e10, "cuda": 2e13}  # of one core, of one GPU
STEP_SECONDS = {"cpu": 4e-3, "cuda": 1e-3}  # a training step costs at least this
PROCESS_BYTES = 600_000_000  # a Python process with torch


@dataclass(frozen=True)
class Work:
    """Networks to train.

    Args:
        title: what for.
        flops: of all of them.
        steps: of all of them.
        parallel: how many run at once.
        peak_bytes: of one.
    """

    title: str
    flops: float
    steps: int
    parallel: int
    peak_bytes: int

    def seconds(self, device: str) -> float:
        """Time on a device, the networks side by side on a CPU's cores."""
        alone = max(self.flops / FLOPS_A_SECOND[device], self.steps * STEP_SECONDS[device])
        return alone / (self.parallel if device == "cpu" else 1)


def dry_run(recipe: Recipe, steps: Sequence[Method], folder: RunFolder, device: torch.device) -> str:
    """The plan of a run as text."""
    looked = plan(recipe.data)  # type: ignore[arg-type]
    estimates = _estimates(recipe, steps, looked)
    lines = [
        f"would run {len(steps)} step{'s' if len(steps) > 1 else ''} on {device}; nothing was run",
        "",
        f"data     {_data_text(recipe, looked)}",
        *(
            f"step {k}   {step.kind} {step.name}" + (f": {estimate.images} images" if estimate else "")
            for k, (step, estimate) in enumerate(zip(steps, estimates, strict=True))
        ),
        f"compare  {', '.join(describe(student) for student in recipe.evaluate.students)}; "
        f"set against {', '.join(recipe.evaluate.against) or 'nothing'}; {recipe.evaluate.seeds} seeds",
        "",
        *_costs(recipe, estimates, looked, device),
        "",
        "would write",
        *(f"  {path}" for path in folder.outputs),
        f"  {_cache_folder(recipe)} (cache)",
    ]
    return "\n".join(lines)


def check_places(steps: Sequence[Method]) -> None:
    """Let every step refuse its place in the order of steps."""
    follows: StepKind | None = None
    for number, step in enumerate(steps):
        with step_named(number, step):
            step.check_place(follows)
        follows = step.kind


@contextmanager
def step_named(number: int, step: Method) -> Iterator[None]:
    """Put the step's place in the recipe into an InputError that names none."""
    try:
        yield
    except InputError as error:
        error.where = error.where or f"steps.{number}.{step.name}"
        raise


def _estimates(recipe: Recipe, steps: Sequence[Method], looked: Plan) -> list[Estimate | None]:
    """What each step will do; None where the number of images or classes is not known."""
    if looked.train is None or looked.classes is None:
        return [None for _ in steps]
    train = round(looked.train * (1 - recipe.data.valid))  # type: ignore[attr-defined]
    found: list[Estimate | None] = []
    before = None
    for step in steps:
        estimate = step.estimate(train=train, classes=looked.classes, before=before)
        before = estimate.images
        found.append(estimate)
    return found


def _data_text(recipe: Recipe, looked: Plan) -> str:
    def known(value: int | None) -> str:
        return "?" if value is None else str(value)

    shape = "?" if looked.image_shape is None else " x ".join(map(str, looked.image_shape))
    return (
        f"{recipe.data.name}: {known(looked.classes)} classes, {known(looked.train)} training and "  # type: ignore[attr-defined]
        f"{known(looked.test)} test images of {shape}"
    )


def _costs(
    recipe: Recipe, estimates: Sequence[Estimate | None], looked: Plan, device: torch.device
) -> list[str]:
    """Lines on time, memory and disk, as far as they are known."""
    if None in estimates or looked.image_shape is None or looked.classes is None or looked.test is None:
        return ["time, memory and disk: unknown, because the data do not tell their size cheaply"]
    shape, classes = looked.image_shape, looked.classes
    work = [
        _training(training.model, training.train, training.samples, shape, classes, title=f"step {k}")
        for k, estimate in enumerate(estimates)
        for training in (estimate.trainings if estimate else ())
    ]
    last = estimates[-1]
    assert last is not None
    work += _students(recipe, last.images, looked)
    total = sum(item.seconds(device.type) for item in work)
    image_bytes = looked.image_bytes or 0
    peak = PROCESS_BYTES + 2 * image_bytes + max(_side_by_side(item, device) for item in work)
    pixels = shape[0] * shape[1] * shape[2]
    set_bytes = last.images * (pixels + 2 * classes + 32)
    cache_bytes = _cache_bytes(estimates, shape, classes)
    return [
        f"time     about {seconds(total)} (from counted operations; right to a factor of three)",
        f"memory   about {size(int(peak))}, of which images {size(image_bytes)}",
        f"disk     set at most {size(set_bytes)}; cache about {size(cache_bytes)}",
    ]


def _side_by_side(item: Work, device: torch.device) -> int:
    """Memory of the networks that run at once; on a CPU each has a process of its own."""
    if device.type == "cuda" or item.parallel == 1:
        return item.parallel * item.peak_bytes
    return item.parallel * (item.peak_bytes + PROCESS_BYTES)


def _students(recipe: Recipe, images: int, looked: Plan) -> list[Work]:
    asked = recipe.evaluate
    assert looked.image_shape is not None and looked.classes is not None and looked.test is not None
    arms = 2 + ("random" in asked.against) + ("full" in asked.against)  # the set counts in two regimes
    found = []
    for student in asked.students:
        one = _training(student, recipe.train, images, looked.image_shape, looked.classes, title="students")
        count = arms * asked.seeds
        test_flops = forward_cost(student, looked.image_shape, looked.classes).flops * looked.test
        found.append(
            Work(
                "students",
                (one.flops + test_flops) * count,
                one.steps * count,
                min(worker_count(), count),
                one.peak_bytes,
            )
        )
    return found


def _training(
    model: Strict, train: TrainConfig, samples: int, shape: tuple[int, int, int], classes: int, *, title: str
) -> Work:
    cost = forward_cost(model, shape, classes)
    batch = min(train.batch_size, samples)
    return Work(
        title,
        flops=3 * cost.flops * samples * train.epochs,  # backward costs twice the forward
        steps=train.epochs * -(-samples // train.batch_size),
        parallel=1,
        peak_bytes=4 * (3 * cost.parameters + 2 * cost.activations * batch),
    )


def _cache_bytes(estimates: Sequence[Estimate | None], shape: tuple[int, int, int], classes: int) -> int:
    trainings = [training for estimate in estimates if estimate for training in estimate.trainings]
    if not trainings:
        return 0
    parameters = max(forward_cost(training.model, shape, classes).parameters for training in trainings)
    features = sum(estimate.features for estimate in estimates if estimate)
    widest = 4096  # features of most networks here
    return 4 * (parameters * len(trainings) + features * (widest + classes))


def _cache_folder(recipe: Recipe) -> Path:
    return Path(recipe.cache.folder) if recipe.cache.folder else default_folder()
