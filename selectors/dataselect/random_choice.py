"""A uniform random subset, by default balanced by class: the selector that every other one must beat.

At equal size, random is at or near the top of published tables from 5% of the data on (Guo et al., "DeepCore",
DEXA 2022, table 1).
"""

from __future__ import annotations

import numpy as np

from distill.contracts import Context, DistilledSet, Selection, Source
from distill.selection import BudgetConfig, Picks, Selector, random_pick, select


class RandomChoice(Selector):
    """Uniform random subset, by default balanced by class."""

    name = "random"

    class Config(BudgetConfig):
        """The budget alone."""

    config: Config

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        seed = ctx.derive("random")

        def pick(samples: np.ndarray, count: int, number: int) -> Picks:
            return Picks(random_pick(samples, count, seed=seed, name=number), np.zeros(count))

        return select(source, previous, self.config, pick, meta={"score": "none, always 0"})
