"""DSIR: documents resampled from a corpus by importance weights, so that their n-grams are those of a target.

    log w(x) = sum_b c_b(x) (ln(p_b + 1e-8) - ln(q_b + 1e-8))

with c(x) the hashed n-grams of document x, p the target's shares of the buckets and q the corpus's (Xie, Santurkar, Ma
and Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023, section 3). ngrams.py counts,
importance.py weighs, document_choice.py filters and draws; here they become a step.

What we do differently from the released package: p and q are those of all documents, where it stops after a number of
n-grams, at the first documents of each file; noise follows from the seed and a document's own place, so that neither
workers nor the order of files matter; n-grams are hashed by a fast hash unless `hash: sha256` asks for its buckets; and
the sum over n-grams may be made a mean (`by_length`), since a sum favours the long documents or the short ones.

The corpus is read three times: to count, to score, and to count the n-grams of the choice, which tells how much closer
to the target it is than the corpus (section 5: KL reduction), and than as many random documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dataselect.corpus_passes import (
    Counted,
    Features,
    count_chosen,
    count_corpus,
    models_sha256,
    score_corpus,
)
from dataselect.document_choice import Reading, Rules, choose
from dataselect.document_places import as_set, find, with_controls
from dataselect.importance import divergence, log_ratio, shares
from dataselect.ngrams import Hash
from distill.contracts import (
    CorpusFacts,
    DocumentChoice,
    DocumentContext,
    DocumentSelector,
    MethodConfig,
    TargetFacts,
)
from distill.errors import DamagedDataError, InputError
from distill.text import Corpus, Piece
from distill.training.config import NonNegative, Positive

_SUM = 1e-6  # by which proportions may miss 1
Share = Annotated[float, Field(ge=0, le=1)]


class DSIR(DocumentSelector):
    """DSIR: documents whose n-grams are those of the target."""

    name = "dsir"

    class Config(MethodConfig):
        """How many documents, and what they are compared by.

        `count` documents are kept, or a `fraction` of the corpus's. n-grams of 1 to `ngrams` words fall into `buckets`
        buckets, by the `hash`: `fast`, or `sha256`, which is the reference package's and slower. Documents of fewer
        than `min_tokens` words are left out. `smoothing` is added to every count of a target. With `by_length` a
        document's log weight is a mean over its n-grams in place of their sum; with `truncate` no weight is greater
        than the mean weight times the square root of the number of documents. Log weights are divided by `temperature`:
        above 1 the draw is spread over more documents. `noise: false` keeps the documents of the
        greatest weights in place of a random draw. `proportions` are the shares of several targets in the choice, by
        default those of their n-grams.
        """

        count: Annotated[int, Field(ge=1)] | None = None
        fraction: Annotated[float, Field(gt=0, le=1)] | None = None
        ngrams: Annotated[int, Field(ge=1, le=8)] = 2
        buckets: Annotated[int, Field(ge=2, le=1 << 24)] = 10_000
        hash: Hash = "fast"
        min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] = 100
        smoothing: NonNegative = 0.0
        by_length: bool = False
        truncate: bool = False
        temperature: Positive = 1.0
        noise: bool = True
        proportions: Annotated[dict[str, Share], Field(min_length=1)] | None = None

        @model_validator(mode="after")
        def _one_budget(self) -> Self:
            if (self.count is None) == (self.fraction is None):
                raise ValueError("give exactly one of count and fraction, and null for the other")
            return self

        @model_validator(mode="after")
        def _shares_of_all(self) -> Self:
            if self.proportions is not None and abs(sum(self.proportions.values()) - 1) > _SUM:
                raise ValueError(
                    f"the proportions add up to {sum(self.proportions.values()):g}, and not to 1"
                )
            return self

        @property
        def features(self) -> Features:
            return Features(self.ngrams, self.buckets, self.hash)

        @property
        def rules(self) -> Rules:
            return Rules(
                n=self.ngrams,
                min_tokens=self.min_tokens,
                by_length=self.by_length,
                truncate=self.truncate,
                noise=self.noise,
                temperature=self.temperature,
            )

        def budget(self, documents: int) -> int:
            """How many of so many documents are kept."""
            return self.count if self.count is not None else round((self.fraction or 0) * documents)

        @property
        def budget_option(self) -> str:
            """The option that says so."""
            return "fraction" if self.count is None else "count"

    config: Config

    def check(self, targets: Sequence[str]) -> None:
        asked = self.config.proportions
        if asked is not None and set(asked) != set(targets):
            raise InputError(
                "the proportions are not those of the targets",
                where="proportions",
                found=", ".join(asked),
                allowed=", ".join(targets),
                fix="name every target in proportions once",
            )

    def run(self, ctx: DocumentContext) -> DocumentChoice:
        config = self.config
        several = len(ctx.targets) > 1
        titles = {name: f"target {name}" if several else "target" for name in ctx.targets}
        # Those first: they are small, and what is wrong with them is told at once.
        targets = {name: _count(ctx, each, config, titles[name]) for name, each in ctx.targets.items()}
        counts, corpus = _count(ctx, ctx.corpus, config, "data")
        total = _total(config, corpus.documents)
        raw = shares(counts)
        models = {name: shares(own, smoothing=config.smoothing) for name, (own, _) in targets.items()}
        for name, (own, _) in targets.items():
            _refuse_unlike(titles[name], own, counts)
        wanted = _shared(total, targets, config)
        read = _reading(ctx, config, np.stack([log_ratio(model, raw) for model in models.values()]))
        chosen = choose(read, config.rules, wanted, seed=ctx.seed, where=config.budget_option)
        numbers, takers = with_controls(chosen, read, config.rules, wanted, seed=ctx.seed)
        found = find(ctx.corpus, config.features, read, numbers, takers, groups=2 * len(targets))
        recounted, digests = count_chosen(
            found.works, folder=ctx.scratch, pool=ctx.pool, progress=ctx.progress, passes=ctx.passes
        )
        facts = tuple(
            TargetFacts(
                name=name,
                corpus=own,
                chosen=wanted[number],
                effective=chosen.effective[number],
                kl_corpus=divergence(shares(seen), raw),
                kl_chosen=_divergence(seen, recounted[number]),
                kl_random=_divergence(seen, recounted[len(targets) + number]),
            )
            for number, (name, (seen, own)) in enumerate(targets.items())
        )
        return DocumentChoice(as_set(chosen, found, digests), corpus, chosen.passed, facts)


def _count(
    ctx: DocumentContext, corpus: Corpus, config: DSIR.Config, title: str
) -> tuple[NDArray[np.int64], CorpusFacts]:
    """N-grams of a corpus, int64 (B,), and what was found in it; refused where it holds none."""
    counts = np.zeros(config.buckets, dtype=np.int64)
    rows = documents = unreadable = 0
    worst: tuple[Piece, int, Counted] | None = None
    pieces = count_corpus(
        corpus,
        config.features,
        folder=ctx.passes.place("ngram_counts", _parts(corpus, config)),
        pool=ctx.pool,
        progress=ctx.progress,
        title=title,
        passes=ctx.passes,
    )
    for piece, row, counted in _numbered(pieces):
        counts += counted.counts
        rows += counted.rows
        documents += counted.documents
        unreadable += counted.unreadable
        if counted.unreadable and worst is None:
            worst = (piece, row + counted.first, counted)
    if worst is not None:
        _refuse_unreadable(worst, unreadable, documents, corpus, title)
        told = (
            f"{unreadable} of {unreadable + documents} rows of the {title} cannot be read, and are left out"
        )
        ctx.progress.warn(f"{told}; the first is {_place(worst)}, which {worst[2].why}")
    if not counts.any():
        raise InputError(
            f"the {title} holds no words",
            where=title.partition(" ")[0],
            found=f"documents: {documents}, rows: {rows}, files: {len(corpus.files)}",
            fix="look whether these are the files, and whether field names the text",
        )
    digest = hashlib.sha256(counts.astype("<i8").tobytes()).hexdigest()
    facts = CorpusFacts(len(corpus.files), rows, documents, unreadable, int(counts.sum()), digest)
    return counts, facts


def _numbered(pieces: Iterator[tuple[Piece, Counted]]) -> Iterator[tuple[Piece, int, Counted]]:
    """Every piece with the number of its first row in its file."""
    row, name = 0, ""
    for piece, counted in pieces:
        if piece.file.name != name:
            row, name = 0, piece.file.name
        yield piece, row, counted
        row += counted.rows


def _place(worst: tuple[Piece, int, Counted]) -> str:
    piece, row, _ = worst
    return f"{piece.file.path}, {'row' if piece.file.format == 'parquet' else 'line'} {row + 1}"


def _refuse_unreadable(
    worst: tuple[Piece, int, Counted], unreadable: int, documents: int, corpus: Corpus, title: str
) -> None:
    """Raise where more rows cannot be read than may be: InputError where none can."""
    most = corpus.config.bad_lines
    if unreadable <= most * (unreadable + documents):
        return
    kind = DamagedDataError if documents else InputError
    raise kind(
        f"too many rows of the {title} cannot be read; the first of them {worst[2].why}",
        where=_place(worst),
        found=f"{unreadable} of {unreadable + documents} rows",
        allowed=f"a share of at most {most:g}",
        fix="name the text with field, mend the file or leave it out, or raise bad_lines",
    )


def _total(config: DSIR.Config, documents: int) -> int:
    """The budget; refused where it is more than there is, or nothing."""
    total = config.budget(documents)
    if total < 1 or total > documents:
        raise InputError(
            f"{total} documents are asked for, and the corpus holds {documents}",
            where=config.budget_option,
            found=f"{config.fraction:g}" if config.count is None else str(total),
            allowed=f"1 to {documents} documents"
            if config.count is not None
            else f"at least {1 / max(documents, 1):.3g}, which is one document",
        )
    return total


def _refuse_unlike(title: str, target: NDArray[np.int64], corpus: NDArray[np.int64]) -> None:
    if not ((target > 0) & (corpus > 0)).any():
        raise InputError(
            f"the {title} shares no n-gram with the data: every document would be as unlike it",
            where="target",
            found=f"{int((target > 0).sum())} buckets of the target, {int((corpus > 0).sum())} of the data",
            fix="look whether both are text of one language and form",
        )


def _shared(
    total: int, targets: Mapping[str, tuple[NDArray[np.int64], CorpusFacts]], config: DSIR.Config
) -> list[int]:
    """How many documents each target takes: its share, rounded down; the last one what remains."""
    parts = config.proportions or {name: facts.ngrams for name, (_, facts) in targets.items()}
    every = sum(parts.values())
    counts: list[int] = []
    for name in targets:
        counts.append(min(int(total * parts[name] / every + _SUM), total - sum(counts)))
    return [*counts[:-1], total - sum(counts[:-1])]


def _reading(ctx: DocumentContext, config: DSIR.Config, models: NDArray[np.float64]) -> Reading:
    """The scores of the corpus, as often as they are asked for; computed once."""
    parts = {**_parts(ctx.corpus, config), "models": models_sha256(models)}
    return score_corpus(
        ctx.corpus,
        config.features,
        models,
        folder=ctx.passes.place("ngram_scores", parts),
        pool=ctx.pool,
        progress=ctx.progress,
        passes=ctx.passes,
    )


def _parts(corpus: Corpus, config: DSIR.Config) -> dict[str, Any]:
    """What a pass over the corpus depends on, and what tells people of it."""
    read = corpus.config
    return {
        "corpus": corpus.identity,
        "files": len(corpus.files),
        "bytes": sum(file.size for file in corpus.files),
        "pieces": len(corpus.pieces()),
        "read": {"field": read.field, "document": read.document, "document_bytes": read.document_bytes},
        **asdict(config.features),
    }


def _divergence(target: NDArray[np.int64], other: NDArray[np.int64]) -> float | None:
    """KL of counted n-grams, of the target as it is, without smoothing; None where the others are none."""
    return divergence(shares(target), shares(other)) if other.any() else None
