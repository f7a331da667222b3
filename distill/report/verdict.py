"""The one sentence that an evaluation comes down to."""

from __future__ import annotations

from distill.evaluation.results import ArmResult, Evaluation, PairedDifference
from distill.report.quantities import with_interval
from distill.report.tables import tested_on


def verdict(evaluation: Evaluation) -> str:
    """What the set reaches, against random real images of the same number and against the full data.

    The comparison is the evaluation's first between `set` and `random_target`, or, without such a control, `random`:
    picked by place, not by result.
    "No measurable difference" is said where the paired interval holds 0. One that is wider than the whole scale is not
    quoted: it tells that the seeds are too few. The epochs on the full data are told: they take about the optimiser
    steps of the set, but at least one epoch.

    Returns:
        Plain text, one sentence; it must still be escaped for HTML.
    """
    pair = _first_pair(evaluation)
    ours = _arm(evaluation, "set", pair.regime if pair else None, pair.student if pair else None)
    if ours is None:
        return "The set was not evaluated."
    quoted = [ours]
    told = f"{_amount(evaluation, ours)} with {ours.regime} labels reach {_accuracy(ours)}"
    told += tested_on(evaluation)
    control = None if pair is None else _arm(evaluation, pair.arm_b, pair.regime_b, pair.student)
    if pair is not None and control is not None:
        told += f"{_relation(pair)} {_accuracy(control)}"
        quoted.append(control)
    full = _arm(evaluation, "full", None, ours.student)
    if full is not None:
        told += f"; full data in {full.epochs} epoch{'' if full.epochs == 1 else 's'} {_accuracy(full)}"
        quoted.append(full)
    if any(each.too_few_seeds for each in quoted) and not (pair is not None and pair.too_few_seeds):
        told += "; too few seeds for an interval"
    return f"{told}."


def _first_pair(evaluation: Evaluation) -> PairedDifference | None:
    """The comparison that the headline quotes."""
    controls = [
        p
        for arm in ("random_target", "random")
        for p in evaluation.paired
        if (p.arm_a, p.arm_b) == ("set", arm)
    ]
    return controls[0] if controls else None


def _arm(evaluation: Evaluation, arm: str, regime: str | None, student: str | None) -> ArmResult | None:
    """The first result of `arm` in this regime on this student; None stands for any."""
    for result in evaluation.results:
        if result.arm == arm and regime in (None, result.regime) and student in (None, result.student):
            return result
    return None


def _accuracy(result: ArmResult) -> str:
    return with_interval(result.accuracy_mean, result.told_ci95)


def _amount(evaluation: Evaluation, ours: ArmResult) -> str:
    """How many images: of each class, where all classes have as many."""
    counts = set(evaluation.images_per_class)
    number, each = (counts.pop(), " per class") if len(counts) == 1 else (ours.images, "")
    return f"{number} image{'' if number == 1 else 's'}{each}"


def _relation(pair: PairedDifference) -> str:
    whose = "hard labels" if pair.regime_b == "hard" else "labels of the same teachers"
    kind = " of the target's classes" if pair.arm_b == "random_target" else ""
    control = f"as many random real images{kind} with {whose}"
    if len(pair.differences) == 1:
        return f", one seed only, where {control} reach"
    if pair.identical and pair.difference_mean:
        return f", identical differences for every seed, where {control} reach"
    if pair.too_few_seeds:
        return f", too few seeds to tell a difference, where {control} reach"
    if not pair.excludes_zero:
        return f", no measurable difference from {control} at"
    return f" where {control} reach" if pair.difference_mean > 0 else f", worse than {control} at"
