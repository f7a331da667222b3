"""K students of one outer step: one stack, whose kernels are shared, or one by one, which is faster on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.cache.trajectories import Trajectories
from distill.matching.gradient import Gradient, Learned, Matched, match
from distill.matching.networks import FlatNetworks
from distill.matching.steps import InnerSteps
from distill.matching.windows import StartEpochs
from distill.randomness import counter_integers, counter_permutation, derive_seed
from distill.training.config import Augment

_BLOCK = 256  # images a forward pass


@dataclass(frozen=True)
class Draw:
    """Which piece of a trajectory a student is to follow.

    Args:
        expert: number.
        start: after how many epochs of the expert the student starts.
        seed: names its batches and views.
    """

    expert: int
    start: int
    seed: int


@dataclass(frozen=True)
class Students:
    """How students learn in every outer step.

    Args:
        networks: what they are.
        experts: whom they follow.
        count: K.
        epochs: M, how many epochs of the expert a student is to cover.
        start: where it may start.
        steps, batch, augment: of its way; see `InnerSteps`.
        gradient, segment: see `distill.matching.gradient`.
        seed: the root of all draws.
        device: where it happens.
        stacked: whether students learn at once.
    """

    networks: FlatNetworks
    experts: Trajectories
    count: int
    epochs: int
    start: StartEpochs
    steps: int
    batch: int
    augment: Augment
    gradient: Gradient
    segment: int
    seed: int
    device: torch.device
    stacked: bool

    def draws(self, step: int) -> list[Draw]:
        """What the students of outer step `step` follow: every expert in turn, in an order that changes."""
        experts = self.experts.shape[0]
        found = []
        for number in range(self.count):
            place = step * self.count + number
            order = counter_permutation(derive_seed(self.seed, "experts"), place // experts, experts)
            window = self.start.last_at(step) - self.start.first + 1
            offset = counter_integers(
                derive_seed(self.seed, "start"), step, torch.tensor([number]), 0, below=window
            )
            seed = derive_seed(self.seed, "student", step, number)
            found.append(Draw(int(order[place % experts]), self.start.first + int(offset), seed))
        return found

    def match(self, step: int, learned: Learned, *, own_labels: bool) -> Matched:
        """The mean of what the students of one outer step find.

        Args:
            step: number of the outer step.
            learned: the set.
            own_labels: whether each student learns from the labels that its target checkpoint gives.
        """
        draws = self.draws(step)
        groups = [draws] if self.stacked else [[draw] for draw in draws]
        return _mean([self._match(group, learned, own_labels=own_labels) for group in groups])

    def _match(self, draws: Sequence[Draw], learned: Learned, *, own_labels: bool) -> Matched:
        experts, goals = self.experts, [draw.start + self.epochs for draw in draws]
        starts = torch.stack([experts.after(draw.expert, draw.start) for draw in draws]).to(self.device)
        targets = torch.stack(
            [experts.after(draw.expert, goal) for draw, goal in zip(draws, goals, strict=True)]
        ).to(self.device)
        if own_labels:
            logits = [logits_of(self.networks, target, learned.images) for target in targets]
            learned = replace(learned, targets=torch.stack(logits))
        height, width = learned.images.shape[2:]
        steps = InnerSteps(
            self.steps,
            seeds=[draw.seed for draw in draws],
            samples=len(learned.images),
            batch=self.batch,
            augment=self.augment,
            size=(height, width),
            device=self.device,
        )
        return match(
            self.networks,
            steps,
            learned,
            start=starts,
            target=targets,
            gradient=self.gradient,
            segment=self.segment,
        )


@torch.no_grad()
def logits_of(networks: FlatNetworks, theta: Tensor, images: Tensor) -> Tensor:
    """(N, C): what the network of parameters theta (P,) says of images (N, Ch, H, W), without augmentation."""
    return torch.cat([networks(theta[None], block[None])[0] for block in images.split(_BLOCK)])


def _mean(parts: Sequence[Matched]) -> Matched:
    """Over all students of all parts, which have as many each."""
    if len(parts) == 1:
        return parts[0]
    share = 1 / len(parts)
    learned = [part.labels for part in parts if part.labels is not None]
    return Matched(
        loss=torch.cat([part.loss for part in parts]),
        images=torch.stack([part.images for part in parts]).sum(dim=0) * share,
        labels=torch.stack(learned).sum(dim=0) * share if learned else None,
        lr=torch.stack([part.lr for part in parts]).sum() * share,
    )
