"""The road of `distill run` over text: recipe -> corpus and targets -> documents chosen -> set.h5 -> report.

Passes over the corpus leave one file a piece in the cache, so that an interrupted run goes on where it was, and another
choice from the same corpus begins where this one ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distill.cache.folder import default_folder
from distill.cache.text_passes import TextPasses
from distill.contracts import DocumentChoice, DocumentContext, DocumentSelector, DocumentSet, Progress
from distill.costs import Costs, PoolWorkers
from distill.document_checks import check_readable
from distill.document_results import DocumentReport, Example, facts_of
from distill.environment import code_revision, machine, versions
from distill.exporting.documents import Written, corpus_of, write_chosen
from distill.files import PARTIAL, disk_errors
from distill.parallel import open_pool
from distill.portable import without_paths
from distill.recipe import Recipe, as_dict
from distill.report.documents import write_report
from distill.run_folder import RunFolder, State
from distill.step_checks import step_named
from distill.store.reader import read_documents
from distill.store.writer import write_documents
from distill.text import Corpus
from distill.text.data import TextConfig, TextTargetConfig
from distill.text.records import read_records
from distill.training.engine import worker_count

_SHOWN = 3  # examples of a target
_LETTERS = 400  # of an example


def run_documents(
    recipe: Recipe, step: DocumentSelector, folder: RunFolder, progress: Progress, *, state: State
) -> DocumentReport:
    """Choose documents, write the set and its report.

    Raises:
        DistillError: with an exit code and what to do; see `distill.errors`.
    """
    corpus, targets = open_corpora(recipe)
    origin = _origin(corpus, targets)
    if state == "interrupted":
        folder.refuse_other_origin(origin)
    else:
        folder.keep_origin(origin)
    scratch = folder.scratch(0)
    with disk_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
    with open_pool(recipe.engine, workers=worker_count()) as pool:
        costs = Costs(PoolWorkers(pool))
        with costs.stage(f"selector {step.name}"), step_named(0, step):
            cache = Path(recipe.cache.folder) if recipe.cache.folder else default_folder()
            passes = TextPasses(cache, costs=costs)
            ctx = DocumentContext(recipe.seed, corpus, targets, pool, passes, progress, scratch)
            choice = step.run(ctx)
        documents = _finished(choice, recipe, corpus, targets)
        write_documents(documents, folder.set)
    progress.note(f"wrote {folder.set}", documents=len(documents))
    report = _report(choice, documents, corpus, recipe, folder, costs)
    write_report(report, json_path=folder.report_json, html_path=folder.report_html)
    return report


def materialise(folder: RunFolder, form: Written, progress: Progress) -> Path:
    """Write the documents of the run's set beside it, where they are not yet.

    Returns:
        The file.

    Raises:
        InputError: the corpus is not what it was.
    """
    path = folder.documents(form)
    for begun in folder.root.glob(f".documents.*{PARTIAL}"):  # nobody else writes in a locked folder
        begun.unlink(missing_ok=True)
    if not path.exists():
        documents = read_documents(folder.set)
        write_chosen(
            documents, corpus_of(documents, folder.set, (), progress), path, to=form, progress=progress
        )
    return path


def open_corpora(recipe: Recipe) -> tuple[Corpus, dict[str, Corpus]]:
    """The corpus and the targets of a recipe of text.

    Raises:
        InputError: files that are not there, or none of whose first rows can be read.
    """
    assert isinstance(recipe.data, TextConfig) and isinstance(recipe.target, TextTargetConfig), (
        "a checked recipe"
    )
    corpus, targets = recipe.data.open(), recipe.target.open_targets()
    check_readable(corpus, where="data")
    for each in targets.values():
        check_readable(each, where="target")
    return corpus, targets


def _origin(corpus: Corpus, targets: Mapping[str, Corpus]) -> dict[str, Any]:
    """Everything besides the recipe that decides a run's results."""
    return {
        "data": {
            "corpus": corpus.identity,
            **{f"target {name}": each.identity for name, each in targets.items()},
        },
        "versions": versions(),
        "code": code_revision(),
    }


def _finished(
    choice: DocumentChoice, recipe: Recipe, corpus: Corpus, targets: Mapping[str, Corpus]
) -> DocumentSet:
    """The set with what was found and its provenance: nothing of one machine or moment."""
    provenance = {
        "recipe": without_paths(recipe),
        "seed": recipe.seed,
        "source": {"name": "text", "identity": corpus.identity},
        "targets": {name: {"identity": each.identity} for name, each in targets.items()},
        "versions": versions(),
        "code": code_revision(),
    }
    meta = {"score": "log importance weight", **facts_of(choice)}
    selection = replace(choice.documents.selection, meta=meta)
    return replace(choice.documents, selection=selection, provenance=provenance)


def _report(
    choice: DocumentChoice,
    documents: DocumentSet,
    corpus: Corpus,
    recipe: Recipe,
    folder: RunFolder,
    costs: Costs,
) -> DocumentReport:
    return DocumentReport(
        chosen=len(documents),
        passed=choice.passed,
        corpus=choice.corpus,
        targets=choice.targets,
        bytes=folder.set.stat().st_size,
        examples=tuple(_examples(choice, documents, corpus)),
        cost=dict(costs.stages),
        recipe=as_dict(recipe),
        environment=machine(torch.device("cpu")),
        notes=tuple(_notes(choice)),
    )


def _notes(choice: DocumentChoice) -> Iterator[str]:
    """What a reader of the report must know of the choice."""
    for target in choice.targets:
        if target.effective < target.chosen / 10:
            yield (
                f"{target.name}: the weights are worth {target.effective:,.1f} equally weighted documents, and "
                f"{target.chosen:,} were taken: mostly those of the greatest weights, whatever the seed. A higher "
                "temperature spreads the draw."
            )
        if (
            target.kl_random is not None
            and target.kl_chosen is not None
            and target.kl_chosen > target.kl_random
        ):
            yield (
                f"{target.name}: the choice is farther from the target than random documents are. It may be narrower "
                "than the target: look at the documents below; a larger fraction or a higher temperature widens it."
            )


def _examples(choice: DocumentChoice, documents: DocumentSet, corpus: Corpus) -> Iterator[Example]:
    """The first documents that each target took."""
    by_name = {file.name: file for file in corpus.files}
    first = 0
    for target in choice.targets:
        for number in range(first, first + min(_SHOWN, target.chosen)):
            name, row = documents.files[documents.file[number]], int(documents.row[number])
            record = next(read_records(by_name[name], corpus.config, np.array([row])))
            text = record.text if len(record.text) <= _LETTERS else f"{record.text[:_LETTERS]} ..."
            score = float(documents.selection.scores[number])
            yield Example(target.name, score, f"{name}, row {row}", text)
        first += target.chosen
