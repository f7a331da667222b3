"""The plot of accuracies as hand-written SVG: an arm's mean, its 95% interval, and every seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from distill.evaluation.results import ArmResult
from distill.report.quantities import percent, with_interval

Scale = Callable[[float], float]

WIDTH = 760  # SVG units; the page scales them to its own width
LEFT_MAX = 260  # of the label column
RIGHT = 118  # room for the numbers
ROW = 34
HEAD = 34  # a student's name
AXIS = 44
LETTER = 7.4  # mean width of a letter at 13 units

# Each arm has its own marker, so that the plot can be read without colour. The colours of the style sheet
# are after Okabe and Ito's palette, told apart under every common colour blindness.
_MARKS = {"set": "circle", "random": "diamond", "random_target": "wedge", "full": "square"}
_CORNERS = {
    "diamond": ((0, -7.5), (7.5, 0), (0, 7.5), (-7.5, 0)),
    "triangle": ((0, -7), (7, 6), (-7, 6)),
    "wedge": ((0, 7), (7, -6), (-7, -6)),
}


def accuracy_plot(results: Sequence[ArmResult], *, measured: str) -> str:
    """One `<svg>`: rows are arms by student, on an axis in percent. Every text is escaped.

    Args:
        results: a row each.
        measured: what the accuracies are, such as `Test accuracy`.
    """
    low, high, step = axis_range([value for result in results for value in _extent(result)])
    left = min(LEFT_MAX, 24 + LETTER * max(len(_label(result)) for result in results))
    students = list(dict.fromkeys(result.student for result in results))
    bottom = len(students) * HEAD + len(results) * ROW

    def x(value: float) -> float:
        """Where a fraction lies, in SVG units."""
        return left + (value - low) / (high - low) * (WIDTH - RIGHT - left)

    parts = _axis(x, low, high, step, bottom, title=measured)
    y = 0.0
    for student in students:
        parts.append(f'<text class="student" x="0" y="{y + 21:.1f}">{escape(student)}</text>')
        y += HEAD
        for result in results:
            if result.student == student:
                parts += _row(result, x, y + ROW / 2)
                y += ROW
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {bottom + AXIS}" role="img" '
        f'aria-label="{escape(measured)} of each arm, with its 95% interval">{"".join(parts)}</svg>'
    )


def axis_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Ends and tick step of an axis over fractions: round numbers around all values, within [0, 1]."""
    spread = max(max(values) - min(values), 0.02)
    low, high = max(0.0, min(values) - 0.05 * spread), min(1.0, max(values) + 0.05 * spread)
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2) if (high - low) / s <= 7)
    # A hair of tolerance, lest 0.7 / 0.1 = 6.999... add a step.
    return math.floor(low / step + 1e-9) * step, min(1.0, math.ceil(high / step - 1e-9) * step), step


def _extent(result: ArmResult) -> tuple[float, ...]:
    """All values of a result that the plot shows."""
    return (*result.accuracies, *_interval(result))


def _interval(result: ArmResult) -> tuple[float, float]:
    """Ends of the 95% interval, cut to [0, 1]: it may pass 100%, the axis must not. The mean where none is told."""
    half = result.told_ci95 or 0.0
    return max(0.0, result.accuracy_mean - half), min(1.0, result.accuracy_mean + half)


def _axis(x: Scale, low: float, high: float, step: float, bottom: float, *, title: str) -> list[str]:
    parts = []
    for k in range(round((high - low) / step) + 1):
        value = min(low + k * step, high)
        text = f"{100 * value:.{1 if step < 0.01 else 0}f}%"
        parts.append(f'<line class="grid" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="0" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{x(value):.1f}" y="{bottom + 18}">{text}</text>')
    middle = (x(low) + x(high)) / 2
    parts.append(f'<text class="tick" x="{middle:.1f}" y="{bottom + 38}">{escape(title)}</text>')
    return parts


def _row(result: ArmResult, x: Scale, y: float) -> list[str]:
    mean = x(result.accuracy_mean)
    tip = f"{_label(result)}: {', '.join(percent(value) for value in result.accuracies)}"
    kind = result.arm if result.arm in _MARKS and not labelled_control(result) else "other"
    parts = [f'<g class="arm-{kind}"><title>{escape(tip)}</title>']
    parts.append(f'<text class="arm" x="16" y="{y + 4.5:.1f}">{escape(_shortened(_label(result)))}</text>')
    if result.told_ci95 is not None:
        first, last = _interval(result)
        parts.append(f'<line class="interval" x1="{x(first):.1f}" x2="{x(last):.1f}" y1="{y}" y2="{y}"/>')
    parts += [
        f'<line class="seed" x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{y - 9}" y2="{y + 9}"/>'
        for value in result.accuracies
    ]
    parts.append(_marker("triangle" if kind == "other" else _MARKS[result.arm], mean, y))
    number = with_interval(result.accuracy_mean, result.told_ci95)
    parts.append(f'<text class="number" x="{WIDTH}" y="{y + 4.5:.1f}">{number}</text></g>')
    return parts


def _marker(shape: str, x: float, y: float) -> str:
    if shape == "circle":
        return f'<circle class="mark" cx="{x:.1f}" cy="{y}" r="6"/>'
    if shape == "square":
        return f'<rect class="mark" x="{x - 5.5:.1f}" y="{y - 5.5}" width="11" height="11"/>'
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in _CORNERS[shape])
    return f'<polygon class="mark" points="{points}"/>'


def labelled_control(result: ArmResult) -> bool:
    """Whether it is `random_soft`: real images with the labels of the set's own teachers."""
    return result.arm == "random" and result.regime != "hard"


def _label(result: ArmResult) -> str:
    return f"{result.arm}, {result.regime} labels"


def _shortened(label: str) -> str:
    """Cut to what the label column holds; the whole is in the row's tooltip."""
    most = int((LEFT_MAX - 24) / LETTER)
    return label if len(label) <= most else label[: most - 1] + "…"
