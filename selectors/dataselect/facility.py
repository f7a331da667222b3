"""Facility location: how well a set serves all references, each by the member most similar to it.

    f(S) = sum_i max(0, max_{j in S} s_ij)

over references i (Cornuejols, Fisher and Nemhauser 1977; as a coreset: Wei, Iyer and Bilmes, "Submodularity in data
subset selection and active learning", ICML 2015). Monotone and submodular. The gain of j is sum_i max(0, s_ij - c_i),
with c_i how well i is served so far.

Of the N x R similarities, rows are computed as they are needed and kept as far as `matrix_bytes` allow. The picks do
not depend on what is kept. DeepCore's gain over batches sees the first batch only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataselect.greedy import Costs, Picked, lazy_greedy
from dataselect.similarity import Similarity

_SPAN = 1 << 14  # references at once; the order of summation follows it, so it is no option
_ROWS = 32  # candidates at once
# Bounds are sums in another order than gains: float32, relative.
_SLACK = 1 + 2.0**-14


class FacilityLocation:
    """Facility location of the set so far (`dataselect.greedy.Objective`).

    Args:
        similarity: of N candidates to R references.
        matrix_bytes: of rows of similarities that are kept.
    """

    def __init__(self, similarity: Similarity, *, matrix_bytes: int = 1 << 30) -> None:
        self.similarity = similarity
        self.served = torch.zeros(len(similarity.others), device=similarity.device)  # (R,) c_i
        self._kept = KeptRows(similarity, matrix_bytes)

    def bounds(self) -> Tensor:
        return similarity_sums(self.similarity).mul_(_SLACK)

    def gains(self, rows: Tensor) -> Tensor:
        return torch.cat([self._sums(part) for part in rows.split(_ROWS)])

    def add(self, row: int) -> None:
        place = torch.tensor([row], device=self.similarity.device)
        for span in spans(len(self.served)):
            served = self.served[span]
            torch.maximum(served, self._kept.block(place, span)[0], out=served)

    def clear(self) -> None:
        self.served.zero_()

    def _sums(self, rows: Tensor) -> Tensor:
        """float64 (b,): sum_i max(0, s_ij - c_i)."""
        total = torch.zeros(len(rows), dtype=torch.float64, device=self.similarity.device)
        for span in spans(len(self.served)):
            total += self._kept.block(rows, span).sub_(self.served[span]).clamp_(min=0).sum(dim=1)
        return total


class KeptRows:
    """Rows of similarities, as far as bytes allow."""

    def __init__(self, similarity: Similarity, matrix_bytes: int) -> None:
        self.similarity = similarity

    def block(self, rows: Tensor, span: slice) -> Tensor:
        return self.similarity.block(rows, span)


def similarity_sums(similarity: Similarity) -> Tensor:
    """sum_i s_ij of every candidate: float64 (N,)."""
    sums = torch.zeros(similarity.candidates, dtype=torch.float64, device=similarity.device)
    for start in range(0, len(sums), _ROWS):
        rows = slice(start, min(start + _ROWS, len(sums)))
        for span in spans(len(similarity.others)):
            sums[rows] += similarity.block(rows, span).sum(dim=1)
    return sums


def spans(count: int) -> list[slice]:
    """The references in parts."""
    return [slice(start, min(start + _SPAN, count)) for start in range(0, count, _SPAN)]


def facility_location(
    similarity: Similarity,
    count: int,
    *,
    initial: Tensor | None = None,
    costs: Costs | None = None,
    matrix_bytes: int = 1 << 30,
) -> Picked:
    """Pick `count` candidates by exact greedy facility location.

    Args:
        similarity: of N candidates to R references, from `dataselect.similarity.similarity_of`.
        count: picks in all, at most N; fewer where `costs` allow no more.
        initial: int64, rows that are in the set from the beginning.
        costs: where a limit of costs holds.
        matrix_bytes: of similarities that are kept; they change the time, not the picks.

    Returns:
        Rows int64 in the order picked, and what each added to f, float64.
    """
    objective = FacilityLocation(similarity, matrix_bytes=matrix_bytes)
    return lazy_greedy(objective, count, initial=initial, costs=costs)


def assignment_sizes(similarity: Similarity, rows: Tensor) -> Tensor:
    """How many references each of the picks serves best, the earliest of several: int64 (len(rows),).

    Args:
        similarity: of N candidates to R references.
        rows: int64, the picks.
    """
    sizes = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for span in spans(len(similarity.others)):
        best = torch.full((span.stop - span.start,), -torch.inf, device=rows.device)
        server = torch.zeros(len(best), dtype=torch.int64, device=rows.device)
        for start in range(0, len(rows), _ROWS):
            values, places = _first_max(similarity.block(rows[start : start + _ROWS], span))
            better = values > best
            best = torch.where(better, values, best)
            server = torch.where(better, places + start, server)
        sizes += server.bincount(minlength=len(rows))
    return sizes


def _first_max(block: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each column (r,), and the first row that has it, int64 (r,)."""
    values = block.amax(dim=0)
    return values, (block == values).to(torch.uint8).argmax(dim=0)
