"""Networks trained on the source, for features and labels: trained once, then read from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from distill.cache.identity import cache_key
from distill.cache.networks import Network, load_network, save_network
from distill.contracts import Context, Preprocessing, Source
from distill.models import ModelSpec, describe, digest, model_config
from distill.training.config import Augment, Positive, Strict, TrainConfig
from distill.training.job import Job, Pool, Trained
from distill.training.loop import initial_network


class TeacherTraining(TrainConfig):
    """Training on real data: shorter, with a higher learning rate, than training on a small set."""

    lr: Positive = 0.05
    schedule: Literal["constant", "cosine", "step"] = "cosine"
    epochs: Annotated[int, Field(ge=1)] = 20
    batch_size: Annotated[int, Field(ge=1)] = 128
    augment: Augment = "crop"


class TeacherConfig(Strict):
    """A network to train on the source's train split.

    Few epochs make an early-stopped teacher, whose labels teach small sets better than a converged one's.
    """

    model: ModelSpec = Field(default_factory=lambda: model_config({"name": "convnet", "width": 32}))
    train: TeacherTraining = TeacherTraining()


def train_teacher(
    ctx: Context, source: Source, config: TeacherConfig, *, name: str, checkpoints: Sequence[int] = ()
) -> Network:
    """The network of `config` trained on all of `source.train`: the first of `train_teachers`."""
    return train_teachers(ctx, source, config, count=1, name=name, checkpoints=checkpoints)[0]


def train_teachers(
    ctx: Context,
    source: Source,
    config: TeacherConfig,
    *,
    count: int,
    name: str,
    checkpoints: Sequence[int] = (),
) -> list[Network]:
    """Networks of `config` trained on all of `source.train`, each from its own initial weights.

    A network is known by its configuration and its number, so that steps of a run that ask for the same share it. It is
    kept as soon as it is trained. Where targets are classes and nothing is mixed, it is recorded how samples fare.

    Args:
        ctx: its seed, engine and cache.
        source: `valid`, where it is not empty, measures the networks; the figure is in their `facts`.
        config: model and training.
        count: how many.
        name: what they are called in messages, such as "teacher".
        checkpoints: after how many epochs the weights are kept besides (0: before the first), at most `train.epochs`.
    """
    assert all(0 <= epoch <= config.train.epochs for epoch in checkpoints), "epochs of the training"
    jobs = _jobs(ctx, source, config, count, name, checkpoints)
    keys = [cache_key("network", _identity(ctx, source, config, job)) for job in jobs]
    found = [_load(ctx, source, config, key) for key in keys]
    for network in found:
        if network is not None:
            ctx.costs.charge(seconds=network.facts["seconds"], peak_bytes=network.facts["peak_bytes"])
    missing = [number for number in range(count) if found[number] is None]

    def keep(place: int, trained: Trained) -> None:
        number = missing[place]
        network = _network(jobs[number], trained, source)
        save_network(ctx.cache.networks_folder, keys[number], network)
        found[number] = network

    if missing:
        title = f"train {name} {describe(config.model)}" + (f" x {len(missing)}" if len(missing) > 1 else "")
        ctx.engine.train([jobs[number] for number in missing], title=title, on_done=keep)
    networks = [network for network in found if network is not None]
    assert len(networks) == count
    for number, network in enumerate(networks):
        _tell(ctx, source, config, network, name if count == 1 else f"{name} {number}")
    return networks


def _tell(ctx: Context, source: Source, config: TeacherConfig, network: Network, name: str) -> None:
    accuracy = network.facts["valid_accuracy"]
    told = "" if accuracy is None else f", {accuracy:.1%} right on {len(source.valid)} validation images"
    ctx.progress.note(
        f"{name}: {describe(config.model)}, {config.train.epochs} epochs{told}", **network.facts
    )


def _load(ctx: Context, source: Source, config: TeacherConfig, key: str) -> Network | None:
    return load_network(
        ctx.cache.networks_folder,
        key,
        model=config.model,
        image_shape=source.image_shape,
        classes=len(source.classes),
        preprocessing=Preprocessing(mean=source.mean, std=source.std),
        progress=ctx.progress,
    )


def _identity(ctx: Context, source: Source, config: TeacherConfig, job: Job) -> dict[str, Any]:
    """Everything that decides the trained weights and what is said of them."""
    return {
        "data": source.train.fingerprint,
        "valid": source.valid.fingerprint,
        "classes": len(source.classes),
        "config": config.model_dump(mode="json"),
        # The network's definition, and its weights where they come from a file that may change.
        "initial": digest(initial_network(job)),
        "mean": list(source.mean),
        "std": list(source.std),
        "seed": job.seed,
        "dtype": str(ctx.engine.dtype),
        "device": ctx.device.type,
        "checkpoints": list(job.keep_epochs),
    }


def _jobs(
    ctx: Context, source: Source, config: TeacherConfig, count: int, name: str, checkpoints: Sequence[int]
) -> list[Job]:
    """One job a network; they share their pools."""
    preprocessing = Preprocessing(mean=source.mean, std=source.std)
    valid = source.valid
    first = Job(
        model=config.model,
        classes=len(source.classes),
        config=config.train,
        pool=Pool(source.train.images, source.train.labels, preprocessing),
        seed=ctx.derive("teacher", 0),
        test=Pool(valid.images, valid.labels, preprocessing) if len(valid) else None,
        keep_state=True,
        keep_epochs=tuple(sorted(set(checkpoints))),
        record_dynamics=config.train.mix == "none",
        label=f"{name} {describe(config.model)}",
    )
    return [
        replace(
            first,
            seed=ctx.derive("teacher", number),
            label=f"{first.label}, number {number}" if count > 1 else first.label,
        )
        for number in range(count)
    ]


def _network(job: Job, trained: Trained, source: Source) -> Network:
    facts = {
        "seconds": trained.seconds,
        "peak_bytes": trained.peak_bytes,
        "valid_accuracy": trained.accuracy,
        "loss": trained.loss,
        "data": source.train.fingerprint,
        "model": describe(job.model),
        "epochs": job.config.epochs,
    }
    pool = job.pool
    return Network(
        job.model,
        pool.image_shape,
        job.classes,
        pool.preprocessing,
        trained.state,
        facts,
        dynamics=trained.dynamics,
        kept=trained.checkpoints,
    )
