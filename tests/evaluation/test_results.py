"""report.json keeps its names, survives a round trip, and refuses what is impossible."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from distill.errors import DamagedDataError
from distill.evaluation.results import (
    ArmResult,
    Evaluation,
    PairedDifference,
    SetBytes,
    StageCost,
    from_report,
    to_report,
)


def arm(
    name: str = "set", *, accuracies: tuple[float, ...] = (0.8, 0.82, 0.84), regime: str = "soft"
) -> ArmResult:
    return ArmResult(name, regime, "convnet", accuracies, epochs=300, steps=300, images=100)


@pytest.fixture
def evaluation() -> Evaluation:
    ours, control = arm(), arm("random", accuracies=(0.7, 0.71, 0.75), regime="hard")
    return Evaluation(
        results=(ours, control),
        paired=(PairedDifference.between(ours, control),),
        bytes=SetBytes(images=6400, labels=2000, aux=600),
        cost={"data": StageCost(0.25, None), "teacher": StageCost(12.5, 1_000_000, cached=True)},
        recipe={"seed": 0, "data": {"name": "digits"}},
        train={"epochs": 300},
        environment={"torch": "2.10"},
        notes=("1000 of 1797 images used",),
        images_per_class=(60, 40),
    )


def test_names_of_the_report_are_stable(evaluation: Evaluation) -> None:
    report = to_report(evaluation)
    assert list(report) == [
        "version", "results", "paired", "bytes", "cost", "recipe", "train", "environment", "notes",
        "images_per_class",
    ]  # fmt: skip
    assert set(report["results"][0]) == {
        "arm", "regime", "student", "accuracy_mean", "accuracy_ci95", "seeds", "epochs",
        "steps", "images", "accuracies",
    }  # fmt: skip
    assert set(report["paired"][0]) == {
        "arm_a", "arm_b", "regime", "regime_b", "student",
        "difference_mean", "difference_ci95", "differences",
    }  # fmt: skip
    assert set(report["bytes"]) == {"images", "labels", "aux", "adapter", "encoder", "total"}
    assert report["cost"] == {
        "data": {"seconds": 0.25, "peak_bytes": None, "cached": False},
        "teacher": {"seconds": 12.5, "peak_bytes": 1_000_000, "cached": True},
    }


def test_values_of_the_report(evaluation: Evaluation) -> None:
    report = to_report(evaluation)
    row, pair = report["results"][0], report["paired"][0]
    assert (row["arm"], row["regime"], row["student"]) == ("set", "soft", "convnet")
    assert row["accuracy_mean"] == pytest.approx(0.82)
    assert row["accuracy_ci95"] == pytest.approx(4.3027 * 0.02 / math.sqrt(3), rel=1e-4)
    assert (row["seeds"], row["epochs"], row["images"]) == (3, 300, 100)
    assert (pair["arm_a"], pair["regime"], pair["arm_b"], pair["regime_b"]) == (
        "set",
        "soft",
        "random",
        "hard",
    )
    assert pair["differences"] == pytest.approx([0.10, 0.11, 0.09])
    assert pair["difference_mean"] == pytest.approx(0.10)
    assert pair["difference_ci95"] == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert report["bytes"]["total"] == 9000


def test_round_trip_through_json(evaluation: Evaluation) -> None:
    text = json.dumps(to_report(evaluation), allow_nan=False)
    assert from_report(json.loads(text), where="report.json") == evaluation


def test_a_report_from_before_classes_were_counted_is_read(evaluation: Evaluation) -> None:
    report = to_report(evaluation)
    del report["images_per_class"]
    assert from_report(report, where="report.json") == replace(evaluation, images_per_class=())


def test_one_seed_has_a_mean_and_no_interval() -> None:
    single = arm(accuracies=(0.8,))
    pair = PairedDifference.between(single, arm("random", accuracies=(0.5,)))
    assert (single.accuracy_mean, single.accuracy_ci95, single.seeds) == (0.8, None, 1)
    assert pair.difference_ci95 is None
    assert not pair.excludes_zero


@pytest.mark.parametrize(
    ("differences", "excludes"),
    [
        ((0.10, 0.11, 0.09), True),
        ((-0.10, -0.11, -0.09), True),
        ((0.1, -0.1, 0.05), False),
        ((0.0, 0.0), False),
        ((0.3, 0.3, 0.3), False),
        ((0.8 - 0.5, 0.7 - 0.4), False),  # alike but for rounding
    ],
)
def test_whether_the_interval_excludes_zero(differences: tuple[float, ...], excludes: bool) -> None:
    assert PairedDifference("a", "b", "hard", "hard", "mlp", differences).excludes_zero is excludes


def test_equal_values_give_no_interval() -> None:
    """Their deviation is estimated as 0, and the interval of width 0 would claim certainty."""
    same = arm(accuracies=(0.8, 0.7))
    pair = PairedDifference.between(same, arm("random", accuracies=(0.5, 0.4)))
    assert pair.differences[0] != pair.differences[1], "equal but for rounding"
    assert (pair.difference_ci95, pair.identical) == (None, True)
    assert arm(accuracies=(0.97, 0.97, 0.97)).accuracy_ci95 is None
    apart = PairedDifference.between(same, arm("random", accuracies=(0.5, 0.4001)))
    assert not apart.identical and apart.difference_ci95 is not None, "one of 10000 test images"
    assert not PairedDifference("a", "b", "hard", "hard", "mlp", (0.3,)).identical


def test_an_interval_wider_than_the_scale_is_not_told() -> None:
    """Programs read it all the same: report.json has every interval that there is."""
    wide, narrow = arm(accuracies=(0.361, 0.593)), arm(accuracies=(0.45, 0.5))
    assert wide.accuracy_ci95 is not None and wide.told_ci95 is None and wide.too_few_seeds
    assert narrow.told_ci95 == narrow.accuracy_ci95 is not None and not narrow.too_few_seeds
    assert not arm(accuracies=(0.8,)).too_few_seeds, "no interval, which is another thing"
    pair = PairedDifference.between(wide, narrow)
    assert pair.told_ci95 is None and pair.too_few_seeds and not pair.excludes_zero
    half = PairedDifference("a", "b", "hard", "hard", "mlp", (0.0, 0.1))
    assert half.told_ci95 == half.difference_ci95 is not None, "differences lie between -1 and 1"


@pytest.mark.parametrize("accuracies", [(), (0.5, 82.0), (-0.1,), (math.nan, 0.5)])
def test_accuracies_that_are_not_fractions_are_refused(accuracies: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="not fractions"):
        arm(accuracies=accuracies)


@pytest.mark.parametrize("differences", [(), (1.5,), (math.nan,)])
def test_impossible_differences_are_refused(differences: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        PairedDifference("a", "b", "hard", "hard", "mlp", differences)


def test_pairs_need_the_same_seeds() -> None:
    with pytest.raises(ValueError, match="share student and seeds"):
        PairedDifference.between(arm(), arm("random", accuracies=(0.5, 0.6)))


def _without(report: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in report.items() if key != name}


@pytest.mark.parametrize(
    "name", ["version", "results", "paired", "bytes", "cost", "recipe", "train", "environment", "notes"]
)
def test_a_report_with_a_missing_name_is_damaged(evaluation: Evaluation, name: str) -> None:
    with pytest.raises(DamagedDataError, match=r"report\.json"):
        from_report(_without(to_report(evaluation), name), where="report.json")


def test_a_report_with_impossible_values_is_damaged(evaluation: Evaluation) -> None:
    report = to_report(evaluation)
    report["results"][0]["accuracies"] = [82.0]
    with pytest.raises(DamagedDataError, match="not fractions"):
        from_report(report, where="report.json")


@pytest.mark.parametrize("report", [{"version": 2}, [], "text", None])
def test_another_version_or_type_is_named(report: Any) -> None:
    with pytest.raises(DamagedDataError, match="not a report of this version"):
        from_report(report, where="report.json")
