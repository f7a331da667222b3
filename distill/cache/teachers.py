"""Networks trained on the source, for features and labels: trained once, then read from the cache."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from distill.cache.identity import (
    cache_key,
    definition_parts,
    has_weights_file,
    producer_version,
    training_parts,
)
from distill.cache.networks import Network, load_network, save_network
from distill.contracts import Context, Preprocessing, Source, Split
from distill.errors import InputError
from distill.files import disk_errors
from distill.locks import Lock
from distill.models import ModelSpec, build, describe, digest, model_config
from distill.models.base import ModelConfig
from distill.models.torchvision_models import TorchvisionConfig
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


def checkpoint_epochs(train: TrainConfig | None, count: int) -> tuple[int, ...]:
    """After which epochs of a training, evenly spaced, networks are kept besides the last; a file has none."""
    if train is None:
        return ()
    return tuple(sorted({train.epochs * number // count for number in range(1, count)} - {0}))


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
    kept as soon as it is trained; of several runs that want it, one trains it. Where targets are classes and nothing is
    mixed, it is recorded how samples fare.

    Args:
        ctx: its seed, engine and cache.
        source: `valid`, where it is not empty, measures the networks; the figure is in their `facts`.
        config: model and training.
        count: how many.
        name: what they are called in messages, such as "teacher".
        checkpoints: after how many epochs the weights are kept besides (0: before the first), at most `train.epochs`.
            They do not tell networks apart: one that is kept without some of them is trained once more, for all.
    """
    assert all(0 <= epoch <= config.train.epochs for epoch in checkpoints), "epochs of the training"
    teachers = _Teachers(ctx, source, config, _jobs(ctx, source, config, count, name), frozenset(checkpoints))
    if missing := teachers.look(range(count)):
        with teachers.locked(missing, name):
            # Another run may have trained them since.
            if missing := teachers.look(missing):
                teachers.train(missing, name)
    networks = teachers.networks(fresh=missing)
    for number, network in enumerate(networks):
        _tell(ctx, source, config, network, name if count == 1 else f"{name} {number}")
    return networks


def load_teacher(
    ctx: Context,
    source: Source,
    model: ModelConfig,
    *,
    name: str,
    preprocessing: Preprocessing | None = None,
) -> Network:
    """The network of a file of weights (`weights` of the model's options) as it is, not trained on the source.

    Args:
        ctx: its cache and progress.
        source: `valid`, where it is not empty, measures the network; the figure is in its `facts`.
        model: which network, with its weights.
        name: what it is called in messages.
        preprocessing: what it was trained behind, such as ImageNet's mean and std; None is the source's.

    Raises:
        InputError: the model names no weights, or they are for another network or number of classes.
        DamagedDataError: the file has another sha256 than asked for, or cannot be read.
    """
    if not isinstance(model, TorchvisionConfig) or not has_weights_file(model):
        raise InputError(
            f"the {name} is not trained, and names no weights",
            where="weights",
            found=describe(model),
            allowed="a model of torchvision with a file of weights",
            fix="name the file in weights, in the model's options, or train the network",
        )
    classes = len(source.classes)
    module = build(model, image_shape=source.image_shape, classes=classes, seed=0)
    facts = {
        "seconds": 0.0,
        "peak_bytes": 0,
        "valid_accuracy": None,
        "loss": None,
        "data": None,
        "model": describe(model),
        "epochs": 0,
    }
    behind = preprocessing or Preprocessing(mean=source.mean, std=source.std)
    network = Network(model, source.image_shape, classes, behind, module.state_dict(), facts)
    told = ""
    if len(source.valid):
        accuracy = _accuracy(ctx, source.valid, network)
        network = replace(network, facts={**facts, "valid_accuracy": accuracy})
        told = f", {accuracy:.1%} right on {len(source.valid)} validation images"
    ctx.progress.note(f"{name}: {describe(model)}, as its file has it{told}", **network.facts)
    return network


def _accuracy(ctx: Context, split: Split, network: Network) -> float:
    right = sum(
        int((logits.argmax(dim=1).cpu() == split.labels[rows]).sum())
        for rows, logits in ctx.cache.logits(split, network).blocks()
    )
    return right / len(split)


class _Teachers:
    """The networks of one request: those that are kept, and the training of the others.

    Args:
        ctx, source, config: as in `train_teachers`.
        jobs: one a network.
        epochs: after which the weights are wanted besides.
    """

    def __init__(
        self, ctx: Context, source: Source, config: TeacherConfig, jobs: list[Job], epochs: frozenset[int]
    ) -> None:
        self.ctx = ctx
        self.source = source
        self.config = config
        self.jobs = jobs
        self.epochs = epochs
        self.keys = [cache_key("network", _identity(ctx, source, config, job)) for job in jobs]
        self.found: list[Network | None] = [None] * len(jobs)

    def look(self, numbers: Iterable[int]) -> list[int]:
        """Load these networks; which of them are not kept, or without some of the epochs."""
        missing = []
        for number in numbers:
            network = self.found[number] = self._load(self.keys[number])
            if network is None or not self.epochs <= network.kept.keys():
                missing.append(number)
        return missing

    @contextmanager
    def locked(self, numbers: Iterable[int], name: str) -> Iterator[None]:
        """No other run trains these networks meanwhile. Locks are taken in the order of the keys, so that two runs
        that want several never wait for each other."""
        folder = self.ctx.cache.networks_folder
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            for key in sorted(self.keys[number] for number in numbers):
                lock = Lock(folder / f".{key}.lock", shared=False)
                with disk_errors(lock.path):
                    had = lock.take()
                if not had:
                    self.ctx.progress.note(f"another run trains a {name}; waiting for it")
                    lock.take(wait=True)
                held.callback(lock.release, remove=True)
            yield

    def train(self, numbers: list[int], name: str) -> None:
        """Train these networks and keep each with every epoch that is or was wanted of it.

        The first is trained alone, as it is where nobody asks for more: its weights are the same then.
        """
        for together in ([n for n in numbers if n == 0], [n for n in numbers if n > 0]):
            if together:
                self._train(together, name)

    def _train(self, numbers: list[int], name: str) -> None:
        jobs = [self._job(number) for number in numbers]

        def keep(place: int, trained: Trained) -> None:
            network = _network(jobs[place], trained, self.source)
            save_network(self.ctx.cache.networks_folder, self.keys[numbers[place]], network)
            self.found[numbers[place]] = network

        title = f"train {name} {describe(self.config.model)}" + (f" x {len(jobs)}" if len(jobs) > 1 else "")
        self.ctx.engine.train(jobs, title=title, on_done=keep)

    def networks(self, *, fresh: Collection[int]) -> list[Network]:
        """All of them, with the epochs that were asked for; those that are not `fresh` are charged."""
        networks = [network for network in self.found if network is not None]
        assert len(networks) == len(self.jobs)
        for number, network in enumerate(networks):
            facts = network.facts
            if number in fresh:
                self.ctx.costs.made(self.keys[number])
            else:
                self.ctx.costs.charge(
                    self.keys[number], seconds=facts["seconds"], peak_bytes=facts["peak_bytes"]
                )
        return [
            replace(network, kept={epoch: network.kept[epoch] for epoch in sorted(self.epochs)})
            for network in networks
        ]

    def _job(self, number: int) -> Job:
        known = self.found[number]
        epochs = self.epochs if known is None else self.epochs | known.kept.keys()
        return replace(self.jobs[number], keep_epochs=tuple(sorted(epochs)))

    def _load(self, key: str) -> Network | None:
        return load_network(
            self.ctx.cache.networks_folder,
            key,
            model=self.config.model,
            image_shape=self.source.image_shape,
            classes=len(self.source.classes),
            preprocessing=Preprocessing(mean=self.source.mean, std=self.source.std),
            progress=self.ctx.progress,
        )


def _tell(ctx: Context, source: Source, config: TeacherConfig, network: Network, name: str) -> None:
    accuracy = network.facts["valid_accuracy"]
    told = "" if accuracy is None else f", {accuracy:.1%} right on {len(source.valid)} validation images"
    ctx.progress.note(
        f"{name}: {describe(config.model)}, {config.train.epochs} epochs{told}", **network.facts
    )


def _identity(ctx: Context, source: Source, config: TeacherConfig, job: Job) -> dict[str, Any]:
    """Everything that decides the trained weights and what is said of them."""
    return {
        "data": source.train.fingerprint,
        "valid": source.valid.fingerprint,
        "classes": len(source.classes),
        "model": definition_parts(config.model),
        "train": training_parts(config.train),
        # The network's definition, and its weights where they come from a file that may change.
        "initial": digest(initial_network(job)),
        "mean": list(source.mean),
        "std": list(source.std),
        "seed": job.seed,
        "dtype": str(ctx.engine.dtype),
        "device": ctx.device.type,
    }


def _jobs(ctx: Context, source: Source, config: TeacherConfig, count: int, name: str) -> list[Job]:
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
        record_dynamics=config.train.mix == "none",
        label=f"{name} {describe(config.model)}",
    )
    return [
        replace(
            first,
            seed=ctx.derive("teacher", number),
            one_thread=number > 0,
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
        "producer": producer_version("network"),
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
