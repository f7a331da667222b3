"""Falls of gains: both forms against sums in float64, one number at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dataselect.falls import add_by_blocks, add_compiled, falls


def drawn(rows: int, waiting: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A symmetric matrix, some references in order, how well each was served, and by how much better it is."""
    draw = torch.Generator().manual_seed(seed)
    matrix = torch.rand(rows, rows, generator=draw)
    references = torch.randperm(rows, generator=draw)[:waiting].sort().values
    return (
        (matrix + matrix.T) / 2,
        references,
        torch.rand(rows, generator=draw) * 0.6,
        torch.rand(rows, generator=draw) * 0.3,
    )


def slow(matrix: Tensor, references: Tensor, before: Tensor, grown: Tensor) -> Tensor:
    found = torch.zeros(len(matrix), dtype=torch.float64)
    for j in range(len(matrix)):
        for i in references.tolist():
            gain = max(0.0, float(matrix[i, j]) - float(before[i]))
            found[j] += min(gain, float(grown[i]))
    return found


@pytest.mark.parametrize("form", ["compiled", "blocks", "chosen"])
@pytest.mark.parametrize(("rows", "waiting"), [(1, 0), (1, 1), (9, 3), (30, 4), (33, 33), (50, 21)])
@pytest.mark.parametrize("seed", range(2))
def test_falls_are_those_of_float64(form: str, rows: int, waiting: int, seed: int) -> None:
    matrix, references, before, grown = drawn(rows, waiting, seed)
    found = torch.zeros(rows, dtype=torch.float64)
    if form == "compiled":
        add_compiled(*(each.numpy() for each in (matrix, references, before, grown, found)))
    elif form == "blocks":
        add_by_blocks(matrix, references, before, grown, found)
    else:
        found = falls(matrix, references, before, grown)
    torch.testing.assert_close(found, slow(matrix, references, before, grown), rtol=1e-6, atol=1e-7)


def test_what_is_not_served_better_falls_by_nothing() -> None:
    matrix, references, before, grown = drawn(20, 7, 0)
    assert not falls(matrix, references, before, torch.zeros_like(grown)).any()
    assert not falls(matrix, references, torch.full_like(before, 2.0), grown).any()
