"""Ranking by one score: keeps the hardest samples, the easiest, or those in between.

S = the `count` samples of greatest hardness h (`keep: hardest`), of smallest (`easiest`), or those whose rank by h is
nearest to the median's (`middle`); dataselect/hardness.py has every h with its source and sign. Hard ones are what
Paul, Ganguli and Dziugaite, "Deep Learning on a Data Diet", NeurIPS 2021, and Toneva et al., ICLR 2019, keep, at small
shares of pruning. At small budgets the hardest samples, mislabelled ones among them, serve worse than random ones
(Guo et al., "DeepCore", DEXA 2022, table 1), and easier ones better (Sorscher et al., "Beyond neural scaling laws",
NeurIPS 2022).

Equally hard samples are ordered by the seed, where others' releases take them as they lie in the source.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from dataselect.hardness import Hardness, HardnessConfig, easiest_first
from distill.contracts import Context, DistilledSet, Estimate, Selection, Source
from distill.selection import Picks, Selector, select

Keep = Literal["hardest", "easiest", "middle"]


class ScoreChoice(Selector):
    """Ranking by a score: keeps the hardest samples, the easiest, or the middle."""

    name = "score"

    class Config(HardnessConfig):
        """Budget, score, and which end of its ranking is kept."""

        keep: Keep = "hardest"

    config: Config

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        plain = super().estimate(train=train, classes=classes, before=before)
        return self.config.estimate_hardness(plain, train=train)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        hardness = Hardness(ctx, source, self.config)
        seed = ctx.derive(self.name)

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            known, values = hardness.finite(samples, count, number=number)
            places = keep(easiest_first(values, known, seed=seed), count, self.config.keep)
            return Picks(known[places], values[places])

        return select(source, previous, self.config, pick, meta={"score": hardness.meaning})


def keep(order: np.ndarray, count: int, which: Keep) -> np.ndarray:
    """The first, the last or the middle `count` of `order` (n,), from that end, or from the middle outwards.

    Of two as far from the middle, the easier comes first.

    Args:
        order: the easiest first.
        count: at most n.
        which: of them.
    """
    if which == "easiest":
        return order[:count]
    if which == "hardest":
        return order[::-1][:count]
    outwards = np.abs(2 * np.arange(len(order)) - (len(order) - 1)).argsort(kind="stable")
    return order[outwards[:count]]
