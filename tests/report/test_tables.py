"""The text that ends a run, letter by letter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.evaluation.results import Evaluation, PairedDifference
from distill.report.tables import WIDTH, render

GOLDEN = """\
Test accuracy, mean and 95% interval over seeds
  arm     labels  student     accuracy  images  seeds  epochs  steps
  ------------------------------------------------------------------
  set     soft    convnet  83.0% ± 2.5     100      3     300    300
  random  hard    convnet  72.0% ± 5.0     100      3     300    300
  full    hard    convnet        97.0%    1437      3      52    312

Paired differences in percentage points, same seeds
  difference                  student       points  95% interval
  --------------------------------------------------------------
  set (soft) - random (hard)  convnet  +11.0 ± 2.5  excludes 0
  set (soft) - full (hard)    convnet  -14.0 ± 2.5  excludes 0

Size
  100 images of 10 classes, 10 a class
  images 6.40 kB + labels 2.00 kB + aux 600 B = 9.00 kB

Cost
  stage              time   peak memory
  -------------------------------------------------
  data             0.25 s  not measured
  1 soft_label     12.3 s        512 MB  from cache
  evaluate      1,234.5 s       1.50 GB

Notes
  - 1437 of 1797 images train, 360 test; this note is long enough that a
    terminal has to wrap it"""


def test_golden(evaluation: Evaluation) -> None:
    assert render(evaluation) == GOLDEN


@pytest.mark.parametrize(
    ("counts", "told"),
    [
        ((22, 0, 1, 7), "30 images of 3 of 4 classes, 1 to 22 a class"),
        ((3, 0), "3 images of 1 of 2 classes, 3 a class"),
        ((1,), "1 image of 1 class, 1 a class"),
        ((50,) * 1000, "50,000 images of 1,000 classes, 50 a class"),
    ],
)
def test_images_are_counted(evaluation: Evaluation, counts: tuple[int, ...], told: str) -> None:
    text = render(replace(evaluation, images_per_class=counts))
    assert f"Size\n  {told}\n  images 6.40 kB" in text


def test_an_older_report_does_not_count_classes(evaluation: Evaluation) -> None:
    assert "Size\n  images 6.40 kB" in render(replace(evaluation, images_per_class=()))


def test_a_set_that_was_not_evaluated_has_a_line_and_no_table(evaluation: Evaluation) -> None:
    text = render(replace(evaluation, results=(), paired=()))
    assert text.startswith("The set was not evaluated.\n\nSize\n")
    assert "accuracy" not in text


def test_usual_names_fit_a_terminal(evaluation: Evaluation) -> None:
    assert max(map(len, render(evaluation).splitlines())) <= WIDTH


def test_undecided_difference_is_marked(evaluation: Evaluation) -> None:
    pair = PairedDifference("set", "random", "hard", "hard", "convnet", (0.1, -0.1, 0.02))
    text = render(replace(evaluation, paired=(pair,)))
    assert "+0.7 ± 25.0  includes 0" in text
    assert "excludes" not in text


def test_one_seed_shows_no_interval(evaluation: Evaluation) -> None:
    single = replace(evaluation.results[0], accuracies=(0.82,))
    pair = PairedDifference("set", "random", "soft", "hard", "convnet", (0.1,))
    text = render(replace(evaluation, results=(single,), paired=(pair,)))
    assert "±" not in text
    assert "none: one seed" in text


def test_intervals_wider_than_the_scale_are_not_told(evaluation: Evaluation) -> None:
    """Two seeds that lie 23 points apart have an interval of 290 points."""
    wide = replace(evaluation.results[0], accuracies=(0.361, 0.593))
    narrow = replace(evaluation.results[1], accuracies=(0.45, 0.46))
    pair = PairedDifference("set", "random", "soft", "hard", "convnet", (-0.089, 0.133))
    text = render(replace(evaluation, results=(wide, narrow), paired=(pair,)))
    assert " 47.7%     100" in text and "45.5% ± 6.4" in text
    assert "  Too few seeds for some intervals: those wider than the scale are left out.\n" in text
    assert "+2.2  none: too few seeds" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_identical_differences_claim_no_interval(evaluation: Evaluation) -> None:
    pair = PairedDifference("set", "random", "hard", "hard", "convnet", (0.1, 0.1, 0.1))
    text = render(replace(evaluation, paired=(pair,)))
    assert "+10.0  none: identical differences" in text
    assert "excludes" not in text


def test_parts_without_content_are_left_out(evaluation: Evaluation) -> None:
    text = render(replace(evaluation, paired=(), cost={}, notes=()))
    assert [line for line in text.splitlines() if line and not line.startswith(" ")] == [
        "Test accuracy, mean and 95% interval over seeds",
        "Size",
    ]


def test_old_terminals_can_show_it(evaluation: Evaluation) -> None:
    assert render(evaluation).encode("cp437").decode("cp437") == render(evaluation)
