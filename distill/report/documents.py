"""The table and the page of a selection of documents."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from distill.contracts import TargetFacts
from distill.document_results import DocumentReport, Example, to_report
from distill.files import write_bytes_atomically
from distill.report.page import cost_section, details, notes_section, page, quiet, section, table_of
from distill.report.quantities import size
from distill.report.tables import Table, as_text, cost_table, counted, wrapped

_KL = (
    "KL divergence of the target's n-grams from those of the corpus, of as many random documents that are long enough, "
    "and of the choice, in nats; the reduction is from the corpus to the choice. Few documents lack many of a corpus's "
    "n-grams, random ones as well: compare those. The effective sample size tells how many equally weighted documents "
    "the weights are worth."
)
_EXAMPLES = "Of each target the first that were taken; their beginnings. Rows count from 0, as in the set."


def write_report(report: DocumentReport, *, json_path: Path, html_path: Path) -> None:
    """Write report.json, by its stable names, and the page.

    Raises:
        InputError: the folder is not writable, or the disk is full.
    """
    text = json.dumps(to_report(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomically(json_path, f"{text}\n".encode("utf-8", "backslashreplace"))
    write_bytes_atomically(html_path, _render_page(report).encode("utf-8", "backslashreplace"))


def render(report: DocumentReport) -> str:
    """The plain text that ends a run; no newline at its end."""
    facts = "\n".join(f"  {name:<12}{value}" for name, value in _facts(report))
    parts = [verdict(report), f"Documents\n{facts}", as_text(target_table(report))]
    if report.cost:
        parts.append(as_text(cost_table(report.cost)))
    if report.notes:
        parts.append("Notes\n" + "\n".join(wrapped(note) for note in report.notes))
    return "\n\n".join(parts)


def verdict(report: DocumentReport) -> str:
    """The one sentence that a selection comes down to: beside as many random documents, whose n-grams lack as much."""
    told = f"{report.chosen:,} of {counted(report.corpus.documents, 'document')}"
    each = [
        target.kl_random - target.kl_chosen
        for target in report.targets
        if target.kl_random is not None and target.kl_chosen is not None
    ]
    if len(each) < len(report.targets):
        return f"{told} chosen; some of them have no n-gram, so that nothing tells how close they are."
    mean = sum(each) / len(each)
    of = "the target" if len(each) == 1 else f"the {len(each)} targets, in the mean,"
    nearer = "closer to" if mean > 0 else "farther from"
    return f"{told}: their n-grams are {abs(mean):.3f} nats {nearer} {of} than as many random documents'."


def target_table(report: DocumentReport) -> Table:
    """One row a target."""
    numbers = (
        "documents of it",
        "chosen",
        "KL corpus",
        "KL random",
        "KL choice",
        "reduction",
        "effective size",
    )
    return Table(
        "Closeness to the target" + ("s" if len(report.targets) > 1 else ""),
        ("target", *numbers),
        tuple(_target_row(target) for target in report.targets),
        right=frozenset(numbers),
    )


def _target_row(target: TargetFacts) -> tuple[str, ...]:
    def nats(value: float | None) -> str:
        return "none" if value is None else f"{value:.3f}"

    return (
        target.name,
        f"{target.corpus.documents:,}",
        f"{target.chosen:,}",
        nats(target.kl_corpus),
        nats(target.kl_random),
        nats(target.kl_chosen),
        nats(target.kl_reduction),
        f"{target.effective:,.1f}",
    )


def _facts(report: DocumentReport) -> list[tuple[str, str]]:
    corpus = report.corpus
    least = _least_tokens(report)
    facts = [
        ("corpus", f"{counted(corpus.documents, 'document')} in {counted(corpus.files, 'file')}"),
        ("n-grams", f"{corpus.ngrams:,}"),
        ("long enough", f"{report.passed:,}" + (f", of {least} tokens or more" if least is not None else "")),
        ("chosen", f"{report.chosen:,}"),
        ("set", size(report.bytes)),
    ]
    if corpus.unreadable:
        facts.insert(1, ("unreadable", f"{corpus.unreadable:,} rows, left out"))
    return facts


def _least_tokens(report: DocumentReport) -> int | None:
    """What the recipe's step says of documents that are too short, where it does."""
    for step in report.recipe.get("steps", []):
        for options in step.values():
            return options.get("min_tokens") if isinstance(options, dict) else None
    return None


def _render_page(report: DocumentReport) -> str:
    recipe = report.recipe
    steps = ", ".join(name for step in recipe["steps"] for name in step)
    table = target_table(report)
    return page(
        f"{recipe['data']['name']}: {steps}",
        verdict(report),
        [
            section("Documents", _boxes(report)),
            section(table.title, table_of(table), quiet(_KL)),
            _examples(report),
            cost_section(report.cost),
            notes_section(report.notes),
            details({"Recipe, every default filled in": recipe}, report.environment),
        ],
    )


def _boxes(report: DocumentReport) -> str:
    corpus = report.corpus
    parts = [
        (f"{corpus.documents:,}", f"in {counted(corpus.files, 'file')}", ""),
        (f"{report.passed:,}", "long enough", ""),
        (f"{report.chosen:,}", "chosen", "whole"),
        (size(report.bytes), "set.h5, without texts", ""),
    ]
    if corpus.unreadable:
        parts.insert(1, (f"{corpus.unreadable:,}", "rows unreadable", ""))
    boxes = "".join(
        f'<div class="{kind}"><b>{escape(number)}</b><span>{escape(name)}</span></div>'
        for number, name, kind in parts
    )
    return f'<div class="stats">{boxes}</div>'


def _examples(report: DocumentReport) -> str:
    if not report.examples:
        return ""
    cards = "".join(
        f'<div class="card document"><p class="quiet">{escape(_caption(example))}</p>'
        f"<p>{escape(example.text)}</p></div>"
        for example in report.examples
    )
    return section("Some of the chosen", cards, quiet(_EXAMPLES))


def _caption(example: Example) -> str:
    return f"{example.target}: {example.place}, log weight {example.score:.1f}"
