"""Networks trained on the source, for features and labels: trained once, then read from the cache."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from distill.cache.identity import cache_key
from distill.cache.networks import Network, load_network, save_network
from distill.contracts import Context, Preprocessing, Source
from distill.models import ModelSpec, describe, digest, model_config
from distill.training.config import Augment, Positive, Strict, TrainConfig
from distill.training.job import Job, Pool
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


def train_teacher(ctx: Context, source: Source, config: TeacherConfig, *, name: str) -> Network:
    """The network of `config` trained on all of `source.train`.

    Args:
        ctx: its seed, engine and cache.
        source: `valid`, where it is not empty, measures the network; the figure is in its `facts`.
        config: model and training.
        name: names the seed, so that two teachers of one run differ.
    """
    job = _job(source, config, seed=ctx.derive(name))
    key = cache_key("network", _identity(ctx, source, config, job))
    folder = ctx.cache.networks_folder
    network = load_network(
        folder,
        key,
        model=config.model,
        image_shape=source.image_shape,
        classes=job.classes,
        preprocessing=job.pool.preprocessing,
        progress=ctx.progress,
    )
    if network is None:
        network = _train(ctx, job)
        save_network(folder, key, network)
    else:
        ctx.costs.charge(seconds=network.facts["seconds"], peak_bytes=network.facts["peak_bytes"])
    accuracy = network.facts["valid_accuracy"]
    told = "" if accuracy is None else f", {accuracy:.1%} right on {len(source.valid)} validation images"
    ctx.progress.note(
        f"{name}: {describe(config.model)}, {config.train.epochs} epochs{told}", **network.facts
    )
    return network


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
    }


def _job(source: Source, config: TeacherConfig, *, seed: int) -> Job:
    preprocessing = Preprocessing(mean=source.mean, std=source.std)
    valid = source.valid
    return Job(
        model=config.model,
        classes=len(source.classes),
        config=config.train,
        pool=Pool(source.train.images, source.train.labels, preprocessing),
        seed=seed,
        test=Pool(valid.images, valid.labels, preprocessing) if len(valid) else None,
        keep_state=True,
        label=f"teacher {describe(config.model)}",
    )


def _train(ctx: Context, job: Job) -> Network:
    (trained,) = ctx.engine.train([job], title=f"train {job.label}")
    facts = {
        "seconds": trained.seconds,
        "peak_bytes": trained.peak_bytes,
        "valid_accuracy": trained.accuracy,
        "loss": trained.loss,
    }
    pool = job.pool
    return Network(job.model, pool.image_shape, job.classes, pool.preprocessing, trained.state, facts)
