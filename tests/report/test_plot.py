"""The plot is well-formed, places its marks by value, and its axis holds everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.evaluation.results import ArmResult, Evaluation
from distill.recipe import Control
from distill.report import plot
from distill.report.plot import WIDTH, axis_range
from distill.report.style import CSS


def accuracy_plot(results: Sequence[ArmResult]) -> str:
    return plot.accuracy_plot(results, measured="Test accuracy")


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def with_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if element.get("class") == name]


def test_one_row_an_arm_with_interval_and_seeds(evaluation: Evaluation) -> None:
    root = parse(accuracy_plot(evaluation.results))
    assert [text.text for text in with_class(root, "student")] == ["convnet"]
    assert [text.text for text in with_class(root, "number")] == ["83.0% ± 2.5", "72.0% ± 5.0", "97.0%"]
    assert len(with_class(root, "interval")) == 2, "three equal accuracies have none"
    assert len(with_class(root, "seed")) == 9
    assert [mark.tag for mark in with_class(root, "mark")] == ["circle", "polygon", "rect"]


@pytest.mark.parametrize("arm", get_args(Control))
def test_every_arm_has_a_colour_and_a_mark_of_its_own(evaluation: Evaluation, arm: str) -> None:
    """Without a colour, bars and ticks are not drawn at all."""
    ours, random = evaluation.results[:2]
    regime = "soft" if arm == "random_soft" else "hard"
    name = "random" if arm == "random_soft" else arm
    rows = [ours, replace(random, arm=name, regime=regime)]
    if arm != "random":
        rows.append(random)
    root = parse(accuracy_plot(rows))
    groups = [group.get("class", "") for group in root.iter() if group.tag == "g"]
    assert all(f".plot .{group} {{ --mark: var(--" in CSS for group in groups)
    assert len(set(groups)) == len(rows)
    shapes = [(mark.tag, _shape(mark)) for mark in with_class(root, "mark")]
    assert len(set(shapes)) == len(rows)


def _shape(mark: ElementTree.Element) -> tuple[tuple[float, float], ...]:
    """Corners seen from the first of them; none of a circle or a square."""
    corners = [tuple(map(float, point.split(","))) for point in (mark.get("points") or "").split()]
    return tuple((round(x - corners[0][0]), round(y - corners[0][1])) for x, y in corners)


def test_the_axis_says_what_is_measured(evaluation: Evaluation) -> None:
    root = parse(plot.accuracy_plot(evaluation.results, measured="Test accuracy <on> the target"))
    assert with_class(root, "tick")[-1].text == "Test accuracy <on> the target"
    assert "Test accuracy <on> the target of each arm" in (root.get("aria-label") or "")


def test_marks_lie_on_a_linear_axis(evaluation: Evaluation) -> None:
    root = parse(accuracy_plot(evaluation.results[:1]))
    ticks = {tick.text: float(tick.get("x", "")) for tick in with_class(root, "tick")}
    mean = float(with_class(root, "mark")[0].get("cx", ""))
    assert mean == pytest.approx(ticks["82%"] + 0.5 * (ticks["84%"] - ticks["82%"]), abs=0.1)
    assert max(ticks.values()) < WIDTH


def test_one_seed_has_no_interval(evaluation: Evaluation) -> None:
    root = parse(accuracy_plot([replace(evaluation.results[0], accuracies=(0.8,))]))
    assert not with_class(root, "interval")


def test_an_interval_wider_than_the_scale_has_no_bar(evaluation: Evaluation) -> None:
    root = parse(accuracy_plot([replace(evaluation.results[0], accuracies=(0.361, 0.593))]))
    assert not with_class(root, "interval")
    assert len(with_class(root, "seed")) == 2
    assert [text.text for text in with_class(root, "number")] == ["47.7%"]


def test_names_are_escaped_and_long_ones_cut(evaluation: Evaluation) -> None:
    arm = replace(evaluation.results[0], arm="<b>" + "x" * 60, student="a&b<script>")
    svg = accuracy_plot([arm])
    assert "<script>" not in svg
    assert "<b>" not in svg
    root = parse(svg)
    assert with_class(root, "student")[0].text == "a&b<script>"
    assert (with_class(root, "arm")[0].text or "").endswith("…")
    assert "x" * 60 in (next(root.iter("title")).text or "")


def test_interval_beyond_100_percent_is_cut() -> None:
    result = ArmResult("set", "hard", "mlp", (1.0, 0.9, 0.95), epochs=1, steps=1, images=10)
    (line,) = with_class(parse(accuracy_plot([result])), "interval")
    assert 0 <= float(line.get("x1", "")) < float(line.get("x2", "")) <= WIDTH


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_axis_holds_all_values_with_few_round_ticks(values: list[float]) -> None:
    low, high, step = axis_range(values)
    assert 0 <= low <= min(values) + 1e-9
    assert max(values) - 1e-9 <= high <= 1
    assert low < high
    assert 1 <= round((high - low) / step) <= 9
    assert low / step == pytest.approx(round(low / step), abs=1e-6)
