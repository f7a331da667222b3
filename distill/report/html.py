"""report.html: one page that holds everything, opens anywhere, and loads nothing.

No scripts, no network: a Content-Security-Policy in the page forbids both, images are inline PNG, the plot is
inline SVG. Every text from outside (class names, recipe, notes) passes `html.escape`.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from distill.evaluation.results import Evaluation
from distill.report.images import fitting_scale, grid_png, thumbnails
from distill.report.plot import accuracy_plot, labelled_control
from distill.report.quantities import percent, size
from distill.report.style import CSS
from distill.report.tables import (
    Table,
    accuracy_table,
    cost_table,
    encoder_line,
    intervals_line,
    measured,
    paired_table,
    tested_on,
)
from distill.report.verdict import verdict
from distill.yaml_lines import dump

IMAGE_PIXELS = 64  # longer side of a shown image
MOST_CLASSES = 50
MOST_PER_CLASS = 20
MOST_IMAGES = (
    400  # on the page, so that it stays a few megabytes; at least MIN_PER_CLASS a class all the same
)
MIN_PER_CLASS = 5
LABELLED_IMAGES = 8
TOP_LABELS = 3

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(
    evaluation: Evaluation,
    *,
    images: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    soft: np.ndarray | None,
    title: str,
) -> str:
    """The page.

    Args:
        evaluation: what was found.
        images: uint8 (N, H, W, Ch), the images of the set.
        labels: int (N,), class numbers.
        classes: names of the C classes.
        soft: soft-label probabilities, float (N, C), or None.
        title: plain text, such as `digits: soft_label`.
    """
    sections = [
        _accuracy(evaluation),
        _differences(evaluation),
        _images(images, labels, classes),
        _soft_labels(images, labels, classes, soft) if soft is not None else "",
        _size(evaluation, images=len(labels)),
        _cost(evaluation),
        _notes(evaluation.notes),
        _details(evaluation),
    ]
    headline = verdict(evaluation).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body>\n<main>\n"
        f'<header><p class="kind">{escape(title)}</p>'
        f"<h1>{escape(headline)}</h1></header>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n</body>\n</html>\n"
    )


_MARKS = "Large marks are means, bars 95% intervals (Student's t), small ticks single seeds; last epoch."
_OF_TEACHERS = (
    "The random arm that has no hard labels is labelled by the set's own teachers, as the set is: what is left of the "
    "difference to it, the images make."
)


def _section(heading: str, *content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{''.join(content)}</section>"


def _quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def _accuracy(evaluation: Evaluation) -> str:
    if not evaluation.results:
        return ""
    table, why = accuracy_table(evaluation), intervals_line(evaluation)
    plot = accuracy_plot(evaluation.results, measured=measured(evaluation))
    return _section(
        measured(evaluation),
        f'<div class="card scroll">{plot}</div>',
        _quiet(_MARKS if why is None else f"{_MARKS} {why}"),
        _quiet(_OF_TEACHERS) if any(labelled_control(each) for each in evaluation.results) else "",
        _table(table),
    )


def _differences(evaluation: Evaluation) -> str:
    if not evaluation.paired:
        return ""
    text = (
        "Each seed trains every arm from the same weights; the interval is of the differences seed by seed."
    )
    heading = f"Differences in percentage points{tested_on(evaluation)}"
    return _section(heading, _table(paired_table(evaluation)), _quiet(text))


def _table(table: Table) -> str:
    sides = [' class="right"' if name in table.right else "" for name in table.columns]
    head = "".join(
        f'<th scope="col"{side}>{escape(name)}</th>' for name, side in zip(table.columns, sides, strict=True)
    )
    rows = "".join(
        "<tr>" + "".join(_cell(text, side) for text, side in zip(row, sides, strict=True)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(text: str, side: str) -> str:
    if text == "excludes 0":
        side = ' class="excludes"'
    return f"<td{side}>{escape(text)}</td>"


def _images(images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str:
    present, counts = np.unique(labels, return_counts=True)
    shown = present[:MOST_CLASSES]
    columns = min(MOST_PER_CLASS, max(MIN_PER_CLASS, MOST_IMAGES // len(shown)))
    rows = [_image_row(images, labels, classes, label=int(label), columns=columns) for label in shown]
    height, width, channels = images.shape[1:]
    facts = f"{len(labels)} images of {height} x {width} pixels, {_colours(channels)}"
    if len(present) < len(classes):
        facts += f"; {len(classes) - len(present)} of {len(classes)} classes have none"
    if len(shown) < len(present):
        facts += f"; the first {len(shown)} of {len(present)} classes are shown"
    if counts.max() > columns:
        facts += f"; the first {columns} of up to {counts.max()} images a class are shown"
    return _section("Images", f'<div class="card images">{"".join(rows)}</div>', _quiet(f"{facts}."))


def _colours(channels: int) -> str:
    return {1: "grey", 3: "RGB"}.get(channels, f"the first of {channels} channels shown")


def _image_row(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], *, label: int, columns: int
) -> str:
    chosen = np.flatnonzero(labels == label)[:columns]
    name = classes[label]
    picture = _picture(
        images[chosen], labels[chosen], columns=columns, text=f"{len(chosen)} images of {name}"
    )
    return f'<div class="name">{escape(name)}</div><div>{picture}</div>'


def _picture(images: np.ndarray, labels: np.ndarray, *, columns: int, text: str) -> str:
    small = thumbnails(images, longest=IMAGE_PIXELS)
    scale = fitting_scale(small.shape[1], small.shape[2], goal=IMAGE_PIXELS)
    data = base64.b64encode(grid_png(small, labels, columns=columns, scale=scale)).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}">'


def _soft_labels(images: np.ndarray, labels: np.ndarray, classes: Sequence[str], soft: np.ndarray) -> str:
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)[:LABELLED_IMAGES]]
    cards = [_soft_label(images, labels, classes, soft, index=index) for index in first]
    top = min(TOP_LABELS, len(classes))
    text = f"The {top} most probable classes of one image a class, the first {len(first)} classes."
    return _section("Soft labels", f'<div class="card labels">{"".join(cards)}</div>', _quiet(text))


def _soft_label(
    images: np.ndarray, labels: np.ndarray, classes: Sequence[str], soft: np.ndarray, *, index: int
) -> str:
    name = classes[int(labels[index])]
    here = slice(index, index + 1)
    bars = "".join(
        f'<div class="bar"><span class="name">{escape(classes[int(c)])}</span>'
        f'<span class="share">{percent(soft[index, c])}</span>'
        f'<i style="--share:{100 * soft[index, c]:.1f}%"></i></div>'
        for c in np.argsort(-soft[index], kind="stable")[:TOP_LABELS]
    )
    picture = _picture(images[here], labels[here], columns=1, text=f"image of {name}")
    return f'<div class="label">{picture}<div>{bars}</div></div>'


def _size(evaluation: Evaluation, *, images: int) -> str:
    b = evaluation.bytes
    parts = (
        ("images", b.images, ""),
        ("labels", b.labels, ""),
        ("aux", b.aux, ""),
        ("total", b.total, "whole"),
    )
    boxes = "".join(
        f'<div class="{kind}"><b>{escape(size(count))}</b><span>{name}</span></div>'
        for name, count, kind in parts
    )
    each = f"{size(round(b.total / images))} an image, labels and everything else included."
    beside = encoder_line(evaluation)
    told = each if beside is None else f"{each} The {beside}."
    return _section("Size", f'<div class="stats">{boxes}</div>', _quiet(told))


def _cost(evaluation: Evaluation) -> str:
    if not evaluation.cost:
        return ""
    cached = any(cost.cached for cost in evaluation.cost.values())
    text = "Stages from the cache count what an earlier run paid, where that is known." if cached else ""
    return _section("Cost", _table(cost_table(evaluation)), _quiet(text) if text else "")


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return _section("Notes", f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>")


def _details(evaluation: Evaluation) -> str:
    recipe, train = (escape(dump(dict(facts))) for facts in (evaluation.recipe, evaluation.train))
    environment = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in _leaves(evaluation.environment)
    )
    return (
        "<section><details open><summary>Recipe, every default filled in</summary>"
        f'<pre class="card">{recipe}</pre></details>'
        "<details open><summary>Training of students, as the set asks for it</summary>"
        f'<pre class="card">{train}</pre></details>'
        f"<details open><summary>Environment</summary><dl>{environment}</dl></details></section>"
    )


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a nested mapping, in its order."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
