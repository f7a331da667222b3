"""What the training engine is given and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distill.augment import class_pairs
from distill.contracts import Preprocessing
from distill.training.config import Augment, Mixing, Strict, TrainConfig
from distill.training.recording import Dynamics, TrajectoryRow


@dataclass(frozen=True)
class ViewPlan:
    """Which views of N images are labelled, and in which order: all of it follows from counters.

    Args:
        seed: names orders, views and mixing.
        epochs: passes over the images, each with views of its own.
        batch_size: images a batch; the last of a pass may be short.
        augment, crop_scale, mix, mix_alpha: as in `TrainConfig`.
    """

    seed: int
    epochs: int
    batch_size: int
    augment: Augment
    crop_scale: float
    mix: Mixing
    mix_alpha: float

    def pairs(self, epoch: int, index: Tensor, classes: Tensor) -> Tensor:
        """The classes of the images `index` of a pass and of those that are mixed in: int64 (B, 2).

        Args:
            epoch: the pass.
            index: int64 (B,).
            classes: of all images, int64 (N,).
        """
        return class_pairs(self.mix, classes, seed=self.seed, epoch=epoch, index=index)


class ViewLabels(ABC):
    """Labels of views: stored ones, or a teacher's that is asked again.

    Args:
        plan: which views.
    """

    plan: ViewPlan

    @abstractmethod
    def on(self, device: torch.device) -> ViewLabels:
        """The same, ready to label on a device."""

    @abstractmethod
    def batch(self, epoch: int, start: int, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels of the batch that begins at place `start` of the order of pass `epoch`.

        Args:
            epoch, start: which batch.
            images: its views (B, Ch, H, W), on the device.
            index: of which images, int64 (B,).

        Returns:
            Logits float32 (B, C), and the weights of the views, float32 (B,), None where all count alike.
        """


@dataclass(frozen=True, eq=False)
class Pool:
    """Images with targets, shared by any number of jobs.

    Args:
        images: uint8 (N, Ch, H, W) in 0..255, or float16 in units of pixel value / 255.
        targets: int64 (N,) class numbers, or float32 (N, C) logits (soft labels before the softmax).
        preprocessing: what is done to an image before a network sees it.
        views: labels of views, which then take the place of `targets`, orders and augmentation; None without them.
        weights: how much each sample counts, float32 (N,), 0 or more, of mean 1; None where all count alike.
    """

    images: Tensor
    targets: Tensor
    preprocessing: Preprocessing
    views: ViewLabels | None = None
    weights: Tensor | None = None

    @property
    def soft(self) -> bool:
        """Whether networks learn from logits, and not from classes."""
        return self.views is not None or self.targets.is_floating_point()

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
        one_thread: on a CPU; what its weights are then does not depend on how many are trained beside it.
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
    one_thread: bool = False
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
