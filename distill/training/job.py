"""What the training engine is given and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.contracts import Preprocessing
from distill.training.config import Strict, TrainConfig
from distill.training.recording import Dynamics, TrajectoryRow


@dataclass(frozen=True, eq=False)
class Pool:
    """Images with targets, shared by any number of jobs.

    Args:
        images: uint8 (N, Ch, H, W) in 0..255, or float16 in units of pixel value / 255.
        targets: int64 (N,) class numbers, or float32 (N, C) logits (soft labels before the softmax).
        preprocessing: what is done to an image before a network sees it.
    """

    images: Tensor
    targets: Tensor
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(Ch, H, W)."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True, eq=False)
class Job:
    """One network to be trained, and tested where `test` is given.

    Args:
        model: configuration of the network.
        classes: C, its outputs.
        config: how to train it.
        pool: where its samples are.
        seed: names its initial weights, order, views and mixing; jobs of one seed are paired.
        indices: int64 (n,), the samples of the pool it trains on; all of them if None.
        test: what it is tested on after the last epoch.
        keep_state: whether the trained weights are wanted.
        keep_epochs: after how many epochs (0: before the first) the weights are wanted besides.
        record_dynamics: whether it is followed how each sample fares.
        trajectory: where the weights are written as it trains.
        label: for progress and errors, such as "random, seed 3".
    """

    model: Strict
    classes: int
    config: TrainConfig
    pool: Pool
    seed: int
    indices: Tensor | None = None
    test: Pool | None = None
    keep_state: bool = False
    keep_epochs: tuple[int, ...] = ()
    record_dynamics: bool = False
    trajectory: TrajectoryRow | None = None
    label: str = "network"

    @property
    def samples(self) -> int:
        return len(self.pool) if self.indices is None else len(self.indices)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.config.batch_size)

    @property
    def steps(self) -> int:
        return self.config.epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Trained:
    """A trained network.

    Args:
        loss: mean training loss of the last epoch.
        accuracy: share of the test pool it classifies rightly, None where there was none.
        seconds: wall time of its training and testing; of the whole stack where K were trained at once.
        peak_bytes: greatest memory, since the measured stage began, of the process (CPU) or allocator (GPU) that
            trained it.
        state: name -> tensor on the host, empty unless the job kept it.
        checkpoints: the same by epoch, for the job's `keep_epochs`.
        dynamics: how the job's samples fared, None unless it was recorded.
    """

    loss: float
    accuracy: float | None
    seconds: float
    peak_bytes: int
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    checkpoints: Mapping[int, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    dynamics: Dynamics | None = None
