"""Small jobs on scikit-learn's digits (8 x 8 px, 10 classes), shared by the tests of training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from distill.contracts import Preprocessing
from distill.models import model_config
from distill.training.config import TrainConfig
from distill.training.job import Job, Pool

MODELS: dict[str, Any] = {
    "mlp": {"name": "mlp", "width": 12, "depth": 1},
    "convnet": {"name": "convnet", "width": 4},
    "batch_norm": {"name": "convnet", "width": 4, "norm": "batch"},
}


class Told:
    """A `Progress` that remembers warnings and steps."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.steps = 0

    def task(self, title: str, *, total: int | None = None, unit: str = "") -> AbstractContextManager[Told]:
        return nullcontext(self)

    def advance(self, count: int = 1) -> None:
        self.steps += count

    def note(self, text: str, **facts: Any) -> None:
        pass

    def warn(self, text: str, **facts: Any) -> None:
        self.warnings.append(text)

    def record(self, event: str, **facts: Any) -> None:
        self.records.append({"event": event, **facts})


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture(scope="session")
def digits() -> Pool:
    """All 1,797 digits, hard labels."""
    raw = load_digits()
    images = torch.from_numpy((raw.images * 15).astype(np.uint8))[:, None]
    return Pool(images, torch.from_numpy(raw.target).long(), Preprocessing(mean=(0.288,), std=(0.354,)))


@pytest.fixture(scope="session")
def soft_digits(digits: Pool) -> Pool:
    """The same images with logits that favour the true class."""
    noise = torch.randn(len(digits), 10, generator=torch.Generator().manual_seed(0))
    logits = noise + 3 * torch.nn.functional.one_hot(digits.targets, 10)
    return Pool(digits.images, logits, digits.preprocessing)


@pytest.fixture
def make_job(digits: Pool) -> Callable[..., Job]:
    """A short training of a tiny network; `model` is a name in MODELS, other options go to TrainConfig or Job."""

    def make(
        model: str = "mlp",
        *,
        seed: int = 0,
        pool: Pool = digits,
        samples: int = 24,
        test: Pool | None = None,
        label: str = "network",
        **train: Any,
    ) -> Job:
        settings = {"epochs": 2, "batch_size": 10, "lr": 0.05, "augment": "dsa_without_flip", **train}
        first = 50 * seed
        return Job(
            model=model_config(MODELS[model]),
            classes=10,
            config=TrainConfig(**settings),
            pool=pool,
            seed=seed,
            indices=torch.arange(first, first + samples),
            test=test,
            keep_state=True,
            label=label,
        )

    return make
