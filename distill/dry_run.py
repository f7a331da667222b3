"""What a run would do: its files, and rough bounds on memory, disk and time. Nothing is run or written.

Times come from counted operations and the rates below, which are measurements of one machine (tools/bench/students.py
on 2 cores of a 2.5 GHz Xeon; a GPU's is the same order for small images). They tell minutes from hours, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.cache import default_folder
from distill.contracts import Estimate, Labelling, Method, Passes, Source
from distill.data import Plan, plan, with_target
from distill.data.outline import outline, target_outline
from distill.evaluation.tested import check_tested
from distill.labels.labelling import shares_labels
from distill.models import describe
from distill.models.cost import forward_cost
from distill.recipe import Recipe
from distill.report.quantities import long_seconds, seconds, size
from distill.run_folder import RunFolder, State, state_lines
from distill.step_checks import check_files, check_places, check_steps
from distill.training.config import Strict, TrainConfig
from distill.training.engine import worker_count

FLOPS_A_SECOND = {"cpu": 4e10, "cuda": 2e13}  # of one core, of one GPU
STEP_SECONDS = {"cpu": 4e-3, "cuda": 1e-3}  # a training step costs at least this
# Without these a run of seconds is told to take none. Measured there as a run of a few steps: 10 s with one worker,
# which is this process alone, and 14 to 16 s with two.
START_SECONDS = 8.0  # importing torch and the rest, and what the first training step sets up
WORKERS_SECONDS = 6.0  # the workers import them again, side by side
_ZCA_BYTES = (
    3 * 8
)  # an entry of the covariance of all pixels: it, its vectors and the decomposition's workspace
PROCESS_BYTES = 750_000_000  # resident set of a Python process that has trained a tiny network with torch


@dataclass(frozen=True)
class Work:
    """What is done with networks, one after another or side by side.

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


def dry_run(
    recipe: Recipe, steps: Sequence[Method], folder: RunFolder, device: torch.device, *, state: State
) -> str:
    """The plan of a run as text.

    Args:
        recipe, steps, folder, device: of the run.
        state: how the run would begin in the folder.

    Raises:
        InputError: what the run itself would refuse, as far as it shows without decoding an image.
    """
    check_places(steps, recipe)
    check_files(steps)
    looked = plan(recipe.data)  # type: ignore[arg-type]
    source = _outline(recipe, looked)
    if source is not None:
        check_steps(steps, source.without_test(), recipe.train)
        if recipe.target is not None:
            check_tested(source, recipe.evaluate.on, recipe.evaluate.against)
        looked = _counted(looked, source)
    estimates = _estimates(recipe, steps, looked, source)
    lines = [
        f"would run {len(steps)} step{'s' if len(steps) > 1 else ''} on {device}; nothing was run",
        *state_lines(state, folder),
        "",
        f"data     {_data_text(recipe, looked, source)}",
        *_target_lines(recipe, source),
        *(
            f"step {k}   {step.kind} {step.name}{_images(estimate)}"
            for k, (step, estimate) in enumerate(zip(steps, estimates, strict=True))
        ),
        f"compare  {_comparison(recipe)}",
        "",
        *_costs(recipe, estimates, looked, device),
        "",
        "would write",
        *(f"  {path}" for path in folder.outputs),
        f"  {_cache_folder(recipe)} (cache)",
    ]
    return "\n".join(lines)


def _outline(recipe: Recipe, looked: Plan) -> Source | None:
    """The source with its target, without pixels; None where either cannot be had cheaply."""
    source = outline(recipe.data, looked, seed=recipe.seed)  # type: ignore[arg-type]
    if source is None or recipe.target is None:
        return source
    target = target_outline(recipe.target, source, seed=recipe.seed)
    return None if target is None else with_target(source, target)


def _counted(looked: Plan, source: Source) -> Plan:
    """The plan with numbers that were counted in place of those that were declared."""
    train = len(source.train) + len(source.valid)
    return Plan(len(source.classes), looked.image_shape, train, len(source.test))


def _estimates(
    recipe: Recipe, steps: Sequence[Method], looked: Plan, source: Source | None
) -> list[Estimate | None]:
    """What each step will do; None where the number of images or classes is not known."""
    if looked.train is None or looked.classes is None:
        return [None for _ in steps]
    valid: float = recipe.data.valid  # type: ignore[attr-defined]
    train = round(looked.train * (1 - valid)) if source is None else len(source.train)
    found: list[Estimate | None] = []
    before = None
    for step in steps:
        estimate = step.estimate(train=train, classes=looked.classes, before=before)
        before = estimate.images
        found.append(estimate)
    return found


def _data_text(recipe: Recipe, looked: Plan, source: Source | None) -> str:
    def known(value: int | None) -> str:
        return "?" if value is None else str(value)

    shape = "?" if looked.image_shape is None else " x ".join(map(str, looked.image_shape))
    name: str = recipe.data.name  # type: ignore[attr-defined]
    if source is not None:
        counts = f"{len(source.train)} train, {len(source.valid)} valid, {len(source.test)} test"
        return f"{name}: {len(source.classes)} classes of {shape} images; {counts}"
    return (
        f"{name}: {known(looked.classes)} classes of {shape} images; at most {known(looked.train)} for train and "
        f"valid, {known(looked.test)} test\n"
        "         not checked: whether each class has the images asked for; the data are large, or still to be fetched"
    )


def _images(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    return f": {'at most ' if estimate.at_most else ''}{estimate.images} images"


def _target_lines(recipe: Recipe, source: Source | None) -> list[str]:
    if recipe.target is None:
        return []
    name: str = recipe.target.name  # type: ignore[attr-defined]
    if source is None or source.target is None:
        return [f"target   {name}"]
    target = source.target
    counts = f"{len(target.train)} train, {len(target.valid)} valid, {len(target.test)} test"
    return [f"target   {name}: {len(target.classes)} classes; {counts}"]


def _comparison(recipe: Recipe) -> str:
    asked = recipe.evaluate
    if asked.on == "nothing":
        return "nothing: no student is trained"
    students = ", ".join(describe(student) for student in asked.students)
    on = {"target": " on the target's test split", "transfer": " by a linear probe on the target"}.get(
        asked.on, ""
    )
    return f"{students}; set against {', '.join(asked.against) or 'nothing'}{on}; {asked.seeds} seeds"


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
    work += [
        _passes(passes, shape, classes, device, title=f"step {k}")
        for k, estimate in enumerate(estimates)
        for passes in (estimate.passes if estimate else ())
    ]
    last = estimates[-1]
    assert last is not None
    work += [
        _passes(passes, shape, classes, device, title="labels")
        for passes in _labelling(recipe, last.images, classes, last.labelling)
    ]
    work += _students(recipe, last.images, looked, device)
    in_workers = device.type == "cpu" and any(item.parallel > 1 for item in work)
    started = START_SECONDS + (WORKERS_SECONDS if in_workers else 0.0)
    total = started + sum(item.seconds(device.type) for item in work)
    image_bytes = looked.image_bytes or 0
    pixels = shape[0] * shape[1] * shape[2]
    whitening = _ZCA_BYTES * pixels**2 if any(each and each.whitening for each in estimates) else 0
    networks = max((_side_by_side(item, device) for item in work), default=0)
    peak = PROCESS_BYTES + 2 * image_bytes + max(networks, whitening)
    labels = 2 * classes
    if last.labelling is not None:
        labels = last.labelling.view_bytes * _label_passes(last.labelling, recipe.train)
    set_bytes = last.images * (last.pixel_bytes * pixels + labels + 32)
    set_bytes += 8 * pixels**2 if last.whitening else 0
    cache_bytes = _cache_bytes(estimates, shape, classes)
    return [
        f"time     about {long_seconds(total)}, of which starting {seconds(started)} (from counted operations; right "
        "to a factor of three)",
        f"memory   about {size(int(peak))}, of which images {size(image_bytes)}",
        f"disk     set at most {size(set_bytes)}; cache about {size(cache_bytes)}",
    ]


def _side_by_side(item: Work, device: torch.device) -> int:
    """Memory of the networks that run at once; on a CPU each has a process of its own."""
    if device.type == "cuda" or item.parallel == 1:
        return item.parallel * item.peak_bytes
    return item.parallel * (item.peak_bytes + PROCESS_BYTES)


def _students(recipe: Recipe, images: int, looked: Plan, device: torch.device) -> list[Work]:
    """The students of every arm; the set counts in two regimes."""
    asked = recipe.evaluate
    if asked.on == "nothing":
        return []
    assert looked.image_shape is not None and looked.classes is not None
    assert looked.train is not None and looked.test is not None
    found = []
    for student in asked.students:
        one = _training(student, recipe.train, images, looked.image_shape, looked.classes, title="students")
        arms = [one] * (2 + len({"random", "random_soft", "random_target"} & set(asked.against)))
        if "full" in asked.against:
            epochs = asked.full_epochs or max(1, round(recipe.train.epochs * images / looked.train))
            longer = recipe.train.model_copy(update={"epochs": epochs})
            arms.append(
                _training(student, longer, looked.train, looked.image_shape, looked.classes, title="")
            )
        test_flops = forward_cost(student, looked.image_shape, looked.classes).flops * looked.test
        count = len(arms) * asked.seeds
        found.append(
            Work(
                "students",
                sum(arm.flops + test_flops for arm in arms) * asked.seeds,
                sum(arm.steps for arm in arms) * asked.seeds,
                min(worker_count(), count) if device.type == "cpu" else count,
                max(arm.peak_bytes for arm in arms),
            )
        )
    return found


def _training(
    model: Strict, train: TrainConfig, samples: int, shape: tuple[int, int, int], classes: int, *, title: str
) -> Work:
    cost = forward_cost(model, shape, classes)
    batch = min(train.batch_size, samples)
    gradients = 2 if train.gsam_rho > 0 else 1  # a step
    return Work(
        title,
        flops=3 * gradients * cost.flops * samples * train.epochs,  # backward costs twice the forward
        steps=gradients * train.epochs * -(-samples // train.batch_size),
        parallel=1,
        peak_bytes=4 * (3 * cost.parameters + 2 * cost.activations * batch),
    )


def _label_passes(labelling: Labelling, train: TrainConfig) -> int:
    """Passes over the images whose views are labelled."""
    return min(labelling.passes or train.epochs, train.epochs)


def _labelling(recipe: Recipe, images: int, classes: int, labelling: Labelling | None) -> list[Passes]:
    """What teachers do to label views: once where students share labels, else for every student."""
    if labelling is None:
        return []
    train, asked = recipe.train, recipe.evaluate
    students = asked.seeds * len(asked.students)
    passes = _label_passes(labelling, train)
    shared = labelling.view_bytes > 0 or shares_labels(passes * images, classes, students=students)
    epochs = passes if shared else students * train.epochs
    epochs += students * train.epochs * ("random_soft" in asked.against)
    count = epochs * -(-images // train.batch_size)
    batch = min(train.batch_size, images)
    return [Passes(model, batch=batch, count=count, kept=1, copies=1) for model in labelling.models]


def _passes(
    passes: Passes, shape: tuple[int, int, int], classes: int, device: torch.device, *, title: str
) -> Work:
    cost = forward_cost(passes.model, shape, classes)
    stacked = passes.stacked if device.type == "cuda" else 1
    one = 4 * (passes.copies * cost.parameters + 2 * cost.activations * passes.batch * passes.kept)
    return Work(
        title,
        flops=cost.flops * passes.batch * passes.count,
        steps=passes.count // (3 * stacked),  # a training step is three
        parallel=1,
        peak_bytes=stacked * one,
    )


def _cache_bytes(estimates: Sequence[Estimate | None], shape: tuple[int, int, int], classes: int) -> int:
    trainings = [training for estimate in estimates if estimate for training in estimate.trainings]
    weights = sum(
        forward_cost(training.model, shape, classes).parameters * training.checkpoints
        for training in trainings
    )
    features = sum(estimate.features for estimate in estimates if estimate)
    widest = 4096  # features of most networks here
    return 4 * (weights + features * (widest + classes))


def _cache_folder(recipe: Recipe) -> Path:
    return Path(recipe.cache.folder) if recipe.cache.folder else default_folder()
