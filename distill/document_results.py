"""What a selection of documents found, and its report.json: the only place that knows the report's names.

Names are stable, as those of `evaluation.results` are. Divergences are in nats, seconds are wall time, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from distill.contracts import CorpusFacts, DocumentChoice, TargetFacts
from distill.errors import DamagedDataError
from distill.evaluation.results import StageCost

VERSION = 1
KIND = "documents"
_TARGET = ("name", "chosen", "effective", "kl_corpus", "kl_chosen", "kl_random")


@dataclass(frozen=True)
class Example:
    """A document of the set, for people to look at.

    Args:
        target: that it was taken for.
        score: its log importance weight.
        place: file and row.
        text: its beginning.
    """

    target: str
    score: float
    place: str
    text: str


@dataclass(frozen=True)
class DocumentReport:
    """Everything that report.json, the table and the page of a selection of documents tell.

    Args:
        chosen: documents of the set.
        passed: documents that passed the filter.
        corpus: what was found in the corpus.
        targets: each target, and what was chosen for it.
        bytes: size of the set.
        examples: some of the documents.
        cost: by stage, in the order of the run.
        recipe: merged recipe, JSON-able.
        environment: machine, versions, device and time, JSON-able.
        notes: what a reader must know.
    """

    chosen: int
    passed: int
    corpus: CorpusFacts
    targets: tuple[TargetFacts, ...]
    bytes: int
    examples: tuple[Example, ...] = ()
    cost: Mapping[str, StageCost] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kl_reduction(self) -> float | None:
        """Mean over the targets (Xie et al., section 5); None where one has no n-gram of a choice."""
        each = [target.kl_reduction for target in self.targets]
        told = [reduction for reduction in each if reduction is not None]
        return sum(told) / len(each) if len(told) == len(each) else None


def facts_of(choice: DocumentChoice) -> dict[str, Any]:
    """JSON-able facts of a choice, which its set keeps."""
    return {
        "corpus": asdict(choice.corpus),
        "passed": choice.passed,
        "targets": [_target_row(target) for target in choice.targets],
    }


def to_report(report: DocumentReport) -> dict[str, Any]:
    """The JSON-able form of a report, by the stable names of report.json."""
    return {
        "version": VERSION,
        "kind": KIND,
        "chosen": report.chosen,
        "passed": report.passed,
        "kl_reduction": report.kl_reduction,
        "corpus": asdict(report.corpus),
        "targets": [_target_row(target) for target in report.targets],
        "bytes": {"total": report.bytes},
        "examples": [asdict(example) for example in report.examples],
        "cost": {stage: asdict(cost) for stage, cost in report.cost.items()},
        "recipe": dict(report.recipe),
        "environment": dict(report.environment),
        "notes": list(report.notes),
    }


def from_report(report: Mapping[str, Any], *, where: str) -> DocumentReport:
    """The report that `to_report` wrote.

    Raises:
        DamagedDataError: another kind or version, a missing name, or an impossible value.
    """
    if not isinstance(report, Mapping) or (report.get("version"), report.get("kind")) != (VERSION, KIND):
        raise DamagedDataError(
            "not a report on documents of this version", where=where, allowed=f"{KIND}, {VERSION}"
        )
    try:
        return DocumentReport(
            chosen=report["chosen"],
            passed=report["passed"],
            corpus=CorpusFacts(**report["corpus"]),
            targets=tuple(_read_target(row) for row in report["targets"]),
            bytes=report["bytes"]["total"],
            examples=tuple(Example(**row) for row in report["examples"]),
            cost={stage: StageCost(**cost) for stage, cost in report["cost"].items()},
            recipe=dict(report["recipe"]),
            environment=dict(report["environment"]),
            notes=tuple(report["notes"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedDataError(
            "the report is damaged",
            where=where,
            found=f"{type(error).__name__}: {error}",
            fix="run again with --fresh",
        ) from error


def _target_row(target: TargetFacts) -> dict[str, Any]:
    return {**asdict(target), "kl_reduction": target.kl_reduction}


def _read_target(row: Mapping[str, Any]) -> TargetFacts:
    own = {name: row[name] for name in _TARGET}
    return TargetFacts(corpus=CorpusFacts(**row["corpus"]), **own)
