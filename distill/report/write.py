"""report.json and report.html on disk: whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from distill.contracts import DistilledSet
from distill.evaluation.results import Evaluation, to_report
from distill.files import write_bytes_atomically
from distill.labels.codecs import is_stored, probabilities
from distill.report.html import render

_PASSES = 16  # of labelled views, whose mean the page shows


def write_report(
    evaluation: Evaluation, distilled: DistilledSet, *, json_path: Path, html_path: Path
) -> None:
    """Write report.json, by its stable names, and the page with the images of the set.

    Raises:
        InputError: the folder is not writable, or the disk is full.
    """
    text = json.dumps(to_report(evaluation), indent=2, ensure_ascii=False, allow_nan=False)
    soft = None
    if distilled.soft is not None and is_stored(distilled.soft):
        soft = probabilities(distilled.soft, classes=distilled.labels, passes=_PASSES).numpy()
    page = render(
        evaluation,
        images=displayable(distilled.images),
        labels=distilled.labels.numpy(),
        classes=distilled.classes,
        soft=soft,
        title=title(evaluation),
    )
    write_bytes_atomically(json_path, f"{text}\n".encode())
    write_bytes_atomically(html_path, page.encode())


def displayable(images: Tensor) -> np.ndarray:
    """The images of a set as a screen shows them.

    Args:
        images: uint8 (N, Ch, H, W) in 0..255, or float in units of pixel value / 255, cut to [0, 1].

    Returns:
        uint8 (N, H, W, Ch).
    """
    if images.is_floating_point():
        images = (images.float().clamp(0, 1) * 255).round().byte()
    return images.permute(0, 2, 3, 1).cpu().numpy()


def title(evaluation: Evaluation) -> str:
    """What was run, such as `digits: kcenter, soft_label`, from the merged recipe."""
    recipe = evaluation.recipe
    steps = ", ".join(name for step in recipe["steps"] for name in step)
    return f"{recipe['data']['name']}: {steps}"
