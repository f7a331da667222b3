"""The engine's three ways give one result, and it chooses, halves and refuses as it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch

from distill.errors import InputError, MemoryExhaustedError, NonFiniteError
from distill.models import model_config
from distill.training import engine as engine_module
from distill.training.config import TrainConfig
from distill.training.engine import Engine, Way, cores_for, stackable, worker_count
from distill.training.job import Job, Pool, Trained
from distill.training.loop import train
from distill.training.memory import memory_errors
from distill.training.precision import resolve_precision
from distill.training.recording import TrajectoryRow

CPU = torch.device("cpu")
WAYS: list[Way] = ["serial", "workers", "stack"]
MakeJob = Callable[..., Job]


class Told(Protocol):
    """What the fixture `told` remembers."""

    warnings: list[str]
    records: list[dict[str, Any]]
    steps: int


def make_engine(way: Way, progress: Any, **options: Any) -> Engine:
    return Engine(CPU, **{"precision": "float32", "progress": progress, "way": way, **options})


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[Way, Engine]]:
    """One engine a way; the workers are started once."""
    from distill.progress import NullProgress

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_WORKERS", "2")
        engines = {way: make_engine(way, NullProgress()) for way in WAYS}
        yield engines
        for engine in engines.values():
            engine.close()


def assert_same(got: list[Trained], expected: list[Trained], *, atol: float) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=atol)
        assert (a.accuracy is None) == (b.accuracy is None)
        two_digits = 2 / 1797  # rounding may turn those at a border
        assert a.accuracy == pytest.approx(b.accuracy, abs=two_digits if atol else 0)
        assert a.state.keys() == b.state.keys()
        for name in a.state:
            torch.testing.assert_close(a.state[name], b.state[name], rtol=atol, atol=atol)


HARD: dict[str, Any] = {}
SOFT = {"soft": True, "temperature": 2.0, "loss": "kl"}
MIXED = {"mix": "cutmix", "label_smoothing": 0.1}
ADAMW = {"optimizer": "adamw", "lr": 0.001}


# AdamW moves biases before a norm, whose gradient is rounding alone, by the sign of that rounding: no convnet there.
@pytest.mark.parametrize(
    ("model", "train_options"),
    [
        *[(model, options) for model in ("mlp", "convnet", "batch_norm") for options in (HARD, SOFT, MIXED)],
        ("mlp", ADAMW),
    ],
    ids=str,
)
def test_all_ways_agree(
    model: str,
    train_options: dict[str, Any],
    make_job: MakeJob,
    digits: Pool,
    soft_digits: Pool,
    engines: dict[Way, Engine],
) -> None:
    options = dict(train_options)
    pool = soft_digits if options.pop("soft", False) else digits
    jobs = [make_job(model, seed=seed, pool=pool, test=digits, **options) for seed in range(3)]
    serial, workers, stack = (engines[way].train(jobs, title="ways") for way in WAYS)
    assert_same(workers, serial, atol=1e-4)
    assert_same(stack, serial, atol=1e-4)
    assert serial[0].state.keys() == engines["serial"].train(jobs[:1], title="one")[0].state.keys()


def test_a_stack_counts_the_batches_of_batch_norm(make_job: MakeJob, engines: dict[Way, Engine]) -> None:
    jobs = [make_job("batch_norm", seed=seed, epochs=2, samples=24, batch_size=10) for seed in range(2)]
    for trained in engines["stack"].train(jobs, title="batch norm"):
        assert int(trained.state["body.1.num_batches_tracked"]) == 6


@pytest.mark.parametrize("way", WAYS)
def test_results_are_in_order_and_progress_is_whole(
    way: Way, make_job: MakeJob, engines: dict[Way, Engine], told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs of different lengths and models come back in the order in which they were given."""
    monkeypatch.setattr(engines[way], "progress", told)
    jobs = [
        make_job("mlp", seed=0, epochs=1),
        make_job("convnet", seed=1, epochs=3),
        make_job("mlp", seed=2, epochs=1),
        make_job("mlp", seed=0, epochs=2),
    ]
    heard: dict[int, Trained] = {}
    results = engines[way].train(jobs, title="order", on_done=heard.__setitem__)
    assert [heard[number] for number in range(4)] == results
    assert told.steps == sum(job.steps for job in jobs) == 3 + 9 + 3 + 6
    assert told.records == [
        {"event": "train", "title": "order", "jobs": 4, "way": way, "dtype": "torch.float32"}
    ]
    assert_same(results, [train([job], device=CPU, dtype=torch.float32)[0] for job in jobs], atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_no_jobs(way: Way, engines: dict[Way, Engine]) -> None:
    assert engines[way].train([], title="none") == []


def test_same_seed_same_bytes_however_many_workers(
    make_job: MakeJob, engines: dict[Way, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [make_job("convnet", seed=seed) for seed in range(3)]
    two = [engines["workers"].train(jobs, title="two") for _ in range(2)]
    monkeypatch.setenv("DISTILL_WORKERS", "1")
    one = engines["workers"].train(jobs, title="one")
    assert_same(two[1], two[0], atol=0)
    assert_same(one, two[0], atol=0)


def test_the_state_is_kept_only_where_asked_for(make_job: MakeJob, engines: dict[Way, Engine]) -> None:
    kept = make_job(seed=0)
    results = engines["stack"].train([kept, dataclasses.replace(kept, keep_state=False)], title="states")
    assert [bool(trained.state) for trained in results] == [True, False]


def test_accuracy_and_loss_against_a_plain_count(make_job: MakeJob, digits: Pool) -> None:
    job = make_job("batch_norm", test=digits, epochs=1, batch_size=24, augment="none", lr=1e-9)
    trained = train([job], device=CPU, dtype=torch.float32)[0]
    network = model_config(job.model.model_dump()).build((1, 8, 8), 10)
    network.load_state_dict(dict(trained.state))
    images = (digits.images / 255 - digits.preprocessing.mean[0]) / digits.preprocessing.std[0]
    predicted = network.eval()(images).argmax(dim=1)
    assert trained.accuracy == pytest.approx(float((predicted == digits.targets).double().mean()), abs=1e-3)
    assert job.indices is not None
    logits = network.train()(images[job.indices]).detach()
    expected = torch.nn.functional.cross_entropy(logits, digits.targets[job.indices])
    assert trained.loss == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ({"name": "mlp", "width": 64}, {"epochs": 15, "augment": "none", "schedule": "cosine"}),
        ({"name": "convnet", "width": 8}, {"epochs": 6, "augment": "none", "schedule": "cosine"}),
    ],
    ids=["mlp", "convnet"],
)
def test_a_tiny_network_learns(digits: Pool, model: dict[str, Any], settings: dict[str, Any]) -> None:
    held_out = Pool(digits.images[1200:], digits.targets[1200:], digits.preprocessing)
    job = Job(
        model=model_config(model),
        classes=10,
        config=TrainConfig(lr=0.05, batch_size=32, **settings),
        pool=digits,
        seed=0,
        indices=torch.arange(1200),
        test=held_out,
    )
    (trained,) = train([job], device=CPU, dtype=torch.float32)
    assert trained.accuracy is not None
    assert trained.accuracy > 0.9


def test_bfloat16_trains_nearly_alike(make_job: MakeJob, told: Told) -> None:
    jobs = [make_job("convnet", lr=0.01)]
    with make_engine("serial", told) as plain, make_engine("serial", told, precision="bfloat16") as half:
        (a,), (b,) = plain.train(jobs, title="float32"), half.train(jobs, title="bfloat16")
    assert a.loss != b.loss, "autocast was on"
    assert a.loss == pytest.approx(b.loss, abs=0.05)
    assert all(value.dtype == torch.float32 for value in b.state.values())


def test_dropout_is_decided_by_the_seed(digits: Pool, make_job: MakeJob) -> None:
    job = dataclasses.replace(make_job(), model=model_config("mlp"))
    dropout = dataclasses.replace(job, model=_with_dropout())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train([dropout], device=CPU, dtype=torch.float32)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left as it was"
    torch.manual_seed(2)
    assert_same(train([dropout], device=CPU, dtype=torch.float32), first, atol=0)
    assert first[0].loss != train([job], device=CPU, dtype=torch.float32)[0].loss, "dropout was on"


def _with_dropout() -> Any:
    from distill.models.mlp import MLPConfig

    class Dropping(MLPConfig):
        def build(self, image_shape: tuple[int, int, int], classes: int) -> Any:
            network = super().build(image_shape, classes)
            network.body.append(torch.nn.Dropout(0.5))
            return network

    return Dropping()


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_is_not_finite_names_its_job(
    way: Way, make_job: MakeJob, engines: dict[Way, Engine]
) -> None:
    jobs = [make_job(label="calm, seed 0"), make_job(lr=1e30, augment="none", label="wild, seed 1", epochs=4)]
    with pytest.raises(NonFiniteError, match=r"the loss of wild, seed 1 became (nan|inf) in epoch") as caught:
        engines[way].train(jobs, title="wild")
    assert "lr 1e+30" in str(caught.value)
    assert "lower lr" in str(caught.value)


def test_one_network_of_a_stack_that_is_not_finite_is_named(make_job: MakeJob, digits: Pool) -> None:
    endless = Pool(
        torch.full((100, 1, 8, 8), float("inf"), dtype=torch.float16),
        digits.targets[:100],
        digits.preprocessing,
    )
    jobs = [make_job(label="first"), make_job(label="second", pool=endless), make_job(label="third")]
    assert stackable(jobs) == [[0, 1, 2]]
    with pytest.raises(NonFiniteError, match="of second became nan in epoch 0"):
        train(jobs, device=CPU, dtype=torch.float32)


def test_batch_norm_on_one_value_a_channel(make_job: MakeJob) -> None:
    job = make_job(samples=5, batch_size=4, label="teacher")
    job = dataclasses.replace(job, model=model_config({"name": "resnet18", "width": 2}))
    with pytest.raises(InputError, match="batch of one image in training teacher") as caught:
        train([job], device=CPU, dtype=torch.float32)
    assert caught.value.found == "5 images in batches of 4"
    assert "change batch_size" in str(caught.value)


def test_what_can_be_stacked(make_job: MakeJob, digits: Pool, soft_digits: Pool) -> None:
    torchvision = dataclasses.replace(make_job(), model=model_config("torchvision/resnet18"))
    jobs = [
        make_job(seed=0),
        make_job("convnet", seed=0),
        make_job(seed=1),
        make_job(seed=2, epochs=3),
        make_job(seed=3, samples=30),
        make_job(seed=4, pool=soft_digits),
        make_job(seed=5, test=digits),
        make_job(seed=6, pool=Pool(digits.images, digits.targets, digits.preprocessing)),
        dataclasses.replace(make_job(), classes=11),
        torchvision,
        torchvision,
    ]
    assert stackable(jobs) == [[0, 2, 7], [1], [3], [4], [5], [6], [8], [9], [10]]


def test_a_stack_that_does_not_fit_is_halved(
    make_job: MakeJob, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def two_at_most(jobs: Any, **options: Any) -> list[Trained]:
        sizes.append(len(jobs))
        if len(jobs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(jobs, **options)

    monkeypatch.setattr(engine_module, "train", two_at_most)
    jobs = [make_job(seed=seed) for seed in range(5)]
    engine = make_engine("stack", told)
    results = engine.train(jobs, title="halved")
    assert sizes == [5, 2, 3, 1, 2]
    assert told.warnings == [
        f"{count} networks at once do not fit in memory; trying {half}" for count, half in ((5, 2), (3, 1))
    ]
    assert_same(results, [train([job], device=CPU, dtype=torch.float32)[0] for job in jobs], atol=1e-4)


@pytest.mark.parametrize("way", ["serial", "stack"])
def test_a_network_that_does_not_fit_alone(
    way: Way, make_job: MakeJob, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(jobs: Any, **options: Any) -> list[Trained]:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    monkeypatch.setattr(engine_module, "train", never)
    with pytest.raises(MemoryExhaustedError, match="out of memory while training big") as caught:
        make_engine(way, told).train([make_job(label="big")], title="big")
    assert "train.batch_size" in str(caught.value)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 50, dtype=torch.uint8), lambda: np.empty(1 << 60, dtype=np.uint8)],
    ids=["torch", "numpy"],
)
def test_running_out_of_memory_is_told(allocate: Callable[[], Any]) -> None:
    told = pytest.raises(MemoryExhaustedError, match="out of memory while dreaming")
    with told, memory_errors("dreaming", fix="wake up"):
        allocate()


def test_other_errors_pass_memory_errors() -> None:
    with pytest.raises(RuntimeError, match="something else"), memory_errors("x", fix="y"):
        raise RuntimeError("something else")


def test_the_way_chosen(make_job: MakeJob, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = [make_job()], [make_job(), make_job()]
    on_cpu = make_engine("auto", told)
    on_gpu = Engine(torch.device("cuda"), precision="float32", progress=told)  # type: ignore[arg-type]
    monkeypatch.setenv("DISTILL_WORKERS", "4")
    assert [on_cpu.choose(one), on_cpu.choose(two), on_gpu.choose(two)] == ["serial", "workers", "stack"]
    monkeypatch.setenv("DISTILL_WORKERS", "1")
    assert on_cpu.choose(two) == "serial"
    assert make_engine("stack", told).choose(two) == "stack"


def with_trajectory(job: Job, expert: int = 0) -> Job:
    """The job as an expert's, whose weights are never written as long as no epoch is named."""
    row = TrajectoryRow(Path("weights.npy"), expert, ())
    return dataclasses.replace(job, trajectory=row, one_thread=True)


def test_an_expert_has_one_thread(make_job: MakeJob, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a network alone has as many as its steps keep busy."""
    threads: list[int] = []

    def counting(jobs: Any, **options: Any) -> list[Trained]:
        threads.append(torch.get_num_threads())
        return train(jobs, **options)

    monkeypatch.setattr(engine_module, "train", counting)
    monkeypatch.setattr(engine_module, "useful_threads", lambda flops: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        make_engine("serial", told).train([make_job(), with_trajectory(make_job())], title="threads")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert threads == [2, 1]


@pytest.mark.parametrize(("count", "cores"), [(1, 1), (3, 3), (4, 4), (7, 4)])
def test_experts_share_no_more_cores_than_they_are(
    count: int, cores: int, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker pool divides its cores among the jobs: each is then left with one."""
    monkeypatch.setenv("DISTILL_WORKERS", "4")
    plain = [make_job() for _ in range(count)]
    assert cores_for(plain) == 4
    assert cores_for([with_trajectory(job, number) for number, job in enumerate(plain)]) == cores


def test_workers_share_the_cores_of_the_day(
    make_job: MakeJob, engines: dict[Way, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools of another number of cores are started anew, others stay."""
    engine = engines["workers"]
    jobs = [make_job(), make_job(seed=1)]
    pools = []
    for workers in ("2", "2", "1"):
        monkeypatch.setenv("DISTILL_WORKERS", workers)
        engine.train(jobs, title="cores")
        pools.append(engine._workers)
    assert pools[0] is pools[1]
    assert [pool.count for pool in pools if pool is not None] == [2, 2, 1]


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1.5", "²", ""])
def test_a_number_of_workers_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_WORKERS", text)
    with pytest.raises(InputError, match="DISTILL_WORKERS") as caught:
        worker_count()
    assert caught.value.found == text
    assert caught.value.allowed == "an integer >= 1"


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_precision("float32", CPU) == torch.float32
    assert resolve_precision("bfloat16", CPU) == torch.bfloat16
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False)
    assert resolve_precision("auto", CPU) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert resolve_precision("auto", CPU) == torch.bfloat16


def test_float32_is_not_rounded_by_the_device(told: Told) -> None:
    """cudnn's convolutions round float32 to 10 bits by default; what a user has set comes back."""
    before = torch.backends.cudnn.allow_tf32
    with Engine(CPU, precision="float32", progress=told):
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.deterministic
    assert torch.backends.cudnn.allow_tf32 == before
