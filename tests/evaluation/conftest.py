"""Sets to evaluate: real digits with hard labels, and with soft ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet, Selection, Source
from distill.labels.codecs import encode
from distill.selection import materialise
from distill.training.config import TrainConfig


@pytest.fixture
def hard_set(source: Source) -> DistilledSet:
    """Two images of class zero, one of one, three of two; batches of 4."""
    labels = source.train.labels.numpy()
    rows = [np.flatnonzero(labels == number)[:count] for number, count in enumerate((2, 1, 3))]
    indices = np.concatenate(rows)
    chosen = Selection(indices, np.ones(6, np.float32), np.zeros(6, np.float32), {"score": "none"})
    return materialise(chosen, source, TrainConfig(epochs=30, batch_size=4, warmup_epochs=3.0))


@pytest.fixture
def soft_set(hard_set: DistilledSet) -> DistilledSet:
    logits = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0))
    return replace(hard_set, soft=encode(logits, codec="full", temperature=1.0, teacher="made up"))
