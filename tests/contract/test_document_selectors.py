"""What every registered selector of documents keeps, built in or installed, whatever it does inside.

A selector needs a row in `CASES`: its smallest useful configuration.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from distill.cache.text_passes import TextPasses
from distill.contracts import DocumentChoice, DocumentContext, DocumentSelector
from distill.errors import InputError
from distill.parallel.local import LocalPool
from distill.progress import NullProgress
from distill.registry import methods
from distill.store.checks import check_documents
from distill.store.writer import write_documents
from distill.text import Corpus, CorpusConfig, find_files

# A configuration that keeps 12 documents of the corpus below.
CASES: dict[str, Mapping[str, Any]] = {"dsir": {"count": 12, "min_tokens": 5, "ngrams": 1, "buckets": 50}}

WORDS = [f"w{number}" for number in range(60)]
MakeContext = Callable[..., DocumentContext]
every_selector = pytest.mark.parametrize("name", sorted(CASES))


class CountedPool(LocalPool):
    """Knows how often it was asked, and can break off."""

    def __init__(self, count: int, stop_after: int | None = None) -> None:
        super().__init__(count)
        self.asked = 0
        self.stop_after = stop_after

    def each(
        self, function: Callable[..., Any], items: Sequence[Any], *, doing: str
    ) -> Iterator[tuple[int, Any]]:
        for found in super().each(function, items, doing=doing):
            if self.asked == self.stop_after:
                raise KeyboardInterrupt
            self.asked += 1
            yield found


def written(folder: Path, texts: Sequence[str], files: int) -> Corpus:
    """The texts in files of like length, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.array(texts, dtype=object), files)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{number}.jsonl").write_text(lines)
    return find_files(CorpusConfig(files=[str(folder)]), where="data.files")


def sentences(count: int, first: int, seed: int) -> list[str]:
    """Documents of 10 to 30 words, most of them from `first` on."""
    rng = np.random.default_rng(seed)
    shares = np.ones(len(WORDS))
    shares[first : first + 20] = 10
    return [" ".join(rng.choice(WORDS, rng.integers(10, 30), p=shares / shares.sum())) for _ in range(count)]


@pytest.fixture
def make_context(tmp_path: Path, text_passes: Callable[[Path], TextPasses]) -> MakeContext:
    """90 documents in three files, a third of them like the target."""
    texts = [*sentences(30, 0, 0), *sentences(60, 30, 1)]
    order = np.random.default_rng(3).permutation(90)
    corpus = written(tmp_path / "corpus", [texts[number] for number in order], files=3)
    target = written(tmp_path / "target", sentences(20, 0, 2), files=1)

    def make(*, seed: int = 0, pool: LocalPool | None = None, cache: str = "cache") -> DocumentContext:
        number = len(list(tmp_path.glob("scratch-*")))
        scratch = tmp_path / f"scratch-{number}"
        scratch.mkdir()
        passes = text_passes(tmp_path / cache)
        return DocumentContext(
            seed, corpus, {"target": target}, pool or LocalPool(1), passes, NullProgress(), scratch
        )

    return make


def build(name: str, **more: Any) -> DocumentSelector:
    cls = methods()[name].load()
    return cast(DocumentSelector, cls(cls.Config.model_validate_json(json.dumps({**CASES[name], **more}))))


def run(name: str, ctx: DocumentContext) -> DocumentChoice:
    selector = build(name)
    selector.check(tuple(ctx.targets))
    return selector.run(ctx)


def content(choice: DocumentChoice, ctx: DocumentContext) -> bytes:
    path = ctx.scratch / "set.h5"
    write_documents(choice.documents, path)
    return path.read_bytes()


def test_every_selector_of_documents_has_a_case() -> None:
    registered = {name for name, entry in methods().items() if issubclass(entry.load(), DocumentSelector)}
    assert registered == CASES.keys()


@every_selector
def test_the_class_says_what_the_registry_says(name: str) -> None:
    entry = methods()[name]
    cls = entry.load()
    assert (cls.name, cls.kind) == (name, entry.kind)
    assert entry.summary and (cls.__doc__ or "").strip() and cls.Config.__doc__


@every_selector
def test_the_result_is_sound_and_the_budget_kept(name: str, make_context: MakeContext) -> None:
    ctx = make_context()
    choice = run(name, ctx)
    documents = choice.documents
    check_documents(documents)
    assert len(documents) == 12 == sum(target.chosen for target in choice.targets)
    assert documents.selection.indices.max() < choice.corpus.rows == 90
    rows = {file.name: len(file.path.read_text().splitlines()) for file in ctx.corpus.files}
    first = np.cumsum([0, *(rows[name] for name in sorted(rows))])
    for index, file, row in zip(documents.selection.indices, documents.file, documents.row, strict=True):
        number = sorted(rows).index(documents.files[file])
        assert index == first[number] + row and row < rows[documents.files[file]]
    assert np.isfinite(documents.selection.scores).all()
    (target,) = choice.targets
    assert target.kl_chosen is not None and target.kl_random is not None
    assert target.kl_chosen < target.kl_random


@every_selector
def test_same_seed_same_bytes_whoever_works_and_whatever_is_known(
    name: str, make_context: MakeContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_context(seed=5)
    wanted = content(run(name, first), first)
    torch.manual_seed(2)  # global generators have no say
    np.random.seed(2)
    for cache in ("cache", "other"):
        with LocalPool(2) as pool:
            ctx = make_context(seed=5, pool=pool, cache=cache)
            assert content(run(name, ctx), ctx) == wanted
    monkeypatch.setattr(Corpus.pieces, "__kwdefaults__", {"piece_bytes": 500})
    ctx = make_context(seed=5, cache="third")
    assert len(ctx.corpus.pieces()) > 10
    assert content(run(name, ctx), ctx) == wanted


@every_selector
def test_another_seed_draws_others(name: str, make_context: MakeContext) -> None:
    results = set()
    for seed in range(3):
        ctx = make_context(seed=seed)
        results.add(content(run(name, ctx), ctx))
    assert len(results) > 1


@every_selector
def test_an_interrupted_run_goes_on_to_the_same_bytes(name: str, make_context: MakeContext) -> None:
    whole = make_context()
    wanted, counted = content(run(name, whole), whole), CountedPool(1)
    run(name, make_context(pool=counted, cache="counted"))
    for stop in range(counted.asked):
        with pytest.raises(KeyboardInterrupt):
            run(name, make_context(pool=CountedPool(1, stop), cache=f"cut {stop}"))
        again = make_context(cache=f"cut {stop}", pool=CountedPool(1))
        assert content(run(name, again), again) == wanted
        assert cast(CountedPool, again.pool).asked < counted.asked or stop == 0


@every_selector
def test_more_than_there_are_is_refused(name: str, make_context: MakeContext) -> None:
    ctx = make_context()
    with pytest.raises(InputError, match="documents are asked for"):
        build(name, count=91).run(ctx)


@every_selector
def test_the_files_are_not_written_to(name: str, make_context: MakeContext) -> None:
    ctx = make_context()
    before = [(file.path.read_bytes(), file.path.stat().st_mtime_ns) for file in ctx.corpus.files]
    run(name, ctx)
    assert before == [(file.path.read_bytes(), file.path.stat().st_mtime_ns) for file in ctx.corpus.files]


@every_selector
def test_a_file_that_changes_after_it_was_found_ends_the_run(name: str, make_context: MakeContext) -> None:
    ctx = make_context()
    file = replace(ctx.corpus.files[0], changed=0)
    changed = replace(ctx, corpus=replace(ctx.corpus, files=(file, *ctx.corpus.files[1:])))
    with pytest.raises(InputError, match="has changed since the run began"):
        run(name, changed)


@every_selector
@pytest.mark.parametrize(
    "options",
    [
        {"unheard": 1},
        {"count": None},
        {"count": 0},
        {"count": 2.5},
        {"count": None, "fraction": 0},
        {"count": None, "fraction": 1.5},
        {"fraction": 0.5},
        {"ngrams": 0},
        {"ngrams": 9},
        {"buckets": 1},
        {"hash": "md5"},
        {"min_tokens": -1},
        {"smoothing": -1},
        {"proportions": {}},
        {"proportions": {"a": 0.5, "b": 0.6}},
    ],
    ids=str,
)
def test_bad_options_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build(name, **options)
