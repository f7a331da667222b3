"""What one or several teachers say of views, as one set of logits.

With weights w_m that sum to 1, and logits z_m of teacher m:

- `logits`: z = sum_m w_m z_m (Cui et al., "Dataset Distillation via Committee Voting", 2025).
- `probabilities`: softmax(z / T) = sum_m w_m softmax(z_m / T) (Shen and Savvides, "MEAL V2", 2020, where T is 1).

`batch_norm: batch` normalises by the mean and variance of the micro-batch at hand in place of those of the teacher's
training (batch-specific soft labels). Such labels belong to their micro-batch, which is therefore stated and kept. The
released code reaches it by leaving teachers in training mode, where dropout is active too; here dropout is off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distill.cache.networks import Network
from distill.contracts import Preprocessing
from distill.errors import InputError, NonFiniteError
from distill.models import describe

Combine = Literal["logits", "probabilities"]
BatchNormMode = Literal["running", "batch"]
_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True, eq=False)
class Ensemble:
    """Teachers that label together.

    Args:
        networks: M teachers.
        weights: one each, sum 1.
        temperature: T of the labels.
        combine, batch_norm: see the head of the file.
        micro_batches: parts of a batch, each of which is a batch to batch norm.
        preprocessing: of the images that are labelled; that of a teacher may be another.
    """

    networks: tuple[Network, ...]
    weights: tuple[float, ...]
    temperature: float
    preprocessing: Preprocessing
    combine: Combine = "logits"
    batch_norm: BatchNormMode = "running"
    micro_batches: int = 1

    @property
    def names(self) -> tuple[str, ...]:
        """What the teachers are called."""
        return names_of(self.networks)

    def on(self, device: torch.device) -> Labellers:
        """The teachers as modules on a device."""
        return Labellers(self, device)


def equal_ensemble(networks: Sequence[Network], preprocessing: Preprocessing) -> Ensemble:
    """Teachers that count alike, at temperature 1, for images of this preprocessing."""
    return Ensemble(tuple(networks), (1 / len(networks),) * len(networks), 1.0, preprocessing)


def names_of(networks: Sequence[Network]) -> tuple[str, ...]:
    """What teachers are called, with a number where two would have one name."""
    plain = [describe(network.model) for network in networks]
    return tuple(
        name if plain.count(name) == 1 else f"{name} ({plain[:place].count(name)})"
        for place, name in enumerate(plain)
    )


class Labellers:
    """An ensemble on a device."""

    def __init__(self, ensemble: Ensemble, device: torch.device) -> None:
        self.ensemble = ensemble
        self.modules = [network.module(device) for network in ensemble.networks]
        if ensemble.batch_norm == "batch":
            for module in self.modules:
                _use_batch_statistics(module)
        self.ways = [
            between(ensemble.preprocessing, network.preprocessing, device) for network in ensemble.networks
        ]

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits float32 (B, C) of views (B, Ch, H, W), rounded to float16 as the fullest codec stores them.

        Raises:
            NonFiniteError: a teacher's are NaN or infinite; the error names it.
        """
        parts = images.tensor_split(min(self.ensemble.micro_batches, len(images)))
        return torch.cat([self._micro_batch(part) for part in parts])

    def _micro_batch(self, images: Tensor) -> Tensor:
        temperature, total = self.ensemble.temperature, None
        for name, weight, module, way in zip(
            self.ensemble.names, self.ensemble.weights, self.modules, self.ways, strict=True
        ):
            logits = module(way(images)).float()
            if not bool((logits.abs() <= _HALF_MAX).all()):
                raise NonFiniteError(
                    f"the teacher {name} gave NaN or infinite logits, or such as float16 cannot hold",
                    fix="check the teacher's training (a lower lr), or leave it out",
                )
            if self.ensemble.combine == "probabilities":
                logits = (logits / temperature).softmax(dim=1)
            total = weight * logits if total is None else total + weight * logits
        assert total is not None, "an ensemble has a teacher"
        if self.ensemble.combine == "probabilities":
            total = temperature * total.clamp(min=torch.finfo(total.dtype).tiny).log()
        return total.half().float()


class _Way:
    """From images as the set's networks take them to what a teacher takes: x * scale + offset per channel."""

    def __init__(self, scale: Tensor, offset: Tensor) -> None:
        self.scale, self.offset = scale[:, None, None], offset[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.offset, images, self.scale)


def between(ours: Preprocessing, theirs: Preprocessing, device: torch.device) -> _Way | nn.Identity:
    if ours.zca is not None or theirs.zca is not None:
        raise InputError(
            "whitened images (ZCA) cannot be labelled",
            found="a set, or a teacher, with ZCA",
            fix="make the set without zca",
        )
    if (ours.mean, ours.std) == (theirs.mean, theirs.std):
        return nn.Identity()
    mean, std, their_mean, their_std = (
        torch.tensor(values, dtype=torch.float64) for values in (ours.mean, ours.std, theirs.mean, theirs.std)
    )
    scale, offset = std / their_std, (mean - their_mean) / their_std
    return _Way(scale.float().to(device), offset.float().to(device))


def has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _use_batch_statistics(module: nn.Module) -> None:
    """Normalise by the batch at hand; what was learned in training stays as it was."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
            part.momentum = 0.0


def refuse_without_batch_norm(networks: Mapping[str, nn.Module], *, where: str, fix: str) -> None:
    """Raise InputError where a network, known by its name, has no batch norm whose statistics could be used."""
    for name, module in networks.items():
        if not has_batch_norm(module):
            raise InputError(
                "a teacher has no batch norm, whose statistics this needs",
                where=where,
                found=name,
                allowed="networks with batch norm, such as resnet18 or {name: convnet, norm: batch}",
                fix=f"{fix}, or take another teacher",
            )
