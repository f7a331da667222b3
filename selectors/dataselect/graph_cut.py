"""Graph cut: resemble everything, and not each other.

    f(S) = lambda sum_{i in V} sum_{j in S} s_ij - sum_{i in S} sum_{j in S} s_ij

(Iyer and Bilmes 2013; as a coreset: Iyer et al., "Submodular combinatorial information measures", ALT 2021). The gain
of j is  lambda sum_i s_ij - 2 sum_{i in S} s_ij - s_jj. Submodular as s >= 0, and monotone for lambda >= 2; below,
gains may become negative, and greedy goes on all the same until the budget is spent. Where references are a sample of
V, their sum is scaled to all of V.

A pick changes only the second sum, by one similarity a candidate. It is brought up to date for those candidates alone
whose gain is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataselect.similarity import Similarity, similarity_sums

_PICKS = 1024  # at once


class GraphCut:
    """Graph cut of the set so far (`dataselect.greedy.Objective`).

    Args:
        similarity: of N candidates to R references.
        relevance: lambda.
    """

    def __init__(self, similarity: Similarity, *, relevance: float) -> None:
        self.similarity = similarity
        candidates, references = similarity.size
        scale = relevance * candidates / references
        self._alone = similarity_sums(similarity) * scale - similarity.own()  # (N,) gains to the empty set
        self.clear()

    @property
    def batch(self) -> int:
        return 64

    def bounds(self) -> Tensor:
        return self._alone.clone()

    def gains(self, rows: Tensor) -> Tensor:
        first = int(self._counted[rows].min())
        for start in range(first, len(self._picks), _PICKS):
            picks = torch.tensor(self._picks[start : start + _PICKS], device=rows.device)
            near = self.similarity.between(rows, picks).double()
            known = torch.arange(start, start + len(picks), device=rows.device) < self._counted[rows, None]
            self._near[rows] += near.masked_fill_(known, 0).sum(dim=1)
        self._counted[rows] = len(self._picks)
        return self._alone[rows] - 2 * self._near[rows]

    def add(self, row: int) -> None:
        self._picks.append(row)

    def clear(self) -> None:
        self._picks: list[int] = []
        self._near = torch.zeros_like(self._alone)  # (N,) sum of similarities to the first picks
        self._counted = torch.zeros_like(self._alone, dtype=torch.int64)  # (N,) so many of them
