"""The tables of an evaluation: as rows for the page, and as the plain text that ends `run` and `evaluate`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distill.evaluation.results import Evaluation, PairedDifference, StageCost
from distill.report.quantities import points, seconds, size, with_interval

WIDTH = 80  # columns of a terminal; notes are wrapped there


@dataclass(frozen=True)
class Table:
    """A heading, column names and rows of text.

    Args:
        title: heading.
        columns: names.
        rows: cells, one a column.
        right: names of the columns that hold numbers, aligned to the right.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()


def accuracy_table(evaluation: Evaluation) -> Table:
    """One row an arm, regime and student."""
    return Table(
        f"{measured(evaluation)}, mean and 95% interval over seeds",
        ("arm", "labels", "student", "accuracy", "images", "seeds", "epochs", "steps"),
        tuple(
            (
                r.arm,
                r.regime,
                r.student,
                with_interval(r.accuracy_mean, r.told_ci95),
                str(r.images),
                str(r.seeds),
                str(r.epochs),
                str(r.steps),
            )
            for r in evaluation.results
        ),
        right=frozenset({"accuracy", "images", "seeds", "epochs", "steps"}),
    )


def measured(evaluation: Evaluation) -> str:
    """What the accuracies are, such as `Test accuracy on the target`."""
    return f"Test accuracy{tested_on(evaluation)}"


def tested_on(evaluation: Evaluation) -> str:
    """What follows an accuracy that is none on the data's own test split, such as ` on the target`; else nothing."""
    on = evaluation.recipe.get("evaluate", {}).get("on")
    return {"target": " on the target", "transfer": " by linear probes on the target"}.get(on, "")


def intervals_line(evaluation: Evaluation) -> str | None:
    """Why accuracies stand without an interval, where there are too few seeds for one."""
    if not any(result.too_few_seeds for result in evaluation.results):
        return None
    return "Too few seeds for some intervals: those wider than the scale are left out."


def paired_table(evaluation: Evaluation) -> Table:
    """One row a paired difference, with the verdict of its interval in words."""
    return Table(
        "Paired differences in percentage points, same seeds",
        ("difference", "student", "points", "95% interval"),
        tuple(
            (
                f"{p.arm_a} ({p.regime}) - {p.arm_b} ({p.regime_b})",
                p.student,
                points(p.difference_mean, p.told_ci95),
                interval_in_words(p),
            )
            for p in evaluation.paired
        ),
        right=frozenset({"points"}),
    )


def cost_table(cost: Mapping[str, StageCost]) -> Table:
    """One row a stage."""
    return Table(
        "Cost",
        ("stage", "time", "peak memory", ""),
        tuple(
            (
                stage,
                seconds(each.seconds),
                "not measured" if each.peak_bytes is None else size(each.peak_bytes),
                "from cache" if each.cached else "",
            )
            for stage, each in cost.items()
        ),
        right=frozenset({"time", "peak memory"}),
    )


def interval_in_words(pair: PairedDifference) -> str:
    """Whether the 95% interval of a difference excludes 0."""
    if len(pair.differences) == 1:
        return "none: one seed"
    if pair.identical:
        return "none: identical differences"
    if pair.too_few_seeds:
        return "none: too few seeds"
    return "excludes 0" if pair.excludes_zero else "includes 0"


def images_line(evaluation: Evaluation) -> str | None:
    """How many images the set has, and of how many classes, such as `60 images of 6 of 10 classes, 1 to 22 a class`."""
    counts = evaluation.images_per_class
    present = [count for count in counts if count]
    if not present:
        return None
    of = "" if len(present) == len(counts) else f"{len(present)} of "
    least, most = min(present), max(present)
    each = str(most) if least == most else f"{least} to {most}"
    return f"{counted(sum(counts), 'image')} of {of}{counted(len(counts), 'class')}, {each} a class"


def counted(count: int, noun: str) -> str:
    """Such as `1,797 images`."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def size_line(evaluation: Evaluation) -> str:
    """The size of the set, such as `images 6.40 kB + labels 400 B + aux 1.20 kB = 8.00 kB`."""
    b = evaluation.bytes
    return f"images {size(b.images)} + labels {size(b.labels)} + aux {size(b.aux)} = {size(b.total)}"


def encoder_line(evaluation: Evaluation) -> str | None:
    """What labels by a public encoder take, in the set and beside it; None for other labels."""
    b = evaluation.bytes
    if not b.encoder:
        return None
    return (
        f"labels come from an adapter of {size(b.adapter)} for a public encoder of {size(b.encoder)}, "
        "which is not in the set"
    )


def render(evaluation: Evaluation) -> str:
    """The plain text that ends a run: accuracies, differences, size, cost and notes; no newline at its end.

    Columns are as wide as their content; usual names fit in 80 columns. Apart from `±` the tables are ASCII,
    so that old terminals show them.
    """
    parts = [_accuracies(evaluation)]
    if evaluation.paired:
        parts.append(as_text(paired_table(evaluation)))
    sizes = filter(None, [images_line(evaluation), size_line(evaluation), encoder_line(evaluation)])
    parts.append("Size\n" + "\n".join(f"  {line}" for line in sizes))
    if evaluation.cost:
        parts.append(as_text(cost_table(evaluation.cost)))
    if evaluation.notes:
        parts.append("Notes\n" + "\n".join(wrapped(note) for note in evaluation.notes))
    return "\n\n".join(parts)


def _accuracies(evaluation: Evaluation) -> str:
    if not evaluation.results:
        return "The set was not evaluated."
    lines = filter(None, [as_text(accuracy_table(evaluation)), intervals_line(evaluation)])
    return "\n  ".join(lines)


def as_text(table: Table) -> str:
    """The table with its heading, in columns as wide as their content."""
    rows = [table.columns, *table.rows]
    widths = [max(len(row[k]) for row in rows) for k in range(len(table.columns))]
    lines = [_line(row, table, widths) for row in rows]
    rule = "  " + "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([table.title, lines[0], rule, *lines[1:]])


def _line(row: Sequence[str], table: Table, widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if name in table.right else cell.ljust(width)
        for cell, name, width in zip(row, table.columns, widths, strict=True)
    ]
    return ("  " + "  ".join(cells)).rstrip()


def wrapped(note: str) -> str:
    """A note as an item of a list."""
    return textwrap.fill(note, WIDTH, initial_indent="  - ", subsequent_indent="    ")
