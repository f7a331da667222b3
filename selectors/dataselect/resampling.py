"""Resampling without replacement by Gumbel top-k: the k greatest of log w + g, g standard Gumbel noise.

Drawing one after the other with probabilities in proportion to the weights of those that are left gives the same sets
(Vieira 2014; Kool, van Hoof and Welling, "Stochastic Beams and Where to Find Them", ICML 2019, section 2). The noise of
a document, or of an image, follows from the seed, its file's name and its row there, so that neither the order of files
nor what else is in the corpus changes it.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from distill.randomness import counter_bits, derive_seed

_BITS = 52
_WAITING = 1 << 16  # numbers held beside k before they are sorted


def gumbel_noise(
    seed: int, file: str, rows: range | NDArray[np.int64], *, draw: int = 0
) -> NDArray[np.float64]:
    """Standard Gumbel noise of rows of a file: float64 (len(rows),).

    Args:
        seed: of the run.
        file: the file's name in the corpus.
        rows: of it, consecutive ones or any.
        draw: another number, another noise.
    """
    stream = derive_seed(seed, "noise", file)
    numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, range) else torch.from_numpy(rows)
    bits = counter_bits(stream, 0, numbers, draw).numpy()
    uniform = ((bits.view(np.uint64) >> np.uint64(64 - _BITS)).astype(np.float64) + 0.5) * 2.0**-_BITS
    return -np.log(-np.log(uniform))


class Greatest:
    """The k greatest of numbers that come in blocks, in memory for twice as many, 65,536 more and a block.

    Of equal ones those with the lowest numbers. -inf and NaN are never taken.

    Args:
        count: k.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._values = [np.empty(0)]
        self._rows = [np.empty(0, dtype=np.int64)]
        self._held = 0
        self._least = -np.inf  # nothing below is among the greatest

    def add(self, values: NDArray[np.float64], rows: NDArray[np.int64]) -> None:
        """Take a block in.

        Args:
            values: float64 (b,).
            rows: int64 (b,), their numbers, in any order; each comes once.
        """
        there = (values >= self._least) & (values > -np.inf)  # an equal one may have a lower number
        self._values.append(values[there])
        self._rows.append(rows[there])
        self._held += int(there.sum())
        if self._held > self.count + max(self.count, _WAITING):
            self._settle()

    @property
    def rows(self) -> NDArray[np.int64]:
        """int64 (up to k,), the greatest first."""
        self._settle()
        return self._rows[0]

    def _settle(self) -> None:
        """Keep k of what is held, the greatest first: seldom, since it sorts."""
        values, rows = np.concatenate(self._values), np.concatenate(self._rows)
        kept = np.lexsort((rows, -values))[: self.count]
        self._values, self._rows, self._held = [values[kept]], [rows[kept]], len(kept)
        if len(kept) == self.count:
            self._least = float(values[kept[-1]])
