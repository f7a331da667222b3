"""report.html: one page that holds everything, opens anywhere, and loads nothing.

Images are inline PNG, the plot is inline SVG. Every text from outside (class names, recipe, notes) passes
`html.escape`.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

import numpy as np

from distill.evaluation.results import Evaluation
from distill.report.images import fitting_scale, grid_png, thumbnails
from distill.report.page import cost_section, details, notes_section, page, quiet, section, table_of
from distill.report.plot import accuracy_plot, labelled_control
from distill.report.quantities import percent, size
from distill.report.tables import (
    accuracy_table,
    encoder_line,
    intervals_line,
    measured,
    paired_table,
    tested_on,
)
from distill.report.verdict import verdict

IMAGE_PIXELS = 64  # longer side of a shown image
MOST_CLASSES = 50
MOST_PER_CLASS = 20
MOST_IMAGES = (
    400  # on the page, so that it stays a few megabytes; at least MIN_PER_CLASS a class all the same
)
MIN_PER_CLASS = 5
LABELLED_IMAGES = 8
TOP_LABELS = 3


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
        cost_section(evaluation.cost),
        notes_section(evaluation.notes),
        details(
            {
                "Recipe, every default filled in": evaluation.recipe,
                "Training of students, as the set asks for it": evaluation.train,
            },
            evaluation.environment,
        ),
    ]
    headline = verdict(evaluation).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    return page(title, headline, sections)


_MARKS = "Large marks are means, bars 95% intervals (Student's t), small ticks single seeds; last epoch."
_OF_TEACHERS = (
    "The random arm that has no hard labels is labelled by the set's own teachers, as the set is: what is left of the "
    "difference to it, the images make."
)


def _accuracy(evaluation: Evaluation) -> str:
    if not evaluation.results:
        return ""
    table, why = accuracy_table(evaluation), intervals_line(evaluation)
    plot = accuracy_plot(evaluation.results, measured=measured(evaluation))
    return section(
        measured(evaluation),
        f'<div class="card scroll">{plot}</div>',
        quiet(_MARKS if why is None else f"{_MARKS} {why}"),
        quiet(_OF_TEACHERS) if any(labelled_control(each) for each in evaluation.results) else "",
        table_of(table),
    )


def _differences(evaluation: Evaluation) -> str:
    if not evaluation.paired:
        return ""
    text = (
        "Each seed trains every arm from the same weights; the interval is of the differences seed by seed."
    )
    heading = f"Differences in percentage points{tested_on(evaluation)}"
    return section(heading, table_of(paired_table(evaluation)), quiet(text))


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
    return section("Images", f'<div class="card images">{"".join(rows)}</div>', quiet(f"{facts}."))


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
    return section("Soft labels", f'<div class="card labels">{"".join(cards)}</div>', quiet(text))


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
    return section("Size", f'<div class="stats">{boxes}</div>', quiet(told))
