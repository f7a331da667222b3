"""Teachers: trained once, kept with everything that decides them, and charged for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distill.cache import Cache, Network
from distill.cache.identity import producer_version
from distill.cache.teachers import TeacherConfig, load_teacher, train_teacher, train_teachers
from distill.contracts import Context, Preprocessing, Source, Split
from distill.errors import InputError
from distill.models import build, model_config
from distill.progress import NullProgress
from distill.training.config import TrainConfig
from distill.training.engine import Engine
from distill.training.job import Job, Trained

SMALL = {"name": "mlp", "width": 4, "depth": 1}
CPU = torch.device("cpu")
MakeSplit = Callable[..., Split]
MakeContext = Callable[..., Context]


def initial_state(job: Job) -> dict[str, torch.Tensor]:
    return build(job.model, image_shape=job.pool.image_shape, classes=3, seed=job.seed).state_dict()


class Spy:
    """An engine that counts what it is asked to train, and hands back the initial weights."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def train(
        self, jobs: Sequence[Job], *, title: str, on_done: Callable[[int, Trained], None]
    ) -> list[Trained]:
        self.jobs += jobs
        results = [
            Trained(
                loss=0.5,
                accuracy=None if job.test is None else 0.75,
                seconds=12.0,
                peak_bytes=345,
                state=initial_state(job),
                checkpoints={epoch: initial_state(job) for epoch in job.keep_epochs},
            )
            for job in jobs
        ]
        for number, result in enumerate(results):
            on_done(number, result)
        return results


class Ledger:
    def __init__(self) -> None:
        self.charges: list[dict[str, Any]] = []

    def charge(self, result: str, **cost: Any) -> None:
        self.charges.append(cost)

    def made(self, result: str) -> None:
        pass


@pytest.fixture
def source(make_split: MakeSplit) -> Source:
    return Source("random", ("a", "b", "c"), make_split(), make_split(5, 1), (0.4, 0.5), (0.2, 0.3))


@pytest.fixture
def spy() -> Spy:
    return Spy()


@pytest.fixture
def make_context(make_cache: Callable[[], Cache], told: Any, spy: Spy, tmp_path: Path) -> MakeContext:
    def make(**changes: Any) -> Context:
        parts = {"seed": 0, "device": CPU, "engine": spy, "costs": Ledger(), "progress": told}
        return Context(
            **{**parts, **changes}, cache=make_cache(), train=TrainConfig(), scratch=tmp_path / "scratch"
        )

    return make


def config(**changes: Any) -> TeacherConfig:
    return TeacherConfig.model_validate({"model": SMALL, "train": {"epochs": 2}, **changes})


def test_it_is_trained_once(make_context: MakeContext, source: Source, spy: Spy, told: Any) -> None:
    first = train_teacher(make_context(), source, config(), name="teacher")
    ctx = make_context()
    again = train_teacher(ctx, source, config(), name="teacher")
    assert len(spy.jobs) == 1
    assert again.facts == first.facts
    assert again.facts == {
        "seconds": 12.0,
        "peak_bytes": 345,
        "valid_accuracy": 0.75,
        "loss": 0.5,
        "data": source.train.fingerprint,
        "model": "mlp-w4-d1",
        "epochs": 2,
        "producer": producer_version("network"),
    }
    assert again.state.keys() == first.state.keys()
    assert all(torch.equal(again.state[name], first.state[name]) for name in first.state)
    assert again.identity == first.identity
    assert ctx.costs.charges == [{"seconds": 12.0, "peak_bytes": 345}]  # type: ignore[attr-defined]
    assert told.notes == ["teacher: mlp-w4-d1, 2 epochs, 75.0% right on 5 validation images"] * 2


def test_a_fresh_teacher_is_not_charged_twice(make_context: MakeContext, source: Source) -> None:
    ctx = make_context()
    train_teacher(ctx, source, config(), name="teacher")
    assert ctx.costs.charges == []  # type: ignore[attr-defined]


def test_without_validation_images(
    make_context: MakeContext, source: Source, make_split: MakeSplit, told: Any
) -> None:
    bare = replace(source, valid=make_split(rows=0))
    network = train_teacher(make_context(), bare, config(), name="teacher")
    assert network.facts["valid_accuracy"] is None
    assert told.notes == ["teacher: mlp-w4-d1, 2 epochs"]


SOURCES: dict[str, Callable[[Source, MakeSplit], Source]] = {
    "data": lambda source, make: replace(source, train=make(seed=5)),
    "validation data": lambda source, make: replace(source, valid=make(rows=5, seed=6)),
    "classes": lambda source, make: replace(source, classes=("a", "b", "c", "d")),
    "mean": lambda source, make: replace(source, mean=(0.4, 0.6)),
    "std": lambda source, make: replace(source, std=(0.2, 0.4)),
}


@pytest.mark.parametrize("part", SOURCES)
def test_a_source_that_changes(
    part: str, make_context: MakeContext, source: Source, make_split: MakeSplit, spy: Spy
) -> None:
    train_teacher(make_context(), source, config(), name="teacher")
    train_teacher(make_context(), SOURCES[part](source, make_split), config(), name="teacher")
    assert len(spy.jobs) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {**SMALL, "width": 5}},
        {"model": "convnet"},
        *({"train": {"epochs": 2, name: value}} for name, value in [("lr", 0.06), ("batch_size", 64)]),
        *(
            {"train": {"epochs": 2, name: value}}
            for name, value in [("optimizer", "adamw"), ("augment", "none")]
        ),
        *({"train": {"epochs": 2, name: value}} for name, value in [("mix", "mixup"), ("schedule", "step")]),
        {"train": {"epochs": 3}},
    ],
    ids=str,
)
def test_a_configuration_that_changes(
    changes: dict[str, Any], make_context: MakeContext, source: Source, spy: Spy
) -> None:
    train_teacher(make_context(), source, config(), name="teacher")
    train_teacher(make_context(), source, config(**changes), name="teacher")
    assert len(spy.jobs) == 2


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"device": torch.device("cuda")}, {"engine": SimpleNamespace(dtype=torch.bfloat16)}],
    ids=["seed", "device", "dtype"],
)
def test_a_run_that_differs(
    changes: dict[str, Any], make_context: MakeContext, source: Source, spy: Spy
) -> None:
    train_teacher(make_context(), source, config(), name="teacher")
    if "engine" in changes:
        changes["engine"].train = spy.train
    train_teacher(make_context(**changes), source, config(), name="teacher")
    assert len(spy.jobs) == 2


def test_steps_that_ask_for_the_same_share_it(
    make_context: MakeContext, source: Source, spy: Spy, told: Any
) -> None:
    """A network is known by its configuration and number; a name is for people."""
    features = train_teacher(make_context(), source, config(), name="features")
    teacher = train_teacher(make_context(), source, config(), name="teacher")
    assert len(spy.jobs) == 1
    assert features.identity == teacher.identity
    assert [note.split(":")[0] for note in told.notes] == ["features", "teacher"]


def test_several_are_trained_at_once_and_only_the_missing_ones(
    make_context: MakeContext, source: Source, spy: Spy
) -> None:
    one = train_teacher(make_context(), source, config(), name="teacher")
    three = train_teachers(make_context(), source, config(), count=3, name="teacher")
    assert len({network.identity["weights"] for network in three}) == 3
    assert three[0].identity == one.identity
    assert len(spy.jobs) == 3
    assert len({job.seed for job in spy.jobs}) == 3
    assert spy.jobs[1].pool is spy.jobs[2].pool, "a stack is made of jobs that share their pools"


def test_threads_do_not_depend_on_who_is_trained_beside_it(
    make_context: MakeContext, source: Source, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is always trained alone and may have several; the others have one."""
    together: list[int] = []
    train = Spy.train

    def counting(self: Spy, jobs: Sequence[Job], **options: Any) -> list[Trained]:
        together.append(len(jobs))
        return train(self, jobs, **options)

    monkeypatch.setattr(Spy, "train", counting)
    train_teachers(make_context(), source, config(), count=3, name="teacher")
    assert together == [1, 2]
    assert [job.one_thread for job in spy.jobs] == [False, True, True]


def test_a_killed_run_keeps_what_was_finished(
    make_context: MakeContext, source: Source, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Spy.train

    def killed(self: Spy, jobs: Sequence[Job], *, title: str, on_done: Callable[[int, Trained], None]) -> Any:
        if len(jobs) == 1:  # the first, which is trained alone
            return train(self, jobs, title=title, on_done=on_done)
        train(self, [jobs[1]], title=title, on_done=lambda _, trained: on_done(1, trained))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Spy, "train", killed)
        with pytest.raises(KeyboardInterrupt):
            train_teachers(make_context(), source, config(), count=4, name="teacher")
    first, last = spy.jobs
    spy.jobs.clear()
    networks = train_teachers(make_context(), source, config(), count=4, name="teacher")
    assert len(spy.jobs) == 2
    assert {first.seed, last.seed}.isdisjoint({job.seed for job in spy.jobs})
    assert len({network.identity["weights"] for network in networks}) == 4


def test_how_samples_fared_and_earlier_weights_are_kept_with_the_network(
    make_context: MakeContext, source: Source, spy: Spy
) -> None:
    def teachers(ctx: Context) -> list[Network]:
        return train_teachers(ctx, source, config(), count=2, name="teacher", checkpoints=(2, 0))

    with Engine(CPU, precision="float32", progress=NullProgress()) as engine:
        first = teachers(make_context(engine=engine))
    again = teachers(make_context())
    assert not spy.jobs
    for one, other in zip(first, again, strict=True):
        assert one.dynamics is not None and other.dynamics is not None
        assert len(one.dynamics.margin) == len(source.train)
        for name in ("forgetting", "learned", "margin"):
            assert torch.equal(getattr(one.dynamics, name), getattr(other.dynamics, name))
            assert getattr(one.dynamics, name).dtype == getattr(other.dynamics, name).dtype
        initial, last = other.checkpoints()
        assert [each.identity for each in one.checkpoints()] == [initial.identity, last.identity]
        assert initial.identity != last.identity == other.identity
        assert initial.dynamics is None and not initial.kept
    margins = [each.dynamics.margin for each in first if each.dynamics is not None]
    assert not torch.equal(*margins)


def test_checkpoints_do_not_tell_networks_apart(
    make_context: MakeContext, source: Source, spy: Spy, tmp_path: Path
) -> None:
    """One that is kept without some of them is trained once more, and kept with all that were ever wanted."""

    def epochs(*checkpoints: int) -> list[int]:
        ctx = make_context()
        network = train_teacher(ctx, source, config(), name="teacher", checkpoints=checkpoints)
        assert len(list(ctx.cache.networks_folder.iterdir())) == 1
        assert bool(ctx.costs.charges) == (len(spy.jobs) == trained)  # type: ignore[attr-defined]
        assert [each.identity for each in network.checkpoints()] == [network.identity] * len(checkpoints)
        return sorted(network.kept)

    trained = 0
    assert epochs(1) == [1]
    assert spy.jobs[-1].keep_epochs == (1,)
    trained = 1
    assert epochs() == []
    assert epochs(1) == [1]
    assert epochs(2, 0) == [0, 2]
    assert spy.jobs[-1].keep_epochs == (0, 1, 2)
    trained = 2
    assert epochs(2, 1) == [1, 2]
    assert len(spy.jobs) == 2


def test_two_runs_that_want_the_same_train_it_once(
    make_context: MakeContext, source: Source, spy: Spy, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, begun = Spy.train, threading.Event()

    def slow(self: Spy, *args: Any, **options: Any) -> Any:
        begun.set()
        deadline = time.monotonic() + 30
        while not any("waiting" in note for note in told.notes) and time.monotonic() < deadline:
            time.sleep(0.01)
        return train(self, *args, **options)

    monkeypatch.setattr(Spy, "train", slow)
    contexts = [make_context(), make_context()]
    with ThreadPoolExecutor(1) as other:
        first = other.submit(train_teachers, contexts[0], source, config(), count=2, name="teacher")
        assert begun.wait(30)
        second = train_teachers(contexts[1], source, config(), count=3, name="teacher")
        assert [each.identity for each in first.result()] == [each.identity for each in second[:2]]
    assert len(spy.jobs) == 3
    assert "another run trains a teacher; waiting for it" in told.notes
    assert len(contexts[1].costs.charges) == 2  # type: ignore[attr-defined]
    assert not [path for path in contexts[1].cache.networks_folder.iterdir() if path.suffix != ".npz"]


def test_mixed_samples_are_not_followed(make_context: MakeContext, source: Source) -> None:
    asked = config(train={"epochs": 2, "batch_size": 16, "mix": "cutmix"})
    with Engine(CPU, precision="float32", progress=NullProgress()) as engine:
        assert train_teacher(make_context(engine=engine), source, asked, name="teacher").dynamics is None
    assert train_teacher(make_context(), source, asked, name="teacher").dynamics is None


def test_a_network_is_known_by_its_configuration_too(make_network: Callable[..., Network]) -> None:
    """Modules that look alike, with the same weights, may still compute otherwise."""
    network = make_network({"name": "convnet", "width": 4, "depth": 2})
    alike = replace(network, model=model_config({"name": "convnet", "width": 4}))
    assert str(alike.module(CPU)) == str(network.module(CPU))
    assert alike.identity["weights"] == network.identity["weights"]
    assert alike.identity != network.identity


def test_what_does_not_decide_the_weights(
    make_context: MakeContext, source: Source, spy: Spy, make_split: MakeSplit
) -> None:
    train_teacher(make_context(), source, config(), name="teacher")
    renamed = replace(
        source, name="other", classes=("x", "y", "z"), notes=("a note",), held_out=make_split(9, 9)
    )
    train_teacher(make_context(), renamed, config(), name="teacher")
    assert len(spy.jobs) == 1


def test_weights_whose_file_changes(
    make_context: MakeContext, make_split: MakeSplit, source: Source, spy: Spy, tmp_path: Path
) -> None:
    """The same path with other weights in it is another teacher."""
    name = "torchvision/shufflenet_v2_x0_5"
    path = tmp_path / "weights.safetensors"
    rgb = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "rgb")
    rgb_source = replace(source, train=rgb, valid=make_split(rows=0), mean=(0.5,) * 3, std=(0.5,) * 3)
    for seed in (0, 1):
        network = build(model_config(name), image_shape=(3, 32, 32), classes=3, seed=seed)
        state = network.state_dict()
        save_file(
            {key.removeprefix("body.").replace("classifier", "fc"): value for key, value in state.items()},
            path,
        )
        pretrained = config(model={"name": name, "weights": str(path)})
        train_teacher(make_context(), rgb_source, pretrained, name="teacher")
    assert len(spy.jobs) == 2


def test_a_file_of_weights_may_move_or_go(
    make_context: MakeContext, make_split: MakeSplit, source: Source, spy: Spy, tmp_path: Path
) -> None:
    """The weights decide, not where they lay; and the network computes what it did while the file was there."""
    name = "torchvision/googlenet"  # treats images otherwise where weights were loaded
    rgb = Split(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), "rgb")
    rgb_source = replace(source, train=rgb, valid=make_split(rows=0), mean=(0.5,) * 3, std=(0.5,) * 3)
    plain = build(model_config(name), image_shape=(3, 32, 32), classes=3, seed=0)
    for layer in plain.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.weight.data *= 10  # as drawn, they let nothing of the image through
    state = {key.replace("classifier", "body.fc")[5:]: value for key, value in plain.state_dict().items()}
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    networks = []
    for path in paths:
        save_file(state, path)
        pretrained = config(model={"name": name, "weights": str(path)})
        networks.append(train_teacher(make_context(), rgb_source, pretrained, name="teacher"))
    assert len(spy.jobs) == 1
    image = torch.rand(1, 3, 32, 32)
    weighted = build(networks[0].model, image_shape=(3, 32, 32), classes=3, seed=0).eval()
    expected = weighted(image)
    assert not torch.allclose(plain.eval()(image), expected)
    for path in paths:
        path.unlink()
    for network in networks:
        # where weights lie in memory decides which kernel runs: the same numbers, rounded otherwise
        torch.testing.assert_close(network.module(CPU)(image), expected, rtol=1e-4, atol=0)
    assert networks[0].identity == networks[1].identity
    bare = replace(networks[0], model=model_config(name))
    assert not torch.allclose(bare.module(CPU)(image), expected)
    assert bare.identity != networks[0].identity


def test_a_teacher_from_a_file_is_not_trained(
    make_context: MakeContext, source: Source, spy: Spy, told: Any, tmp_path: Path
) -> None:
    name = "torchvision/shufflenet_v2_x0_5"
    path = tmp_path / "weights.safetensors"
    made = build(model_config(name), image_shape=(3, 32, 32), classes=3, seed=5).eval()
    save_file({key.replace("classifier", "body.fc")[5:]: v for key, v in made.state_dict().items()}, path)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    right = made((images / 255 - 0.5) / 0.25).argmax(dim=1)
    labels = torch.where(torch.arange(6) < 4, right, (right + 1) % 3)
    rgb = Split(images, labels, "rgb")
    rgb_source = replace(source, train=rgb, valid=rgb)
    behind = Preprocessing((0.5,) * 3, (0.25,) * 3)
    config = model_config({"name": name, "weights": str(path)})
    network = load_teacher(make_context(), rgb_source, config, name="teacher", preprocessing=behind)
    assert not spy.jobs
    assert network.facts["valid_accuracy"] == pytest.approx(4 / 6)
    assert network.facts["epochs"] == 0
    assert network.preprocessing is behind
    assert all(torch.equal(network.state[key], value) for key, value in made.state_dict().items())
    assert told.notes == [
        f"teacher: {name} (weights.safetensors), as its file has it, 66.7% right on 6 validation images"
    ]
    path.unlink()
    assert network.module(CPU)(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


@pytest.mark.parametrize("model", ["convnet", "torchvision/resnet18"])
def test_a_teacher_without_training_and_without_a_file(
    model: str, make_context: MakeContext, source: Source
) -> None:
    with pytest.raises(InputError, match="names no weights"):
        load_teacher(make_context(), source, model_config(model), name="teacher")


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: b"x" + data[1:]])
def test_a_damaged_file_is_trained_again(
    damage: Callable[[bytes], bytes], make_context: MakeContext, source: Source, spy: Spy, told: Any
) -> None:
    ctx = make_context()
    first = train_teacher(ctx, source, config(), name="teacher")
    (path,) = ctx.cache.networks_folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again = train_teacher(make_context(), source, config(), name="teacher")
    assert len(spy.jobs) == 2
    assert told.warnings == [f"{path} is damaged and will be trained again"]
    assert path.read_bytes() == whole
    assert again.identity == first.identity


def test_a_real_engine_trains_and_the_cache_gives_the_same_network(
    make_context: MakeContext, source: Source
) -> None:
    with Engine(CPU, precision="float32", progress=NullProgress()) as engine:
        first = train_teacher(make_context(engine=engine), source, config(), name="teacher")
    again = train_teacher(make_context(), source, config(), name="teacher")
    assert first.identity == again.identity
    assert 0 <= again.facts["valid_accuracy"] <= 1
    images = torch.zeros(2, 2, 8, 8)
    assert torch.equal(first.module(CPU)(images), again.module(CPU)(images))
    assert not any(parameter.requires_grad for parameter in again.module(CPU).parameters())
