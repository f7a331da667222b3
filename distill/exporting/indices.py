"""What a set knows of each of its images, as JSON lines in the order of the set.

One object a line, with the same keys in every line; null is what is not known:

    index   the image's number in the source's training split, as the selector counted
    row     its number in the data as they were found, before classes, cap and cuts left any out; as costs.file counts
    class   the name of its class
    label   the number of its class in the set
    weight  of the pick, mean 1
    score   of the pick; what it means stands in the set, selection/meta. Infinite scores are null
    path    where the original lies in the data, a member of a shard is SHARD:MEMBER
    file    in an exported folder: where the image lies there

JSON, in ASCII: names come from strangers and may hold commas, line ends or what is no text at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.contracts import DistilledSet


def facts(distilled: DistilledSet, number: int, *, path: str | None) -> dict[str, Any]:
    """What is known of an image, JSON-able.

    Args:
        number: its position in the set.
        path: of its original.
    """
    chosen = distilled.selection
    label = int(distilled.labels[number])
    return {
        "index": None if chosen is None else int(chosen.indices[number]),
        "row": None if chosen is None or chosen.rows is None else int(chosen.rows[number]),
        "class": distilled.classes[label],
        "label": label,
        "weight": None if chosen is None else _shortest(chosen.weights[number]),
        "score": None if chosen is None else _shortest(chosen.scores[number]),
        "path": path,
    }


def _shortest(value: Any) -> float | None:
    """A float32 by the fewest digits that give it back; None where JSON has no number for it."""
    return float(str(value)) if math.isfinite(value) else None


def line(told: dict[str, Any]) -> bytes:
    """One line of JSON, with its end."""
    return json.dumps(told).encode() + b"\n"


def write_indices(distilled: DistilledSet, paths: Iterable[str | None], file: Path) -> None:
    """Write a line an image.

    Args:
        paths: of the originals, in the order of the set.
    """
    with file.open("xb") as lines:
        for number, path in enumerate(paths):
            lines.write(line(facts(distilled, number, path=path)))
