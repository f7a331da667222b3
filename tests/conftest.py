"""What the tests of methods and of the evaluation share: a small source of real digits, and a run around it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distill.cache import Cache, Network
from distill.cache.text_passes import TextPasses
from distill.contracts import Context, Preprocessing, Source
from distill.costs import Costs, PoolWorkers
from distill.data.statistics import channel_statistics, split_of
from distill.models.mlp import MLPConfig
from distill.parallel.local import LocalPool
from distill.progress import NullProgress
from distill.training.config import TrainConfig
from distill.training.engine import Engine
from distill.training.job import Job

# A busy machine is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of an accelerator are skipped where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on busy cores spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data: DISTILL_DATA or beside the checkout; without it the test is skipped."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DISTILL_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}")
    return folder


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """uint8 (1797, 1, 8, 8) and int64 (1797,)."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images * 15).to(torch.uint8)[:, None]
    return images, torch.from_numpy(bunch.target).long()


@pytest.fixture(scope="session")
def make_source() -> Callable[..., Source]:
    """make_source(train=(8, 8, 8), valid=2, test=4, channels=1): `train` digits of each class.

    Training rows of the classes alternate, so that a class is no slice.
    """

    def make(train: Sequence[int] = (8, 8, 8), *, valid: int = 2, test: int = 4, channels: int = 1) -> Source:
        images, labels = _digits()
        if channels == 3:
            images = torch.cat([images, 255 - images, images // 2], dim=1)
        rows = [(labels == number).nonzero().flatten() for number in range(len(train))]
        parts = {
            "train": [own[:count] for own, count in zip(rows, train, strict=True)],
            "valid": [own[100 : 100 + valid] for own in rows],
            "test": [own[-test:] for own in rows],
        }
        chosen = {name: torch.cat(part).sort().values for name, part in parts.items()}
        splits = {name: split_of(images[part], labels[part]) for name, part in chosen.items()}
        mean, std = channel_statistics(splits["train"].images)
        return Source(
            name="digits",
            classes=tuple(
                ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"][: len(train)]
            ),
            train=splits["train"],
            valid=splits["valid"],
            mean=mean,
            std=std,
            held_out=splits["test"],
        )

    return make


@pytest.fixture(scope="session")
def source(make_source: Callable[..., Source]) -> Source:
    """Three classes of eight training images, 1 x 8 x 8."""
    return make_source()


class _NaNForBlack(MLPConfig):
    """A network that gives NaN for black images."""

    def build(self, image_shape: tuple[int, int, int], classes: int) -> Any:
        network = super().build(image_shape, classes)
        network.body.insert(0, _Poison())
        return network


class _Poison(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (x.amax(dim=(1, 2, 3), keepdim=True) > 0)


@pytest.fixture(scope="session")
def nan_for_black() -> Callable[[tuple[int, int, int], int], Network]:
    """nan_for_black(image_shape, classes): a network that takes pixels as they are and gives NaN for black images."""

    def make(image_shape: tuple[int, int, int], classes: int) -> Network:
        state = _NaNForBlack().build(image_shape, classes).state_dict()
        pixels = Preprocessing((0.0,) * image_shape[0], (1.0,) * image_shape[0])
        return Network(_NaNForBlack(), image_shape, classes, pixels, state, facts={})

    return make


@pytest.fixture
def make_context(tmp_path: Path) -> Iterator[Callable[..., Context]]:
    """make_context(seed=0, folder=None, device="cpu", **train): a run of its own, or one whose cache lies in `folder`.

    Networks are trained in this process by one thread: more would cost more than the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    engines: list[Engine] = []

    def make(*, seed: int = 0, folder: Path | None = None, device: str = "cpu", **train: object) -> Context:
        root = tmp_path / f"run-{len(engines)}" if folder is None else folder
        progress = NullProgress()
        engine = Engine(torch.device(device), precision="float32", progress=progress, way="serial")
        engines.append(engine)
        scratch = root / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        return Context(
            seed=seed,
            device=torch.device(device),
            cache=Cache(root / "cache", device=torch.device(device), progress=progress),
            engine=engine,
            costs=Costs(engine),
            progress=progress,
            train=TrainConfig.model_validate({"epochs": 2, **train}),
            scratch=scratch,
        )

    yield make
    for engine in engines:
        engine.close()
    torch.set_num_threads(threads)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """Every job that is trained from now on."""
    jobs: list[Job] = []
    train = Engine.train

    def counting(self: Engine, asked: Any, **options: Any) -> Any:
        jobs.extend(asked)
        return train(self, asked, **options)

    monkeypatch.setattr(Engine, "train", counting)
    return jobs


@pytest.fixture
def text_passes() -> Callable[[Path], TextPasses]:
    """text_passes(folder): passes over text in a cache there."""
    return lambda folder: TextPasses(folder, costs=Costs(PoolWorkers(LocalPool(1))))


@contextmanager
def _two_nodes(*paths: str) -> Iterator[None]:
    """A Ray cluster of two nodes of one core each, which import from `paths` too."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    root = Path(__file__).parents[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, str(root), str(root / "selectors")]))
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", cluster.address)
        yield
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="session")
def ray_cluster() -> Callable[..., AbstractContextManager[None]]:
    """ray_cluster(*paths): a cluster of two nodes, which RAY_ADDRESS names as a user's shell does."""
    return _two_nodes
