"""Where learning begins: the images, and the logits of learned labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill.contracts import Source
from distill.errors import InputError
from distill.matching.networks import FlatNetworks
from distill.matching.students import logits_of
from distill.randomness import generator
from distill.selection import by_class, random_pick
from distill.training.batches import DeviceImages

_LOOKED_AT_ONCE = 64  # images of one class


def rightly_classified(
    source: Source,
    images: DeviceImages,
    networks: FlatNetworks,
    experts: Sequence[Tensor],
    budget: np.ndarray,
    *,
    seed: int,
) -> np.ndarray:
    """Random training images that an expert classifies rightly: int64 (sum of budget,), class by class.

    Where the first expert is right about too few of a class, the second is asked for the rest, and so on (Guo et al.,
    ICLR 2024, released code).

    Args:
        source: whose train split it is.
        images: of the split.
        networks: of the experts.
        experts: parameters (P,) of each, in the order in which they are asked.
        budget: images of each class, (C,).
        seed: of the order.

    Raises:
        InputError: all experts together are right about too few.
    """
    labels = source.train.labels.numpy()
    parts = []
    for number, samples in enumerate(by_class(np.arange(len(labels)), labels, len(source.classes))):
        order = random_pick(samples, len(samples), seed=seed, name=number)
        wanted = int(budget[number])
        found: list[int] = []
        for expert in experts:
            left = order[~np.isin(order, found)]
            for sample in _right(images, networks, expert, left, number):
                found.append(sample)
                if len(found) == wanted:
                    break
            if len(found) == wanted:
                break
        if len(found) < wanted:
            raise InputError(
                f"experts classify too few images of class {source.classes[number]} rightly",
                found=f"{len(found)} by {len(experts)} experts",
                allowed=f"{wanted} or more",
                fix="set init: real, train the experts for more epochs, or lower ipc",
            )
        parts.append(np.array(found, dtype=np.int64))
    return np.concatenate(parts)


def _right(
    images: DeviceImages, networks: FlatNetworks, theta: Tensor, samples: np.ndarray, label: int
) -> Iterator[int]:
    """Those of the samples that the expert gives this label, in order, looked at as they are asked for."""
    for first in range(0, len(samples), _LOOKED_AT_ONCE):
        block = torch.from_numpy(samples[first : first + _LOOKED_AT_ONCE])
        said = logits_of(networks, theta, images.gather(block.to(images.device))).argmax(dim=1)
        yield from block[(said == label).cpu()].tolist()


def noise(shape: Sequence[int], *, seed: int, device: torch.device) -> Tensor:
    """Standard normal images, drawn on the host so that every device has the same."""
    return torch.randn(*shape, generator=generator(seed)).to(device)


def mean_logits(
    networks: FlatNetworks, experts: Sequence[Tensor], images: Tensor, labels: Tensor | None
) -> Tensor:
    """Mean logits (N, C) of the experts, and of those alone that are right where `labels` (N,) are given.

    Of an image about which none is right, all are heard (Guo et al. choose images of which one is).
    """
    total = right = torch.zeros((), device=images.device)
    heard = torch.zeros(len(images), 1, device=images.device)
    for theta in experts:
        logits = logits_of(networks, theta, images)
        says = torch.ones_like(heard) if labels is None else (logits.argmax(1) == labels).float()[:, None]
        total = total + logits
        right = right + logits * says
        heard += says
    return torch.where(heard > 0, right / heard.clamp(min=1), total / len(experts))
