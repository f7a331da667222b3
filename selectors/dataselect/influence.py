"""Pick the samples that influence the target most, by their gradients: TRAK and LESS.

TRAK, of M checkpoints with margins f = ln(p / (1 - p)), p the probability of the label, phi = P^T grad f projected
gradients, Phi those of all candidates, and t the samples of the target:

    score(x) = [mean_m phi_m(x)^T (Phi_m^T Phi_m + lambda I)^{-1} mean_t phi_m(t)] [mean_m 1 - p_m(x)]

(Park et al., "TRAK: Attributing Model Behavior at Scale", ICML 2023, eq. 13 and 17). It estimates by how much the
margins of the target fall in the mean where x is left out: the largest score helps most. Phi^T Phi is summed in float64
and its inverse scaled nowhere, where the release sums in half precision and divides each checkpoint's inverse by its
mean entry, which weighs checkpoints by accident. lambda is in units of the mean of the diagonal of Phi^T Phi.

LESS, of checkpoints i with learning rates eta_i and gradients g of the loss:

    score(x) = max_c sum_i eta_i mean_{t in class c} cos(g_i(x), g_i(t))

(Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, eq. 3 and section 4.2; a
subtask is a class of the target; the mean of cosines is the release's). eta_i is the mean learning rate of the epochs
since the checkpoint before. Gradients are those of plain SGD: the paper's Adam-preconditioned form, which divides by
the square root of Adam's second moments, belongs to adapters that are trained by Adam.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dataselect.features import TargetedConfig, TargetedSelector
from distill.cache import Gradients, LastLayerGradients, Loss, Rows
from distill.cache.rows import MeanRows
from distill.cache.teachers import TeacherConfig, checkpoint_epochs
from distill.contracts import Context, DistilledSet, Selection, Source
from distill.errors import InputError
from distill.selection import Picks, labelled_target, select
from distill.training.config import NonNegative, learning_rate

_BLOCK = 2048  # rows read at once


class _Influence(TargetedSelector):
    """Picks the largest scores, ties to the lowest row number."""

    score: ClassVar[str]  # what it means

    def usable(self, ctx: Context, source: Source) -> Callable[[np.ndarray], np.ndarray]:
        """Which of some samples have finite gradients."""
        return self.space(ctx, source).finite

    @abstractmethod
    def scores(self, ctx: Context, source: Source, samples: np.ndarray) -> Tensor:
        """The influence of samples of the train split on the target: float64 (len(samples),)."""

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        def pick(samples: np.ndarray, count: int, _: int) -> Picks:
            scores = (
                self.scores(ctx, source, samples).float().cpu().numpy()
            )  # equal samples are equal in float32
            best = np.argsort(-scores, kind="stable")[:count]
            return Picks(samples[best], scores[best])

        return select(
            source, previous, self.config, pick, meta={"score": self.score}, usable=self.usable(ctx, source)
        )


class Trak(_Influence):
    """TRAK: what raises the margins of the target most, by a linear model of the gradients."""

    name = "trak"
    score = "TRAK: by how much the mean margin of the target would fall without the sample, up to a factor"

    class Config(TargetedConfig):
        """Budget, and the gradients of the margin over `checkpoints`; `ridge` is lambda, in units of the mean diagonal
        of Phi^T Phi."""

        features: Literal["gradients"] = "gradients"
        checkpoints: Annotated[int, Field(ge=1)] = 4
        ridge: NonNegative = 1e-3

    config: Config

    def usable(self, ctx: Context, source: Source) -> Callable[[np.ndarray], np.ndarray]:
        """Of margins, and not of the loss as the space has them."""

        def finite(samples: np.ndarray) -> np.ndarray:
            asked = Gradients(self.config.projection, of="margin")
            rows = [
                ctx.cache.gradients(source.train, each, asked) for each in self.space(ctx, source).networks
            ]
            absent = MeanRows(rows, normalise=False).absent().numpy()
            return samples[~np.isin(samples, absent)]

        return finite

    def scores(self, ctx: Context, source: Source, samples: np.ndarray) -> Tensor:
        asked = Gradients(self.config.projection, of="margin")
        networks = self.space(ctx, source).networks
        kernel = torch.zeros(len(samples), dtype=torch.float64, device=ctx.device)
        doubt = torch.zeros_like(kernel)
        for network in networks:
            answers = ctx.cache.request(source.train, network, [asked, Loss()])
            target = ctx.cache.gradients(labelled_target(source), network, asked)
            kernel += trak_kernel(answers[asked], samples, _mean(target), ridge=self.config.ridge)
            loss = answers[Loss()].take(samples)[:, 0].double()
            doubt -= torch.expm1(-loss).nan_to_num(0.0)  # 1 - p
        return kernel * doubt / len(networks) ** 2


class Less(_Influence):
    """LESS: gradients most like those of one class of the target, over a training."""

    name = "less"
    score = (
        "LESS: learning rate times cosine with the gradients of the class of the target that is most alike"
    )

    class Config(TargetedConfig):
        """Budget, and the gradients of the loss over `checkpoints`."""

        features: Literal["gradients", "last_layer"] = "gradients"
        checkpoints: Annotated[int, Field(ge=1)] = 4

    config: Config

    def scores(self, ctx: Context, source: Source, samples: np.ndarray) -> Tensor:
        projection = self.config.projection
        wanted = Gradients(projection) if self.config.features == "gradients" else LastLayerGradients()
        target = labelled_target(source)
        classes = target.labels.unique()
        parts = []
        for network in self.space(ctx, source).networks:
            own, theirs = (
                ctx.cache.request(split, network, [wanted])[wanted] for split in (source.train, target)
            )
            parts.append((own, class_cosines(theirs, target.labels, classes)))
        rates = checkpoint_rates(self.config.network, self.config.checkpoints)
        return less_scores(parts, samples, rates)


def trak_kernel(rows: Rows, samples: np.ndarray, goal: Tensor, *, ridge: float) -> Tensor:
    """phi(x)^T (Phi^T Phi + lambda I)^{-1} goal for every sample: float64 (n,).

    Args:
        rows: float32 (N, k), phi of every sample of the split.
        samples: int64 (n,), those that Phi is made of.
        goal: float64 (k,).
        ridge: lambda, in units of tr(Phi^T Phi) / k.

    Raises:
        InputError: Phi^T Phi cannot be inverted, with a ridge of 0.
    """
    gram = goal.new_zeros(len(goal), len(goal))
    for _, block in _blocks(rows, samples):
        gram.addmm_(block.T, block)
    mean = gram.trace() / len(goal)
    if not mean > 0:
        return goal.new_zeros(len(samples))  # no gradient, no influence
    gram.diagonal().add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        raise InputError(
            f"the gradients of {len(samples)} images do not span the {len(goal)} dimensions of their projection",
            where="ridge",
            found=f"{ridge:g}",
            allowed="a ridge above 0",
            fix="raise ridge, or lower projection.dim",
        )
    direction = torch.cholesky_solve(goal[:, None], factor)[:, 0]
    kernel = goal.new_empty(len(samples))
    for place, block in _blocks(rows, samples):
        kernel[place] = block @ direction
    return kernel


def class_cosines(rows: Rows, labels: Tensor, classes: Tensor) -> Tensor:
    """The mean of unit gradients over each class: float64 (len(classes), k). A row's product with it is its mean
    cosine with the class.

    Args:
        rows: float32 (M, k) of the target; a row of zeros, of a sample without finite gradients, has no say.
        labels: int64 (M,).
        classes: int64, each with a sample at least.
    """
    sums = torch.zeros(len(classes), rows.shape[1], dtype=torch.float64, device=rows.device)
    counts = torch.zeros(len(classes), dtype=torch.float64, device=rows.device)
    numbers = torch.searchsorted(classes, labels.contiguous()).to(rows.device)
    for place, block in _blocks(rows, np.arange(len(labels))):
        sums.index_add_(0, numbers[place], F.normalize(block, dim=1))
        counts.index_add_(0, numbers[place], block.any(dim=1).double())
    return sums / counts.clamp(min=1)[:, None]


def less_scores(parts: Sequence[tuple[Rows, Tensor]], samples: np.ndarray, rates: Sequence[float]) -> Tensor:
    """max_c sum_i eta_i cos_i(x, c) for every sample: float64 (n,).

    Args:
        parts: of every checkpoint the gradients of the split (N, k), and `class_cosines` of the target.
        samples: int64 (n,).
        rates: eta, one a checkpoint.
    """
    best = torch.empty(len(samples), dtype=torch.float64, device=parts[0][1].device)
    for start in range(0, len(samples), _BLOCK):
        place = slice(start, start + _BLOCK)
        unit = (F.normalize(rows.take(samples[place]).double(), dim=1) for rows, _ in parts)
        sums = sum(
            rate * (block @ classes.T) for rate, block, (_, classes) in zip(rates, unit, parts, strict=True)
        )
        assert isinstance(sums, Tensor), "there is a checkpoint"
        best[place] = sums.amax(dim=1)
    return best


def checkpoint_rates(network: TeacherConfig, checkpoints: int) -> list[float]:
    """The mean learning rate of the epochs that end with each checkpoint, the last the training's end."""
    train = network.train
    ends = [*checkpoint_epochs(train, checkpoints), train.epochs]
    return [
        float(np.mean([learning_rate(train, epoch + 0.5) for epoch in range(start, end)]))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _mean(rows: Rows) -> Tensor:
    """float64 (k,)."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for _, block in rows.blocks():
        total += block.double().sum(dim=0)
    return total / len(rows)


def _blocks(rows: Rows, samples: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
    """The rows of samples in float64, by blocks."""
    for start in range(0, len(samples), _BLOCK):
        place = slice(start, start + _BLOCK)
        yield place, rows.take(samples[place]).double()
