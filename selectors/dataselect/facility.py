"""Facility location: how well a set serves all references, each by the member most similar to it.

    f(S) = sum_i max(0, max_{j in S} s_ij)

over references i (Cornuejols, Fisher and Nemhauser 1977; as a coreset: Wei, Iyer and Bilmes, "Submodularity in data
subset selection and active learning", ICML 2015). Monotone and submodular. The gain of j is sum_i max(0, s_ij - c_i),
with c_i how well i is served so far.

Rows of the N x R similarities are computed as they are needed and kept as far as `matrix_bytes` allow; the picks do
not depend on what is kept. DeepCore's gain over batches sees the first batch only; apricot holds the matrix in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dataselect.greedy import Costs, Picked, lazy_greedy
from dataselect.similarity import Similarity, similarity_sums, spans

_ROWS = 16  # candidates whose gains are computed at once: with 10,000 references they fit a core's cache
# Bounds are sums of the same float32 numbers in another order than gains.
_SLACK = 1 + 2.0**-14


class FacilityLocation:
    """Facility location of the set so far (`dataselect.greedy.Objective`).

    Args:
        similarity: of N candidates to R references.
        matrix_bytes: of rows of similarities that are kept.
    """

    def __init__(self, similarity: Similarity, *, matrix_bytes: int = 1 << 30) -> None:
        self.similarity = similarity
        self.served = torch.zeros(similarity.size[1], device=similarity.device)  # (R,) c_i
        self._rows = KeptRows(similarity, matrix_bytes)

    def bounds(self) -> Tensor:
        return self._rows.sums().mul_(_SLACK)

    def gains(self, rows: Tensor) -> Tensor:
        found = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        for part, values in zip(found.split(_ROWS), rows.split(_ROWS), strict=True):
            for span, block in self._rows.blocks(values):
                part += block.sub_(self.served[span]).clamp_(min=0).sum(dim=1)
        return found

    def add(self, row: int) -> None:
        for span, block in self._rows.blocks(torch.tensor([row], device=self.similarity.device)):
            served = self.served[span]
            torch.maximum(served, block[0], out=served)

    def clear(self) -> None:
        self.served.zero_()


class KeptRows:
    """Rows of similarities, kept as far as bytes allow: all of them from the beginning, or those asked for first.

    Args:
        similarity: of N candidates to R references.
        matrix_bytes: 4 R a row.
    """

    def __init__(self, similarity: Similarity, matrix_bytes: int) -> None:
        self.similarity = similarity
        candidates, references = similarity.size
        self._room = min(candidates, matrix_bytes // (4 * references))
        self._whole = self._room == candidates
        self._matrix = torch.empty(self._room, references, device=similarity.device)
        self._places = torch.full(
            (candidates,), -1, device=similarity.device
        )  # in the matrix, -1 for not there
        self._used = 0

    def sums(self) -> Tensor:
        """sum_i s_ij of every candidate, float64 (N,)."""
        if not self._whole:
            return similarity_sums(self.similarity)
        if self._used:
            return self._matrix.sum(dim=1, dtype=torch.float64)
        torch.arange(self._room, out=self._places)
        self._used = self._room
        return similarity_sums(self.similarity, out=self._matrix)

    def blocks(self, rows: Tensor) -> list[tuple[slice, Tensor]]:
        """Similarities of candidates `rows`, int64 (b,), by spans of the references: copies, float32 (b, r)."""
        places = self._places[rows]
        if bool((places < 0).any()):
            self._keep(rows[places < 0])
            places = self._places[rows]
        there = bool((places >= 0).all())
        return [
            (
                span,
                self._matrix[:, span].index_select(0, places) if there else self.similarity.block(rows, span),
            )
            for span in spans(self.similarity.size[1])
        ]

    def _keep(self, rows: Tensor) -> None:
        """Compute and keep rows while there is room for all of them."""
        end = self._used + len(rows)
        if end > self._room:
            return
        for span in spans(self.similarity.size[1]):
            self.similarity.block(rows, span, out=self._matrix[self._used : end, span])
        self._places[rows] = torch.arange(self._used, end, device=rows.device)
        self._used = end


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
    for span in spans(similarity.size[1]):
        best = torch.full((span.stop - span.start,), -torch.inf, device=rows.device)
        server = torch.zeros(len(best), dtype=torch.int64, device=rows.device)
        for start in range(0, len(rows), _ROWS):
            block = similarity.block(rows[start : start + _ROWS], span)
            values = block.amax(dim=0)
            first = (block == values).to(torch.uint8).argmax(dim=0)
            server = torch.where(values > best, first + start, server)
            best = torch.maximum(best, values)
        sizes += server.bincount(minlength=len(rows))
    return sizes
