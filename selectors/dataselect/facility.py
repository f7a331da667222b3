"""Facility location: how well a set serves all references, each by the member most similar to it.

    f(S) = sum_i max(0, max_{j in S} s_ij)

over references i (Cornuejols, Fisher and Nemhauser 1977; as a coreset: Wei, Iyer and Bilmes, "Submodularity in data
subset selection and active learning", ICML 2015). Monotone and submodular. The gain of j is sum_i max(0, s_ij - c_i),
with c_i how well i is served so far.

Rows of the N x R similarities are computed as they are needed and kept as far as `matrix_bytes` allow; the picks do
not depend on what is kept. DeepCore's gain over batches sees the first batch only; apricot holds the matrix in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dataselect.falls import falls
from dataselect.greedy import Costs, Picked, lazy_greedy
from dataselect.similarity import Similarity, similarity_sums, spans

_ROWS = 16  # candidates whose gains are summed up at once: with 10,000 references they fit a core's cache
_COMPUTED = 512  # candidates whose similarities are computed at once, at most
_FOLLOWED_SHARE = 100  # one in so many references must be waiting
# Bounds are sums of the same float32 numbers in another order than gains.
_SLACK = 2.0**-17


class FacilityLocation:
    """Facility location of the set so far (`dataselect.greedy.Objective`).

    Args:
        similarity: of N candidates to R references.
        matrix_bytes: of rows of similarities that are kept.

    Attributes:
        served: c_i, how well each reference is served, float32 (R,).
    """

    served: Tensor
    _followed: Tensor  # (R,) c_i as far as bounds were told of it

    def __init__(self, similarity: Similarity, *, matrix_bytes: int = 1 << 30) -> None:
        self.similarity = similarity
        self._rows = KeptRows(similarity, matrix_bytes)
        self.clear()

    @property
    def batch(self) -> int:
        return 4 if self._rows.matrix is not None else 32

    def bounds(self) -> Tensor:
        return self._rows.sums().mul_(1 + _SLACK)

    def gains(self, rows: Tensor) -> Tensor:
        found = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        size = self._rows.at_once
        for start in range(0, len(rows), size):
            for span, block in self._rows.blocks(rows[start : start + size]):
                for first in range(0, len(block), _ROWS):
                    few = block[first : first + _ROWS].sub_(self.served[span]).clamp_(min=0)
                    found[start + first : start + first + len(few)] += few.sum(dim=1)
        return found

    def add(self, row: int) -> Tensor | None:
        before = self.served
        self.served = torch.maximum(before, self._rows.one(row))
        if self._rows.matrix is None or self.similarity.references is not None:
            return None
        grown = self.served - self._followed
        waiting = (grown > (self.served - before).mean()).nonzero()[:, 0]
        if len(waiting) * _FOLLOWED_SHARE < len(grown):
            return None
        return self._fallen(self._rows.matrix, waiting, grown)

    def clear(self) -> None:
        self.served = torch.zeros(self.similarity.size[1], device=self.similarity.device)
        self._followed = self.served.clone()

    def _fallen(self, matrix: Tensor, waiting: Tensor, grown: Tensor) -> Tensor:
        """By how much at least gains fell, float64 (N,).

        The sum goes over references that are served better by more than the mean, once they are many enough to be worth
        it; the others wait. Over a whole run they are some N ln k, instead of N k. Their similarities lie in rows, as
        the matrix is symmetric.

        Args:
            matrix: float32 (N, N).
            waiting: int64 (m,), references.
            grown: c' - c, float32 (N,).
        """
        fallen = falls(matrix, waiting, self._followed, grown)
        self._followed[waiting] = self.served[waiting]
        return fallen.mul_(1 - _SLACK)


class KeptRows:
    """Rows of similarities, kept as far as bytes allow: all of them from the beginning, or those asked for first.

    Args:
        similarity: of N candidates to R references.
        matrix_bytes: 4 R a row.

    Attributes:
        matrix: float32 (N, R), all similarities, once `sums` was called and where there is room for them; else None.
    """

    def __init__(self, similarity: Similarity, matrix_bytes: int) -> None:
        self.similarity = similarity
        candidates, references = similarity.size
        self.matrix: Tensor | None = None
        self._room = min(candidates, matrix_bytes // (4 * references))
        self._some = torch.empty(0, references, device=similarity.device)
        self._places = torch.full((candidates,), -1, device=similarity.device)  # in `_some`, -1 for not there
        self._used = 0

    def sums(self) -> Tensor:
        """sum_i s_ij of every candidate, float64 (N,)."""
        if self.matrix is not None:
            return self.matrix.sum(dim=1, dtype=torch.float64)
        if self._room < self.similarity.size[0]:
            return similarity_sums(self.similarity)
        self.matrix = torch.empty(self.similarity.size, device=self.similarity.device)
        return similarity_sums(self.similarity, out=self.matrix)

    @property
    def at_once(self) -> int:
        """Rows to ask for at once: a product of few rows is slow, and what is kept need only be read."""
        return _COMPUTED if self.matrix is None else _ROWS

    def blocks(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Similarities of candidates `rows`, int64 (b,), by spans of the references: copies, float32 (b, r)."""
        parts = spans(self.similarity.size[1])
        if self.matrix is not None:
            yield from ((span, self.matrix[:, span].index_select(0, rows)) for span in parts)
            return
        self._keep(rows)
        places = self._places[rows]
        kept, computed = (places >= 0).nonzero()[:, 0], (places < 0).nonzero()[:, 0]
        for span in parts:
            if not len(kept):
                yield span, self.similarity.block(rows, span)
                continue
            block = torch.empty(len(rows), span.stop - span.start, device=rows.device)
            block[kept] = self._some[:, span].index_select(0, places[kept])
            if len(computed):
                block[computed] = self.similarity.block(rows[computed], span)
            yield span, block

    def one(self, row: int) -> Tensor:
        """float32 (R,): similarities of one candidate."""
        if self.matrix is not None:
            return self.matrix[row]
        place = torch.tensor([row], device=self.similarity.device)
        return torch.cat([block[0] for _, block in self.blocks(place)])

    def _keep(self, rows: Tensor) -> None:
        """Compute and keep rows that are not kept yet, while there is room."""
        new = rows[self._places[rows] < 0][: self._room - self._used]
        if not len(new):
            return
        if not len(self._some):
            self._some = torch.empty(self._room, self._some.shape[1], device=rows.device)
        end = self._used + len(new)
        for span in spans(self.similarity.size[1]):
            self.similarity.block(new, span, out=self._some[self._used : end, span])
        self._places[new] = torch.arange(self._used, end, device=rows.device)
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
