"""How hard samples are, by what networks that train on them say: one number a sample, larger is harder.

| by               | hardness of (x, y)                                                | source                    |
|------------------|-------------------------------------------------------------------|---------------------------|
| el2n             | + || p - onehot(y) ||_2                                           | Paul et al., def. 2.2     |
| grand            | + || gradient of the cross-entropy by the weights ||_2            | Paul et al., def. 2.1     |
| forgetting       | + how often right turned wrong; never right: as often as epochs   | Toneva et al., section 3  |
| aum              | - mean over the epochs of z_y - max_{c != y} z_c                  | Pleiss et al., eq. 2      |
| entropy          | + -sum_c p_c log p_c                                              | Settles, section 3.1      |
| margin           | - (p_(1) - p_(2)), of the two greatest probabilities              | Settles, section 3.1      |
| least_confidence | + 1 - p_(1)                                                       | Settles, section 3.1      |
| loss             | + cross-entropy, -log p_y                                         |                           |

z are logits, p = softmax(z). Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021; Toneva et al.,
"An Empirical Study of Example Forgetting", ICLR 2019; Pleiss et al., "Identifying Mislabeled Data using the Area Under
the Margin Ranking", NeurIPS 2020; Settles, "Active Learning Literature Survey", 2009. Entropy, margin and least
confidence ask for no label. Of several networks the mean of their hardness is taken.

A sample that was never right has been forgotten infinitely often (Toneva et al.). It counts as many times as there are
epochs, which is more than any other can be forgotten, so that means over networks and widths of strata stay finite.

Where the DeepCore release differs: never learned counts as 0 there, so that the hardest samples are the easiest; its
margin subtracts from the greatest logit, and its uncertainties are sorted one way by class and the other way over all.
The release of CCS takes AUM of probabilities; here it is of logits, as published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from distill.cache import (
    AreaUnderMargin,
    ErrorNorms,
    Forgetting,
    GradientNorms,
    Logits,
    Loss,
    Network,
    Rows,
)
from distill.cache.rows import StoredRows
from distill.cache.teachers import TeacherConfig, train_teachers
from distill.contracts import Context, Estimate, Source, Training
from distill.errors import InputError
from distill.randomness import counter_bits
from distill.selection import BudgetConfig, class_budget, source_counts, whole_budget

By = Literal["el2n", "grand", "forgetting", "aum", "entropy", "margin", "least_confidence", "loss"]

# How samples fared in the whole training.
_RECORDED = ("forgetting", "aum")


class HardnessConfig(BudgetConfig):
    """A budget, and what makes a sample hard.

    `by` is the measure, taken of `networks` networks (`network`) trained on the source, after `epoch` epochs of their
    training or at its end. Published: el2n by 10 networks after some 20 of 200 epochs, grand by 10 in their first
    epochs; forgetting and aum follow one whole training.
    """

    by: By = "el2n"
    network: TeacherConfig = TeacherConfig()
    networks: Annotated[int, Field(ge=1)] = 1
    epoch: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _is_there_to_be_measured(self) -> Self:
        train = self.network.train
        if self.by in _RECORDED and self.epoch is not None:
            raise ValueError(f"epoch would be ignored: by: {self.by} follows the whole training")
        if self.by in _RECORDED and train.mix != "none":
            raise ValueError(
                f"by: {self.by} asks whether a sample was right, which it cannot be where samples are mixed: "
                "set network.train.mix to none"
            )
        if self.epoch is not None and self.epoch > train.epochs:
            raise ValueError(
                f"epoch {self.epoch} is beyond the {train.epochs} epochs of the network's training"
            )
        return self

    def estimate_hardness(self, plain: Estimate, *, train: int) -> Estimate:
        """The estimate of a selection of `train` samples with what their hardness costs."""
        kept = 1 if self.epoch is None else 2
        training = Training(self.network.model, self.network.train, train, checkpoints=kept)
        rows = 0 if self.by in _RECORDED else train * self.networks
        return replace(plain, trainings=(training,) * self.networks, features=plain.features + rows)


class MislabelConfig(HardnessConfig):
    """A budget, what makes a sample hard, and the share of the hardest that are left out as probably mislabelled."""

    mislabelled: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def cut(self, there: int) -> int:
        """How many of `there` samples are left out, rounded down."""
        return int(Fraction(repr(self.mislabelled)) * there)

    def refuse_cut(self, there: int, count: int, *, name: str) -> None:
        """Raise InputError where fewer than `count` of the `there` samples of `name` are left."""
        left = there - self.cut(there)
        if left < count:
            raise InputError(
                f"leaving out a share of {self.mislabelled:g} as mislabelled leaves {left} of the {there} samples of "
                f"{name}, and {count} are asked for",
                found=f"mislabelled: {self.mislabelled:g}",
                allowed=f"a share of at most {(there - count) / there:.6g}",
                fix="lower mislabelled, or the budget",
            )

    def check_cut(self, source: Source) -> None:
        """Raise InputError where the budget is more than what is left of the source, or of one of its classes."""
        counts = source_counts(source)
        if not self.per_class:
            self.refuse_cut(len(source.train), whole_budget(len(source.train), self), name="the data")
            return
        budget = class_budget(counts, source.classes, self)
        for name, there, count in zip(source.classes, counts, budget, strict=True):
            self.refuse_cut(int(there), int(count), name=f"class {name}")


@dataclass(frozen=True)
class _Measure:
    """Rows of the cache, and how a block of them, (B, D) in float64, becomes hardness (B,)."""

    quantity: Any
    turn: Callable[[Tensor], Tensor]
    formula: str


def _as_it_is(block: Tensor) -> Tensor:
    return block[:, 0]


def _negated(block: Tensor) -> Tensor:
    return -block[:, 0]


def entropies(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: (B, C) -> (B,)."""
    logs = logits.log_softmax(dim=1)
    return -(logs.exp() * logs).sum(dim=1)


def probability_margins(logits: Tensor) -> Tensor:
    """Greatest minus second greatest probability: (B, C) -> (B,); of one class alone 1."""
    probabilities = logits.softmax(dim=1)
    if probabilities.shape[1] == 1:
        return probabilities[:, 0]
    first, second = probabilities.topk(2, dim=1).values.T
    return first - second


def least_confidences(logits: Tensor) -> Tensor:
    """1 - the greatest probability: (B, C) -> (B,)."""
    return 1 - logits.softmax(dim=1).amax(dim=1)


_MEASURES: dict[By, _Measure] = {
    "el2n": _Measure(ErrorNorms(), _as_it_is, "length of softmax(logits) - onehot(label)"),
    "grand": _Measure(GradientNorms(), _as_it_is, "length of the loss's gradient by the weights"),
    "forgetting": _Measure(
        Forgetting(), _as_it_is, "times right turned wrong in training; never right counts as every epoch"
    ),
    "aum": _Measure(
        AreaUnderMargin(), _negated, "minus the mean over training of label's logit - best other"
    ),
    "entropy": _Measure(Logits(), entropies, "entropy of the probabilities"),
    "margin": _Measure(
        Logits(), lambda logits: -probability_margins(logits), "minus greatest - second greatest probability"
    ),
    "least_confidence": _Measure(Logits(), least_confidences, "1 - greatest probability"),
    "loss": _Measure(Loss(), _as_it_is, "cross-entropy"),
}


class Hardness:
    """Hardness of the source's training samples; networks are trained when it is first asked for.

    Args:
        ctx, source: as in `Method.run`.
        config: what makes a sample hard.
    """

    def __init__(self, ctx: Context, source: Source, config: HardnessConfig) -> None:
        self.ctx = ctx
        self.source = source
        self.config = config
        self.measure = _MEASURES[config.by]

    @property
    def meaning(self) -> str:
        """What the numbers are."""
        of = f", mean over {self.config.networks} networks" if self.config.networks > 1 else ""
        return f"hardness by {self.config.by}, larger is harder: {self.measure.formula}{of}"

    def finite(self, samples: np.ndarray, count: int, *, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Those of `samples` whose hardness is known, and it: int64 (m,) and float64 (m,), m at least `count`.

        Args:
            samples: int64 (n,).
            count: how many will be picked.
            number: their class; they are of all where classes have no say.

        Raises:
            InputError: a network gave no finite value for so many that fewer than `count` are left.
        """
        hardness = self.values[samples]
        known = np.isfinite(hardness)
        if known.sum() < count:
            raise InputError(
                f"{count} samples of {self.name(number)} are asked for, and only {known.sum()} of {len(samples)} have "
                f"a finite score ({self.config.by})",
                found=f"{len(samples) - known.sum()} samples whose score is NaN or infinite",
                fix="lower the budget, or network.train.lr; cache.non_finite: 0 stops where the first one appears",
            )
        return samples[known], hardness[known]

    def name(self, number: int) -> str:
        """What a group of samples is called in messages."""
        return f"class {self.source.classes[number]}" if self.config.per_class else "the data"

    @cached_property
    def values(self) -> np.ndarray:
        """float64 (N,); not finite where a network's values are not."""
        networks = self._networks()
        total = torch.zeros(len(self.source.train), dtype=torch.float64, device=self.ctx.device)
        for network in networks:
            total += self._of(network)
        return (total / len(networks)).cpu().numpy()

    def _networks(self) -> list[Network]:
        config = self.config
        kept = () if config.epoch is None else (config.epoch,)
        networks = train_teachers(
            self.ctx,
            self.source,
            config.network,
            count=config.networks,
            name="scoring network",
            checkpoints=kept,
        )
        return networks if config.epoch is None else [network.checkpoints()[0] for network in networks]

    def _of(self, network: Network) -> Tensor:
        """Hardness by one network: float64 (N,)."""
        quantity = self.measure.quantity
        rows: Rows = self.ctx.cache.request(self.source.train, network, [quantity])[quantity]
        if isinstance(rows, StoredRows):
            rows = rows.unfilled()  # logits of zeros would pass for those of the least confident sample
        values = torch.cat([self.measure.turn(block.double()) for _, block in rows.blocks()])
        if self.config.by == "forgetting":
            values = torch.where(values.isinf(), float(self.config.network.train.epochs), values)
        return values


def trusted(
    hardness: Hardness, config: MislabelConfig, samples: np.ndarray, count: int, *, number: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples that are not left out as mislabelled, and their hardness: int64 (m,) ascending, float64 (m,).

    Args:
        samples, count, number: as for `Hardness.finite`.
        seed: decides which of equally hard samples are left out.

    Raises:
        InputError: fewer than `count` are left.
    """
    name = hardness.name(number)
    config.refuse_cut(len(samples), count, name=name)  # before a network is trained
    known, values = hardness.finite(samples, count, number=number)
    config.refuse_cut(len(known), count, name=name)
    left = len(known) - config.cut(len(known))
    places = np.sort(easiest_first(values, known, seed=seed)[:left])
    return known[places], values[places]


def easiest_first(hardness: np.ndarray, samples: np.ndarray, *, seed: int) -> np.ndarray:
    """Places of samples by hardness: int64 (n,).

    Equally hard ones are in an order that hangs on the seed and their numbers in the source alone. By lowest number,
    the many that were never forgotten would be picked as they lie in the source, where neighbours are often alike.

    Args:
        hardness: float64 (n,).
        samples: int64 (n,), numbers in the source.
        seed: of the order of equals.
    """
    return np.lexsort((seeded(samples, seed, draw=0), hardness))


def seeded(samples: np.ndarray, seed: int, *, draw: int) -> np.ndarray:
    """Random bits of each sample: int64 (n,), the same whatever other samples there are."""
    return counter_bits(seed, 0, torch.from_numpy(samples), draw).numpy()
