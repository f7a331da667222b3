"""The protocol: every arm, regime and student, with paired seeds, tested once after the last epoch.

Nothing is chosen on test data: no epoch, no learning rate, no seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.contracts import DistilledSet, Progress, Source
from distill.errors import InputError
from distill.evaluation.controls import Arm, build_arms
from distill.evaluation.probe import Probe
from distill.evaluation.results import ArmResult, PairedDifference
from distill.files import disk_errors
from distill.models import describe
from distill.randomness import derive_seed
from distill.training.config import Strict
from distill.training.engine import Engine
from distill.training.job import Job, Pool, Trained, ViewLabels


@dataclass(frozen=True)
class Protocol:
    """What is compared, on which students, how often.

    Args:
        students: model configurations.
        seeds: networks an arm, regime and student; at least 2, for an interval.
        against: controls, of `random`, `random_soft` and `full`.
        regimes: labels seen by students of the set; None is every one that applies.
        full_epochs: epochs on the full data; None gives it about the optimiser steps of the other arms, at
            least one epoch.
        seed: the root seed.
    """

    students: tuple[Strict, ...]
    seeds: int
    against: tuple[str, ...]
    regimes: tuple[str, ...] | None
    full_epochs: int | None
    seed: int


class Ledger:
    """Accuracies known already, one JSON line each, so that an interrupted evaluation goes on where it was.

    Args:
        path: of the file; None keeps nothing.
        identity: of the set and of the test data; lines of others are ignored.
    """

    def __init__(self, path: Path | None, *, identity: str) -> None:
        self.path = path
        self.identity = identity
        self.known: dict[str, float] = {}
        self._torn = False
        if path is not None and path.exists():
            text = path.read_text(encoding="utf-8", errors="replace")
            self._torn = text != "" and not text.endswith("\n")
            for line in text.splitlines():
                entry = _parse(line)
                if entry is not None and entry["set"] == identity:
                    self.known[entry["job"]] = entry["accuracy"]

    def add(self, job: str, accuracy: float) -> None:
        """Remember the accuracy of a student, here and in the file."""
        self.known[job] = accuracy
        if self.path is None:
            return
        line = json.dumps({"set": self.identity, "job": job, "accuracy": accuracy}) + "\n"
        with disk_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + line if self._torn else line)
        self._torn = False


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the ledger; None for one that was cut off by a crash."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"set", "job", "accuracy"} <= entry.keys() else None


def evaluate(
    distilled: DistilledSet,
    source: Source,
    protocol: Protocol,
    *,
    engine: Engine,
    progress: Progress,
    ledger: Ledger,
    views: ViewLabels | None = None,
    labelled: Callable[[Pool], Pool] | None = None,
    probe: Probe | None = None,
) -> tuple[tuple[ArmResult, ...], tuple[PairedDifference, ...]]:
    """Train and test every student of every arm.

    Args:
        distilled, source, protocol: what is compared, and how.
        engine, progress: who trains, and who is told.
        ledger: what is known already.
        views: labels of the set's views, None where it has none.
        labelled: labels real images as the set is labelled; not None where `random_soft` is asked for.
        probe: tests students by their features; None tests them on the source's test split.

    Returns:
        One result an arm, regime and student; and the paired differences, the set's own first.
    """
    arms = build_arms(
        distilled,
        source,
        against=protocol.against,
        regimes=protocol.regimes,
        full_epochs=protocol.full_epochs,
        seed=protocol.seed,
        seeds=protocol.seeds,
        views=views,
        labelled=labelled,
    )
    test = None
    if probe is None:
        test = Pool(source.test.images, source.test.labels, distilled.preprocessing)
    students = tuple(dict.fromkeys(protocol.students))
    _refuse_one_name_for_two(students)
    jobs = {
        _job_name(arm, student, k): _job(arm, student, k, test, len(source.classes), protocol.seed)
        for student in students
        for arm in arms
        for k in range(protocol.seeds)
    }
    waiting = {name: job for name, job in jobs.items() if name not in ledger.known}
    if len(waiting) < len(jobs):
        progress.note(
            f"{len(jobs) - len(waiting)} of {len(jobs)} students are known from the interrupted run"
        )
    names = list(waiting)

    def remember(number: int, trained: Trained) -> None:
        name, accuracy = names[number], trained.accuracy
        if probe is not None:
            accuracy = probe.accuracy(waiting[name].model, trained.state)
        assert accuracy is not None
        ledger.add(name, accuracy)

    if waiting:
        engine.train(list(waiting.values()), title="students", on_done=remember)
    results = tuple(_result(arm, student, protocol.seeds, ledger) for student in students for arm in arms)
    return results, tuple(paired_differences(results))


def _refuse_one_name_for_two(students: Sequence[Strict]) -> None:
    """Results are told by what `describe` calls a student, so two must not share a name."""
    names = [describe(student) for student in students]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            "two students would have one name in the report",
            found=twice,
            fix="give their weights files different names, or evaluate them one after the other",
        )


def _job_name(arm: Arm, student: Strict, k: int) -> str:
    """What the ledger calls the k-th student of an arm."""
    return f"{arm.name}/{arm.regime}/{describe(student)}/{k}"


def _job(arm: Arm, student: Strict, k: int, test: Pool | None, classes: int, seed: int) -> Job:
    return Job(
        model=student,
        classes=classes,
        config=arm.config,
        pool=arm.pool(k),
        # One seed for the k-th network of every arm: the arms are paired.
        seed=derive_seed(seed, "student", k),
        indices=None if arm.indices is None else arm.indices[k],
        test=test,
        keep_state=test is None,
        label=f"student {describe(student)} on {arm.name} ({arm.regime} labels), seed {k}",
    )


def _result(arm: Arm, student: Strict, seeds: int, ledger: Ledger) -> ArmResult:
    return ArmResult(
        arm=arm.name,
        regime=arm.regime,
        student=describe(student),
        accuracies=tuple(ledger.known[_job_name(arm, student, k)] for k in range(seeds)),
        epochs=arm.config.epochs,
        steps=arm.config.epochs * -(-arm.images // arm.config.batch_size),
        images=arm.images,
    )


def _alike(ours: ArmResult, control: ArmResult) -> bool:
    """Whether a difference tells something: hard labels of the set against soft ones of a control mix two effects."""
    return ours.regime != "hard" or control.regime == "hard"


def paired_differences(results: Sequence[ArmResult]) -> list[PairedDifference]:
    """For each student: the set (soft labels first) against every control, then its regimes against each other."""
    pairs = []
    for student in dict.fromkeys(result.student for result in results):
        own = [r for r in results if r.student == student]
        ours = sorted((r for r in own if r.arm == "set"), key=lambda r: r.regime, reverse=True)
        controls = [r for r in own if r.arm != "set"]
        pairs += [PairedDifference.between(a, b) for b in controls for a in ours if _alike(a, b)]
        pairs += [PairedDifference.between(ours[0], b) for b in ours[1:]]
    return pairs
