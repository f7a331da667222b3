"""Which rows of the data are used: classes, caps and cuts. Shape letters: N rows, C classes.

Every draw orders the rows of a class by a hash of (seed, row number), so it depends on nothing else: not on
the number of workers, nor on the other classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from distill.errors import DamagedDataError, InputError
from distill.randomness import counter_bits
from distill.registry import nearest

MAX_CLASSES = 100_000
_BLOCK = 4096


def drawn_per_class(labels: Tensor, counts: Tensor, *, seed: int) -> Tensor:
    """Mark `counts[c]` random rows of each class c (all of them where the class has fewer).

    Args:
        labels: int64 (N,), in [0, C).
        counts: int64 (C,).
        seed: names the draw.

    Returns:
        bool (N,).
    """
    keys = counter_bits(seed, 0, torch.arange(len(labels)), 0)
    order = torch.argsort(keys, stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, then by key
    sizes = torch.bincount(labels, minlength=len(counts))
    starts = torch.cumsum(sizes, 0) - sizes
    grouped = labels[order]
    rank = torch.arange(len(labels)) - starts[grouped]
    drawn = torch.zeros(len(labels), dtype=torch.bool)
    drawn[order] = rank < counts[grouped]
    return drawn


def share_per_class(labels: Tensor, share: float, *, classes: int) -> Tensor:
    """`share` of each class's size, rounded to the nearest (halves up): int64 (C,)."""
    sizes = torch.bincount(labels, minlength=classes).to(torch.float64)
    return torch.floor(sizes * share + 0.5).to(torch.int64)


def take_out(rows: Tensor, taken: Tensor) -> tuple[Tensor, Tensor]:
    """Part the rows in two without a second copy of the larger part.

    Args:
        rows: (N, ...), overwritten: what is returned as `left` lives in its memory.
        taken: bool (N,).

    Returns:
        left: the rows not taken, in order; out: a copy of those taken, in order.
    """
    out = rows[taken]
    if not len(out):
        return rows, out
    left = torch.nonzero(~taken).flatten()
    for start in range(0, len(left), _BLOCK):
        # Row i of the result never comes from before row i, so no block overwrites what a later one reads.
        block = left[start : start + _BLOCK]
        rows[start : start + len(block)] = rows[block]
    return rows[: len(left)], out


def class_numbers(
    wanted: Sequence[str | int] | None, names: Sequence[str], *, where: str = "data.classes"
) -> tuple[int, ...]:
    """The numbers of the classes asked for, in that order; all of them for None.

    Args:
        wanted: names or numbers.
        names: of all classes.
        where: the option, for messages.

    Raises:
        InputError: an unknown or repeated class.
    """
    if wanted is None:
        return tuple(range(len(names)))
    numbers = tuple(_class_number(entry, names, where=where) for entry in wanted)
    for position, number in enumerate(numbers):
        if number in numbers[:position]:
            raise InputError(
                "a class is listed twice",
                where=where,
                found=f"{wanted[position]!r}, which is class {number} ({names[number]})",
            )
    return numbers


def _class_number(entry: str | int, names: Sequence[str], *, where: str) -> int:
    if isinstance(entry, str) and entry in names:
        return list(names).index(entry)
    if isinstance(entry, int) and 0 <= entry < len(names):
        return entry
    close = nearest(str(entry), names)
    raise InputError(
        "unknown class",
        where=where,
        found=repr(entry),
        allowed=f"a number below {len(names)}, or a name: {_listed(names)}",
        fix=f"did you mean {close!r}?" if close else None,
    )


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def renumbering(numbers: Sequence[int], *, classes: int) -> Tensor:
    """int64 (C,): the new number of each class, -1 where it is left out."""
    table = torch.full((classes,), -1, dtype=torch.int64)
    table[torch.tensor(numbers)] = torch.arange(len(numbers))
    return table


def check_labels(labels: Tensor, *, classes: int, where: str) -> None:
    """Raise DamagedDataError unless every label lies in [0, C)."""
    wrong = torch.nonzero((labels < 0) | (labels >= classes)).flatten()
    if len(wrong):
        row = int(wrong[0])
        raise DamagedDataError(
            f"{len(wrong)} of {len(labels)} labels are out of range",
            where=where,
            found=f"label {int(labels[row])} at row {row}",
            allowed=f"0 to {classes - 1}, the number of classes less one",
        )


def empty_classes(labels: Tensor, names: Sequence[str]) -> list[str]:
    """The names of the classes without a row."""
    sizes = torch.bincount(labels, minlength=len(names)).tolist()
    return [name for name, size in zip(names, sizes, strict=True) if size == 0]


def check_no_class_empty(labels: Tensor, names: Sequence[str], *, where: str, fix: str) -> None:
    """Raise InputError that names the classes without a training image."""
    empty = empty_classes(labels, names)
    if empty:
        raise InputError(
            f"class {empty[0]!r} has no training image"
            if len(empty) == 1
            else f"{len(empty)} classes have no training image: {_listed(empty)}",
            where=where,
            fix=fix,
        )


def entries(rows: Tensor) -> Iterator[int]:
    """The numbers in int64 (N,) one by one; `rows.tolist()` would hold N Python objects at once."""
    for block in rows.split(_BLOCK):
        yield from block.tolist()


def blocks(n: int, row_bytes: int, *, block_bytes: int = 32 * 2**20) -> Iterator[slice]:
    """Consecutive row ranges of about `block_bytes` that cover n rows."""
    size = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
