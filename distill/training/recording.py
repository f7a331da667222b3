"""What is written down while networks train: how samples fared, and the weights at chosen epochs.

Nothing here changes the training by one bit. Samples are counted by their number in the job, weights are copied.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from distill.errors import DamagedDataError, InputError
from distill.files import disk_errors

if TYPE_CHECKING:
    from distill.training.job import Job
    from distill.training.networks import Networks


@dataclass(frozen=True, eq=False)
class Dynamics:
    """How the n samples of a job fared in its epochs, each seen once an epoch, augmented, before the update.

    Args:
        forgetting: int32 (n,), how often a sample was right in one epoch and wrong in the next (Toneva et al., "An
            Empirical Study of Example Forgetting", ICLR 2019).
        learned: bool (n,), whether it was ever right.
        margin: float32 (n,), mean over the epochs of z_y - max_{c != y} z_c (Pleiss et al., "Identifying Mislabeled
            Data using the Area Under the Margin Ranking", NeurIPS 2020, eq. 2).
    """

    forgetting: Tensor
    learned: Tensor
    margin: Tensor


def margins(labels: Tensor, logits: Tensor) -> Tensor:
    """Logit of the label minus the greatest other logit, of the shape of `labels`; negative where a network is wrong.

    Pleiss et al., "Identifying Mislabeled Data using the Area Under the Margin Ranking", NeurIPS 2020, eq. 1.

    Args:
        labels: int64 (..., B).
        logits: (..., B, C); of one class alone there is nothing to be taken for, and its margin is its logit.
    """
    own = logits.gather(-1, labels[..., None])[..., 0]
    if logits.shape[-1] == 1:
        return own
    return own - logits.scatter(-1, labels[..., None], -torch.inf).amax(dim=-1)


class DynamicsRecorder:
    """Follows the samples of K jobs; O(K n) memory on the device.

    Raises:
        InputError: targets are soft or samples are mixed, so that none is right or wrong.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device) -> None:
        for job in jobs:
            refuse_blended(job)
        shape = (len(jobs), jobs[0].samples)
        self.epochs = jobs[0].config.epochs
        self.forgotten = torch.zeros(shape, dtype=torch.int32, device=device)
        self.right = torch.zeros(shape, dtype=torch.bool, device=device)
        self.learned = torch.zeros(shape, dtype=torch.bool, device=device)
        self.margins = torch.zeros(shape, device=device)

    @torch.no_grad()
    def see(self, index: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Follow one batch.

        Args:
            index: int64 (K, B), numbers of the samples in their jobs.
            logits: float32 (K, B, C).
            targets: int64 (K, B).
        """
        right = logits.argmax(dim=2) == targets
        margin = margins(targets, logits)
        forgotten = self.right.gather(1, index) & ~right
        self.forgotten.scatter_add_(1, index, forgotten.int())
        self.right.scatter_(1, index, right)
        self.learned.scatter_(1, index, self.learned.gather(1, index) | right)
        self.margins.scatter_add_(1, index, margin)

    def dynamics(self) -> list[Dynamics]:
        """One record a job, on the host."""
        margins = self.margins / self.epochs
        return [
            Dynamics(forgotten.cpu(), learned.cpu(), margin.cpu())
            for forgotten, learned, margin in zip(self.forgotten, self.learned, margins, strict=True)
        ]


def refuse_blended(job: Job) -> None:
    """Raise InputError where a sample of the job has no one class that it could be taken for."""
    soft = job.pool.soft
    if soft or job.config.mix != "none":
        raise InputError(
            f"how samples fare cannot be recorded in training {job.label}",
            found="soft targets" if soft else f"mix: {job.config.mix}",
            allowed="class labels and mix: none, so that a sample is right or wrong",
        )


@dataclass(frozen=True)
class TrajectoryRow:
    """Where an expert's weights go while it trains.

    Args:
        path: an .npy file of float32 (experts, checkpoints, P).
        expert: which row is written.
        epochs: after how many epochs each checkpoint is taken, ascending; 0 is the initial weights.
    """

    path: Path
    expert: int
    epochs: tuple[int, ...]


class WeightRecorder:
    """Copies the weights of K networks at the epochs that their jobs name.

    Args:
        jobs: one a network.
        networks: what is trained.
    """

    def __init__(self, jobs: Sequence[Job], networks: Networks) -> None:
        self.jobs = jobs
        self.networks = networks
        self.states: list[dict[int, dict[str, Tensor]]] = [{} for _ in jobs]

    def after(self, epoch: int) -> None:
        """Take what is wanted after that many epochs."""
        if any(epoch in job.keep_epochs for job in self.jobs):
            for job, state, kept in zip(self.jobs, self.networks.states(), self.states, strict=True):
                if epoch in job.keep_epochs:
                    kept[epoch] = state
        rows = [job.trajectory for job in self.jobs]
        if any(row is not None and epoch in row.epochs for row in rows):
            for row, vector in zip(rows, self.networks.vectors(), strict=True):
                if row is not None and epoch in row.epochs:
                    _write(row, row.epochs.index(epoch), vector)


def _write(row: TrajectoryRow, checkpoint: int, vector: Tensor) -> None:
    """Put one checkpoint (P,) into its place; the last one of a row brings the row to the disk.

    It is written, not mapped: on a full disk, a mapping of a file with holes ends the process without a word.

    Raises:
        DamagedDataError: the file is not the array that was made for this network and these epochs.
    """
    with disk_errors(row.path), row.path.open("r+b") as file:
        np.lib.format.read_magic(file)
        (_, *held), _, _ = np.lib.format.read_array_header_1_0(file)
        if held != (wanted := [len(row.epochs), len(vector)]):
            raise DamagedDataError(
                "the array was replaced while experts trained",
                where=str(row.path),
                found=f"rows of {held}",
                allowed=f"rows of {wanted}: checkpoints and weights",
                fix="run it again, and leave the file alone meanwhile",
            )
        file.seek((row.expert * len(row.epochs) + checkpoint) * vector.nbytes, os.SEEK_CUR)
        file.write(vector.numpy().data)
        if checkpoint == len(row.epochs) - 1:
            file.flush()
            os.fsync(file.fileno())
