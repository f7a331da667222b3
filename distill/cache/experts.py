"""Experts: networks trained on the source whose trajectories are kept, for trajectory matching."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from distill.cache.identity import (
    cache_key,
    definition_parts,
    preprocessing_parts,
    producer_version,
    training_parts,
)
from distill.cache.trajectories import FORMAT, Layout, Trajectories, TrajectoryFolder
from distill.contracts import Context, Preprocessing, Source
from distill.files import write_bytes_atomically
from distill.locks import Lock
from distill.models import ModelSpec, describe, digest, model_config
from distill.training.config import Augment, NonNegative, Positive, Strict, TrainConfig
from distill.training.job import Job, Pool, Trained
from distill.training.loop import initial_network
from distill.training.recording import TrajectoryRow


class ExpertTraining(TrainConfig):
    """Plain SGD with a constant rate, as in the released code of Cazenavette et al., CVPR 2022."""

    lr: Positive = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: NonNegative = 0.0
    schedule: Literal["constant", "cosine", "step"] = "constant"
    epochs: Annotated[int, Field(ge=1)] = 50
    augment: Augment = "dsa"


class ExpertConfig(Strict):
    """Networks to train on the source's train split, and which of their weights are kept.

    `every` is how many epochs lie between two checkpoints; the first is taken before training.
    """

    model: ModelSpec = Field(default_factory=lambda: model_config("convnet"))
    train: ExpertTraining = ExpertTraining()
    experts: Annotated[int, Field(ge=1)] = 100
    every: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _more_than_the_first(self) -> Self:
        if self.every > self.train.epochs:
            raise ValueError(
                f"every is {self.every}, but training ends after {self.train.epochs} epochs: "
                f"give at most {self.train.epochs}, or nothing but initial weights is kept"
            )
        return self


def record_trajectories(
    ctx: Context, source: Source, config: ExpertConfig, *, preprocessing: Preprocessing | None = None
) -> Trajectories:
    """Trajectories of `config.experts` experts; those that the cache lacks are trained, several at once.

    Args:
        ctx: its seed, engine and cache.
        source: whose train split they are trained on.
        config: model, training, number and checkpoints. More experts than an earlier run asked for are added to its.
        preprocessing: how images reach the experts; None is the source's mean and std.

    Raises:
        InputError: a network with running statistics.
    """
    first = _first_job(ctx, source, config, preprocessing or Preprocessing(source.mean, source.std))
    epochs = tuple(range(0, config.train.epochs + 1, config.every))
    initial = initial_network(first)
    parts = _identity(ctx, source, first, digest(initial), epochs)
    folder = TrajectoryFolder(
        ctx.cache.folder / "trajectories" / cache_key("trajectories", parts),
        Layout.of(initial, epochs),
        progress=ctx.progress,
    )
    folder.describe(parts)
    if missing := _missing(folder, config):
        lock = Lock(folder.folder / ".lock", shared=False)
        if not lock.take():
            ctx.progress.note("another run trains these experts; waiting for it")
            lock.take(wait=True)
        try:
            # While it waited, another run may have trained them.
            if missing := _missing(folder, config):
                _train(ctx, first, folder, config, missing)
        finally:
            lock.release()
    _charge(ctx, folder.folder, [expert for expert in range(config.experts) if expert not in missing])
    return folder.open(config.experts)


def _missing(folder: TrajectoryFolder, config: ExpertConfig) -> list[int]:
    done = folder.finished()
    return [expert for expert in range(config.experts) if expert not in done]


def _train(
    ctx: Context, first: Job, folder: TrajectoryFolder, config: ExpertConfig, missing: list[int]
) -> None:
    folder.make_room(config.experts)
    jobs = [
        replace(
            first,
            seed=ctx.derive("expert", expert),
            label=f"expert {expert}",
            trajectory=TrajectoryRow(folder.path, expert, folder.layout.epochs),
            one_thread=True,
        )
        for expert in missing
    ]

    last = time.perf_counter()

    def finish(place: int, trained: Trained) -> None:
        nonlocal last
        now = time.perf_counter()
        _save_cost(folder.folder, missing[place], seconds=now - last, peak_bytes=trained.peak_bytes)
        ctx.costs.made(str(_cost_path(folder.folder, missing[place])))
        last = now
        folder.finish(missing[place])

    title = f"train {len(missing)} experts, {describe(config.model)}"
    try:
        ctx.engine.train(jobs, title=title, on_done=finish)
    finally:
        folder.remember()


def _save_cost(folder: Path, expert: int, *, seconds: float, peak_bytes: int) -> None:
    """Keep what an expert cost beside its row.

    Its seconds are those since the one before it was finished: their sum is what the training took, however many
    experts were trained at once.
    """
    cost = {"seconds": seconds, "peak_bytes": peak_bytes}
    write_bytes_atomically(_cost_path(folder, expert), json.dumps(cost).encode())


def _charge(ctx: Context, folder: Path, experts: Sequence[int]) -> None:
    """Charge this stage for experts that it did not train."""
    for expert in experts:
        path = _cost_path(folder, expert)
        try:
            cost = json.loads(path.read_text())
            ctx.costs.charge(str(path), seconds=float(cost["seconds"]), peak_bytes=int(cost["peak_bytes"]))
        except (OSError, ValueError, KeyError, TypeError):
            ctx.costs.mark_cached()  # the row is whole; what it cost is not known any more


def _cost_path(folder: Path, expert: int) -> Path:
    return folder / f"cost-{expert:05d}.json"


def _first_job(ctx: Context, source: Source, config: ExpertConfig, preprocessing: Preprocessing) -> Job:
    return Job(
        model=config.model,
        classes=len(source.classes),
        config=config.train,
        pool=Pool(source.train.images, source.train.labels, preprocessing),
        seed=ctx.derive("expert", 0),
    )


def _identity(
    ctx: Context, source: Source, first: Job, initial: str, epochs: tuple[int, ...]
) -> dict[str, Any]:
    """Everything that decides an expert's row; how many there are does not."""
    return {
        "format": FORMAT,
        "producer": producer_version("trajectories"),
        "data": source.train.fingerprint,
        "classes": len(source.classes),
        "model": definition_parts(first.model),
        "train": training_parts(first.config),
        "epochs": list(epochs),
        # The network's definition, and its weights where they come from a file that may change; expert 0 tells both.
        "initial": initial,
        **preprocessing_parts(first.pool.preprocessing),
        "seed": ctx.seed,
        "dtype": str(ctx.engine.dtype),
        "device": ctx.device.type,
    }
