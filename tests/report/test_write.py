"""report.json and report.html on disk: stable names, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet, Preprocessing
from distill.errors import InputError
from distill.evaluation.results import Evaluation, from_report, to_report
from distill.labels.codecs import encode
from distill.report.write import displayable, title, write_report
from distill.training.config import TrainConfig


@pytest.fixture
def distilled() -> DistilledSet:
    logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]])
    return DistilledSet(
        images=torch.arange(2 * 4 * 4, dtype=torch.uint8).reshape(2, 1, 4, 4),
        labels=torch.tensor([0, 1]),
        classes=("cat", "dog"),
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
        train=TrainConfig(),
        soft=encode(logits, codec="full", temperature=1.0, teacher="convnet"),
    )


def write(folder: Path, evaluation: Evaluation, distilled: DistilledSet) -> None:
    write_report(evaluation, distilled, json_path=folder / "report.json", html_path=folder / "report.html")


def test_both_files_are_written_and_nothing_else(
    tmp_path: Path, evaluation: Evaluation, distilled: DistilledSet
) -> None:
    write(tmp_path, evaluation, distilled)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == to_report(evaluation)
    assert from_report(report, where="report.json") == evaluation
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "digits: kcenter, soft_label" in page
    assert "98.2%" in page  # softmax of (4, 0)


def test_set_without_soft_labels(tmp_path: Path, evaluation: Evaluation, distilled: DistilledSet) -> None:
    write(tmp_path, evaluation, replace(distilled, soft=None))
    assert "Soft labels" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_missing_folder_is_the_user_s_error(
    tmp_path: Path, evaluation: Evaluation, distilled: DistilledSet
) -> None:
    with pytest.raises(InputError, match=r"report\.json"):
        write(tmp_path / "missing", evaluation, distilled)


def test_numbers_that_json_cannot_say_leave_no_file(
    tmp_path: Path, evaluation: Evaluation, distilled: DistilledSet
) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, replace(evaluation, environment={"loss": float("nan")}), distilled)
    assert list(tmp_path.iterdir()) == []


def test_uint8_images_are_shown_as_they_are() -> None:
    images = torch.randint(
        0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    shown = displayable(images)
    assert shown.shape == (2, 4, 5, 3)
    for n, ch, h, w in [(0, 0, 0, 0), (1, 2, 3, 4), (0, 1, 2, 3)]:
        assert shown[n, h, w, ch] == images[n, ch, h, w]


def test_float_images_are_cut_and_rounded() -> None:
    images = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.7, 2 / 255], dtype=torch.float16).reshape(1, 1, 2, 3)
    assert np.array_equal(displayable(images).ravel(), [0, 0, 128, 255, 255, 2])


def test_title_names_data_and_methods(evaluation: Evaluation) -> None:
    assert title(evaluation) == "digits: kcenter, soft_label"
