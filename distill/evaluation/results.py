"""What an evaluation found, and report.json: the only place that knows the report's names.

Names in the report are stable: programs read them. A new name may be added; renaming, removing or changing
the meaning of one raises `VERSION`. Accuracies and differences are fractions, seconds are wall time, sizes
are bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from distill.errors import DamagedDataError
from distill.evaluation.scores import interval95

VERSION = 1
_ROUNDING = 1e-9  # of differences between accuracies; far below 1 / test images


def half_width(values: Sequence[float]) -> float | None:
    """Half-width of the 95% interval of a mean; None for one value, and for values that are all alike.

    Equal values have a sample deviation of 0, which tells that the test set is too coarse to show the seeds' spread,
    and not that there is none: an interval of width 0 would claim certainty.
    """
    return None if len(values) == 1 or _alike(values) else interval95(values)[1]


def _told(half: float | None, *, scale: float) -> float | None:
    """The half-width, None where the interval is wider than all values that there are: it would tell nothing."""
    return None if half is None or 2 * half > scale else half


def _alike(values: Sequence[float]) -> bool:
    return max(values) - min(values) < _ROUNDING


@dataclass(frozen=True)
class ArmResult:
    """Test accuracies of one arm, in one regime, on one student; last epoch, one a seed.

    Args:
        arm: what was trained on: `set`, `random`, `full`, ...
        regime: which labels the student saw: `hard`, `soft` or `teacher`.
        student: model name.
        accuracies: fractions in [0, 1], in seed order.
        epochs, steps: training budget of one student.
        images: number of training images.
    """

    arm: str
    regime: str
    student: str
    accuracies: tuple[float, ...]
    epochs: int
    steps: int
    images: int

    def __post_init__(self) -> None:
        if not self.accuracies or not all(0 <= value <= 1 for value in self.accuracies):
            raise ValueError(f"accuracies of arm {self.arm!r} are not fractions: {self.accuracies}")

    @property
    def seeds(self) -> int:
        return len(self.accuracies)

    @property
    def accuracy_mean(self) -> float:
        return math.fsum(self.accuracies) / self.seeds

    @property
    def accuracy_ci95(self) -> float | None:
        """Half-width of the 95% interval; None where there is none, see `half_width`."""
        return half_width(self.accuracies)

    @property
    def told_ci95(self) -> float | None:
        """`accuracy_ci95` for people: None too where the interval is wider than the scale from 0 to 1."""
        return _told(self.accuracy_ci95, scale=1.0)

    @property
    def too_few_seeds(self) -> bool:
        """Whether there is an interval that is too wide to be told."""
        return self.accuracy_ci95 is not None and self.told_ci95 is None


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of arm a minus that of arm b, seed by seed.

    Args:
        arm_a, regime: the first arm and its regime.
        arm_b, regime_b: the second arm and its regime.
        student: model name.
        differences: fractions in [-1, 1], in seed order.
    """

    arm_a: str
    arm_b: str
    regime: str
    regime_b: str
    student: str
    differences: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.differences or not all(-1 <= value <= 1 for value in self.differences):
            raise ValueError(
                f"differences {self.arm_a!r} - {self.arm_b!r} are impossible: {self.differences}"
            )

    @classmethod
    def between(cls, a: ArmResult, b: ArmResult) -> PairedDifference:
        """a - b for two results on the same student with the same seeds."""
        if a.student != b.student or a.seeds != b.seeds:
            raise ValueError(f"{a.arm!r} and {b.arm!r} do not share student and seeds")
        differences = tuple(x - y for x, y in zip(a.accuracies, b.accuracies, strict=True))
        return cls(a.arm, b.arm, a.regime, b.regime, a.student, differences)

    @property
    def difference_mean(self) -> float:
        return math.fsum(self.differences) / len(self.differences)

    @property
    def difference_ci95(self) -> float | None:
        """Half-width of the 95% interval; None where there is none, see `half_width`."""
        return half_width(self.differences)

    @property
    def told_ci95(self) -> float | None:
        """`difference_ci95` for people: None too where the interval is wider than the scale from -1 to 1."""
        return _told(self.difference_ci95, scale=2.0)

    @property
    def too_few_seeds(self) -> bool:
        """Whether there is an interval that is too wide to be told."""
        return self.difference_ci95 is not None and self.told_ci95 is None

    @property
    def identical(self) -> bool:
        """Whether there are several differences, and all are alike."""
        return len(self.differences) > 1 and _alike(self.differences)

    @property
    def excludes_zero(self) -> bool:
        """Whether the 95% interval lies on one side of 0; never where there is none."""
        return self.difference_ci95 is not None and abs(self.difference_mean) > self.difference_ci95


@dataclass(frozen=True)
class StageCost:
    """What one stage took.

    Args:
        seconds: wall time, with what an earlier run paid for results from the cache, where that is known.
        peak_bytes: peak memory on the device (of the process, on a CPU); None where it was not measured.
        cached: something was read from the cache that an earlier run paid for.
    """

    seconds: float
    peak_bytes: int | None
    cached: bool = False


@dataclass(frozen=True)
class SetBytes:
    """Size of a set, in bytes as stored. `aux` is everything that is neither image nor label.

    Where a public encoder labels, `adapter` is the part of the labels that says how it is adapted, before compression,
    and `encoder` the size of its own file, which is no part of the set.
    """

    images: int
    labels: int
    aux: int
    adapter: int = 0
    encoder: int = 0

    @property
    def total(self) -> int:
        return self.images + self.labels + self.aux


@dataclass(frozen=True)
class Evaluation:
    """Everything that report.json, the table and the page tell.

    Args:
        results: one entry an arm, regime and student.
        paired: differences over shared seeds; the first is the one that the headline quotes.
        bytes: size of the set.
        cost: by stage, in the order of the run.
        recipe: merged recipe, JSON-able.
        train: the training that the set asks for, which a method may have changed from the recipe's; JSON-able.
        environment: machine, versions, device and time, JSON-able.
        notes: what a reader must know, such as "1000 of 60000 training images used".
        images_per_class: images of the set in each of the data's classes; empty where an older report does not tell.
    """

    results: tuple[ArmResult, ...]
    paired: tuple[PairedDifference, ...]
    bytes: SetBytes
    cost: Mapping[str, StageCost]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    images_per_class: tuple[int, ...] = ()


def to_report(evaluation: Evaluation) -> dict[str, Any]:
    """The JSON-able form of an evaluation, by the stable names of report.json."""
    return {
        "version": VERSION,
        "results": [_result_row(result) for result in evaluation.results],
        "paired": [_paired_row(pair) for pair in evaluation.paired],
        "bytes": {**asdict(evaluation.bytes), "total": evaluation.bytes.total},
        "cost": {stage: asdict(cost) for stage, cost in evaluation.cost.items()},
        "recipe": dict(evaluation.recipe),
        "train": dict(evaluation.train),
        "environment": dict(evaluation.environment),
        "notes": list(evaluation.notes),
        "images_per_class": list(evaluation.images_per_class),
    }


def from_report(report: Mapping[str, Any], *, where: str) -> Evaluation:
    """The evaluation that `to_report` wrote.

    Args:
        report: parsed report.json.
        where: its path, for messages.

    Raises:
        DamagedDataError: another version, a missing name, or an impossible value.
    """
    if not isinstance(report, Mapping) or report.get("version") != VERSION:
        found = report.get("version") if isinstance(report, Mapping) else type(report).__name__
        raise DamagedDataError(
            "not a report of this version", where=where, found=str(found), allowed=str(VERSION)
        )
    try:
        return Evaluation(
            results=tuple(_read_result(row) for row in report["results"]),
            paired=tuple(_read_paired(row) for row in report["paired"]),
            bytes=_read_bytes(report["bytes"]),
            cost={stage: StageCost(**cost) for stage, cost in report["cost"].items()},
            recipe=dict(report["recipe"]),
            train=dict(report["train"]),
            environment=dict(report["environment"]),
            notes=tuple(report["notes"]),
            images_per_class=tuple(report.get("images_per_class", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedDataError(
            "the report is damaged",
            where=where,
            found=f"{type(error).__name__}: {error}",
            fix="evaluate the set again",
        ) from error


def _read_bytes(row: Mapping[str, Any]) -> SetBytes:
    """Reports from before labels by encoders know only of the set's own parts."""
    own = {name: row[name] for name in ("images", "labels", "aux")}
    return SetBytes(**own, **{name: row[name] for name in ("adapter", "encoder") if name in row})


def _result_row(result: ArmResult) -> dict[str, Any]:
    return {
        "arm": result.arm,
        "regime": result.regime,
        "student": result.student,
        "accuracy_mean": result.accuracy_mean,
        "accuracy_ci95": result.accuracy_ci95,
        "seeds": result.seeds,
        "epochs": result.epochs,
        "steps": result.steps,
        "images": result.images,
        "accuracies": list(result.accuracies),
    }


def _read_result(row: Mapping[str, Any]) -> ArmResult:
    names = ("arm", "regime", "student", "epochs", "steps", "images")
    return ArmResult(**{name: row[name] for name in names}, accuracies=tuple(row["accuracies"]))


def _paired_row(pair: PairedDifference) -> dict[str, Any]:
    return {
        "arm_a": pair.arm_a,
        "arm_b": pair.arm_b,
        "regime": pair.regime,
        "regime_b": pair.regime_b,
        "student": pair.student,
        "difference_mean": pair.difference_mean,
        "difference_ci95": pair.difference_ci95,
        "differences": list(pair.differences),
    }


def _read_paired(row: Mapping[str, Any]) -> PairedDifference:
    names = ("arm_a", "arm_b", "regime", "regime_b", "student")
    return PairedDifference(**{name: row[name] for name in names}, differences=tuple(row["differences"]))
