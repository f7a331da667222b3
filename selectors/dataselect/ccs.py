"""Coverage-centric selection: leaves out the very hardest samples and draws evenly over the range of the rest.

1. Leave out the floor(beta n) hardest samples, among which the mislabelled ones are (`mislabelled`).
2. Cut the range of hardness of the rest into strata of equal width.
3. From the smallest stratum up, draw min(size, floor(budget left / strata left)) of its samples uniformly.

Zheng, Liu, Lai and Prakash, "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023, algorithm 1.
What a stratum is too small for, and what a floor leaves over, falls to the larger ones behind it, so the budget is met
exactly whenever there are that many samples: at first the budget left is at most what the strata left hold, and it
stays so, since a stratum that is emptied takes its size from both, and one that is not is larger than its floor, as are
all behind it. The released code ends the last stratum at 1.0001 times the greatest score, which is below the greatest
where that is negative, and its samples are then never drawn.

Published shares of `mislabelled` on CIFAR-10, by AUM of 200 epochs: 0 where 30 or 50 percent of the data are left out,
0.1 where 70 or 80 are, 0.3 where 90 are.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from dataselect.hardness import By, Hardness, MislabelConfig, seeded, trusted
from distill.contracts import Context, DistilledSet, Estimate, Selection, Source, StepKind
from distill.selection import Picks, Selector, select


class CoverageCentric(Selector):
    """Coverage-centric selection: strata of hardness, without the hardest samples."""

    name = "ccs"

    class Config(MislabelConfig):
        """Budget, score, the share of the hardest that is left out, and into how many strata the rest is cut."""

        by: By = "aum"
        mislabelled: Annotated[float, Field(ge=0, lt=1)] = 0.1
        strata: Annotated[int, Field(ge=1)] = 50

    config: Config

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        self.config.check_cut(source)

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        plain = super().estimate(train=train, classes=classes, before=before)
        return self.config.estimate_hardness(plain, train=train)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        hardness = Hardness(ctx, source, self.config)
        seed = ctx.derive(self.name)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            left, values = trusted(hardness, self.config, samples, count, number=number, seed=seed)
            places = stratified(values, left, count, strata=self.config.strata, seed=seed)
            return Picks(left[places], values[places])

        return select(source, previous, self.config, pick, meta={"score": hardness.meaning})


def stratified(
    hardness: np.ndarray, samples: np.ndarray, count: int, *, strata: int, seed: int
) -> np.ndarray:
    """Places of `count` samples drawn from strata of equal width: int64 (count,), the smallest stratum's first.

    Of strata of one size the easier comes first. A draw hangs on the seed and the samples' numbers alone.

    Args:
        hardness: float64 (n,), finite.
        samples: int64 (n,), numbers in the source.
        count: at most n.
        strata: how many.
        seed: of the draws.
    """
    own = strata_of(hardness, strata)
    sizes = np.bincount(own, minlength=strata)
    shares = allocate(sizes, count)
    drawn = np.lexsort((seeded(samples, seed, draw=1), own))  # stratum by stratum, shuffled inside
    starts = sizes.cumsum() - sizes
    order = sizes.argsort(kind="stable")
    return np.concatenate([drawn[starts[each] : starts[each] + shares[each]] for each in order])


def strata_of(hardness: np.ndarray, strata: int) -> np.ndarray:
    """The stratum of each sample, the easiest's is 0: int64 (n,). The hardest sample is in the last.

    Where all are equally hard, there is one.
    """
    low, high = hardness.min(), hardness.max()
    if low == high:
        return np.zeros(len(hardness), dtype=np.int64)
    share = (hardness - low) / (high - low)
    return np.minimum((share * strata).astype(np.int64), strata - 1)


def allocate(sizes: np.ndarray, count: int) -> np.ndarray:
    """How many to draw from each stratum: int64 (strata,) with the sum `count`.

    Args:
        sizes: int64 (strata,).
        count: at most the sum of `sizes`.
    """
    assert 0 <= count <= sizes.sum(), "the budget fits"
    shares = np.zeros_like(sizes)
    for done, place in enumerate(sizes.argsort(kind="stable")):
        shares[place] = min(sizes[place], count // (len(sizes) - done))
        count -= shares[place]
    return shares
