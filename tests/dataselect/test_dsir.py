"""DSIR as a step: against a slow form, the reference package's numbers, a planted mixture; and what it refuses."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dataselect.dsir import DSIR, _shared
from distill.cache.text_passes import TextPasses
from distill.contracts import CorpusFacts, DocumentChoice, DocumentContext
from distill.errors import DamagedDataError, InputError
from distill.parallel.local import LocalPool
from distill.progress import NullProgress
from distill.text import Corpus, CorpusConfig, find_files

Choose = Callable[..., DocumentChoice]
TOY = {"hash": "sha256", "noise": False}


class Warnings(NullProgress):
    """Keeps what is warned of."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def warn(self, text: str, **facts: Any) -> None:
        self.told.append(text)


@pytest.fixture
def warnings() -> Warnings:
    return Warnings()


@pytest.fixture
def choose(tmp_path: Path, warnings: Warnings, text_passes: Callable[[Path], TextPasses]) -> Choose:
    """choose(data, target or {name: target}, **options of the step); every call has a folder of its own."""
    runs = 0

    def choose(
        data: Path,
        targets: Path | Mapping[str, Path],
        *,
        seed: int = 0,
        read: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> DocumentChoice:
        nonlocal runs
        runs += 1
        scratch = tmp_path / f"scratch-{runs}"
        scratch.mkdir()
        named = {"target": targets} if isinstance(targets, Path) else targets
        step = DSIR(DSIR.Config.model_validate(options))
        step.check(tuple(named))
        opened = {name: corpus_of(path, read, "target.files") for name, path in named.items()}
        corpus = corpus_of(data, read, "data.files")
        passes = text_passes(scratch / "cache")
        return step.run(DocumentContext(seed, corpus, opened, LocalPool(1), passes, warnings, scratch))

    return choose


def corpus_of(path: Path, read: Mapping[str, Any] | None, where: str) -> Corpus:
    return find_files(CorpusConfig(files=[str(path)], **(read or {})), where=where)


def write(path: Path, texts: Sequence[str | None]) -> Path:
    """Lines of JSON; None is an empty line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["" if text is None else json.dumps({"text": text}) for text in texts]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


# The slow form: Python's own `re` and hashlib, one document at a time.


def counts_of(text: str, *, n: int, buckets: int) -> NDArray[np.float64]:
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    found = Counter(
        int.from_bytes(sha256(" ".join(words[place : place + i]).encode()).digest(), "big") % buckets
        for i in range(1, n + 1)
        for place in range(len(words) - i + 1)
    )
    counts = np.zeros(buckets)
    for bucket, count in found.items():
        counts[bucket] = count
    return counts


def slow_scores(
    texts: Sequence[str], target: Sequence[str], *, n: int, buckets: int, smoothing: float = 0.0
) -> NDArray[np.float64]:
    every = np.stack([counts_of(text, n=n, buckets=buckets) for text in texts])
    wanted = sum(counts_of(text, n=n, buckets=buckets) for text in target) + smoothing
    p, q = wanted / wanted.sum(), every.sum(axis=0) / every.sum()
    return np.array([counts @ (np.log(p + 1e-8) - np.log(q + 1e-8)) for counts in every])


def slow_divergence(target: Sequence[str], other: Sequence[str], *, n: int, buckets: int) -> float:
    p, q = (sum(counts_of(text, n=n, buckets=buckets) for text in texts) for texts in (target, other))
    p, q = p / p.sum(), q / q.sum()
    there = p > 0
    return float((p[there] * (np.log(p[there] + 1e-8) - np.log(q[there] + 1e-8))).sum())


def some_texts(count: int, seed: int, *, words: int = 60, longest: int = 40) -> list[str]:
    """Documents of 1 to `longest` words of a vocabulary whose words are seldom and often; some are no ASCII."""
    rng = np.random.default_rng(seed)
    known = [f"w{number}" if number % 7 else f"é{number}," for number in range(words)]
    share = rng.dirichlet(np.full(words, 0.3))
    return [" ".join(rng.choice(known, rng.integers(1, longest + 1), p=share)) for _ in range(count)]


@pytest.mark.parametrize(("n", "smoothing"), [(1, 0.0), (2, 0.5), (3, 0.0)])
def test_the_choice_is_that_of_a_slow_form(n: int, smoothing: float, choose: Choose, tmp_path: Path) -> None:
    texts, wanted = some_texts(60, 0), some_texts(6, 1)
    lines: list[str | None] = [*texts[:20], None, None, *texts[20:]]
    data, target = write(tmp_path / "data.jsonl", lines), write(tmp_path / "target.jsonl", wanted)
    buckets = 300
    options = {"ngrams": n, "buckets": buckets, "hash": "sha256", "smoothing": smoothing, "min_tokens": 0}
    found = choose(data, target, count=60, noise=False, **options)
    scores = slow_scores(texts, wanted, n=n, buckets=buckets, smoothing=smoothing)
    rows = np.array([row + 2 * (row >= 20) for row in range(60)])
    order = np.argsort(-scores, kind="stable")
    documents = found.documents
    assert documents.row.tolist() == rows[order].tolist()
    assert documents.selection.indices.tolist() == rows[order].tolist()
    assert documents.selection.scores == pytest.approx(scores[order], rel=1e-5, abs=1e-4)
    assert (documents.selection.weights == 1).all() and documents.files == ("data.jsonl",)
    assert (found.corpus.rows, found.corpus.documents, found.passed) == (62, 60, 60)

    (facts,) = choose(data, target, count=9, noise=False, **options).targets
    taken = [texts[place] for place in order[:9]]
    if not smoothing:
        assert facts.kl_corpus == pytest.approx(slow_divergence(wanted, texts, n=n, buckets=buckets))
        assert facts.kl_chosen == pytest.approx(slow_divergence(wanted, taken, n=n, buckets=buckets))
    weights = np.exp(scores - scores.max())
    assert facts.effective == pytest.approx(weights.sum() ** 2 / (weights**2).sum())


# The reference package's toy files; the numbers are those of its own code, with Python's `re` for words.


@pytest.fixture
def toy(shared_data: Path) -> Path:
    return shared_data / "dsir_toy"


@pytest.fixture
def toy_twice(toy: Path, tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / "twice").mkdir(exist_ok=True)
        (tmp_path / "twice" / f"{name}.jsonl").write_bytes((toy / "toy_pile_data.jsonl").read_bytes())
    return tmp_path / "twice"


CONTENTS = {"field": "contents"}


def test_the_reference_package_s_numbers(choose: Choose, toy: Path) -> None:
    data, target = toy / "toy_pile_data.jsonl", toy / "toy_target_data.jsonl"
    every = choose(data, target, read=CONTENTS, count=1000, min_tokens=0, **TOY)
    scores = every.documents.selection.scores
    assert every.documents.row[:5].tolist() == [0, 35, 748, 756, 67]
    first = {row: scores[place] for place, row in enumerate(every.documents.row.tolist()) if row < 5}
    assert [first[row] for row in range(5)] == pytest.approx(
        [922.262987, -1093.891704, -2284.923559, -2488.817700, -2231.351727], rel=1e-6
    )
    assert (every.corpus.ngrams, every.targets[0].corpus.ngrams) == (291_398, 309)
    assert every.targets[0].kl_corpus == pytest.approx(2.984670, abs=1e-6)

    long = choose(data, target, read=CONTENTS, count=5, **TOY)
    assert long.passed == 793
    assert long.documents.row.tolist()[0] == 0
    by_score = [row for row in every.documents.row.tolist() if row in set(long.documents.row.tolist())]
    assert by_score == long.documents.row.tolist(), "the filter leaves the order"
    with pytest.raises(InputError, match="794 documents are asked for, and 793 have 100 tokens"):
        choose(data, target, read=CONTENTS, count=794, **TOY)


@pytest.mark.parametrize("options", [{}, {"ngrams": 3, "buckets": 50_000}, {"hash": "fast"}])
def test_two_copies_of_the_toy_corpus_give_their_first_document_twice(
    options: dict[str, Any], choose: Choose, toy: Path, toy_twice: Path
) -> None:
    settings = {"hash": "sha256", **options}
    found = choose(toy_twice, toy / "toy_target_data.jsonl", read=CONTENTS, count=2, **settings)
    assert found.documents.row.tolist() == [0, 0]
    assert sorted(found.documents.files[file] for file in found.documents.file) == ["a.jsonl", "b.jsonl"]
    if not options:
        assert found.corpus.ngrams == 582_796
        assert found.targets[0].kl_corpus == pytest.approx(2.984670, abs=1e-6)


def test_two_toy_targets_take_one_document_each(choose: Choose, toy: Path, toy_twice: Path) -> None:
    targets = {"one": toy / "toy_target_data.jsonl", "two": toy / "toy_target_data_2.jsonl"}
    found = choose(
        toy_twice, targets, read=CONTENTS, count=2, hash="sha256", proportions={"one": 0.5, "two": 0.5}
    )
    assert found.documents.row.tolist() == [0, 2]
    assert [(each.name, each.chosen) for each in found.targets] == [("one", 1), ("two", 1)]
    assert found.documents.selection.scores == pytest.approx([922.262987, 949.554434], rel=1e-6)


# A planted mixture: a fifth of the documents have the target's words.


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, NDArray[np.bool_]]:
    """Data, target, and which documents are planted. Both kinds share all words, in other shares."""
    folder = tmp_path_factory.mktemp("mixture")
    rng = np.random.default_rng(7)
    words = np.array([f"word{number}" for number in range(60)])
    own, other = rng.dirichlet(np.full(60, 0.5), size=2)

    def text(share: NDArray[np.float64]) -> str:
        return " ".join(rng.choice(words, rng.integers(20, 60), p=share))

    planted = rng.random(1000) < 0.2
    data = write(folder / "data.jsonl", [text(own if each else other) for each in planted])
    target = write(folder / "target.jsonl", [text(own) for _ in range(400)])
    return data, target, planted


@pytest.mark.parametrize("hash", ["fast", "sha256"])
@pytest.mark.parametrize("noise", [False, True])
def test_planted_documents_are_found(
    hash: str,
    noise: bool,
    choose: Choose,
    mixture: tuple[Path, Path, NDArray[np.bool_]],
) -> None:
    data, target, planted = mixture
    found = choose(data, target, fraction=0.1, hash=hash, noise=noise, min_tokens=20)
    assert len(found.documents) == 100
    assert planted.mean() < 0.25
    assert planted[found.documents.row].mean() > 0.9
    (facts,) = found.targets
    assert facts.kl_reduction is not None and facts.kl_reduction > 0
    assert 1 < facts.effective < 1000
    assert found.documents.selection.scores is not None
    drawn = found.documents.selection.scores
    assert (np.diff(drawn) <= 0).all() != noise, "without noise the greatest weight is first"


def test_the_draw_follows_from_the_seed(
    choose: Choose, mixture: tuple[Path, Path, NDArray[np.bool_]]
) -> None:
    data, target, _ = mixture
    options = {"count": 50, "min_tokens": 20}
    first, again, other = (choose(data, target, seed=seed, **options) for seed in (1, 1, 2))
    assert first.documents.row.tolist() == again.documents.row.tolist()
    assert set(first.documents.row.tolist()) != set(other.documents.row.tolist())
    still = [choose(data, target, seed=seed, noise=False, **options).documents.row for seed in (1, 2)]
    assert still[0].tolist() == still[1].tolist()


def scores_by_row(found: DocumentChoice) -> NDArray[np.float64]:
    """Scores of a choice of all documents, in the order of rows."""
    return found.documents.selection.scores[np.argsort(found.documents.row)].astype(np.float64)


def test_length_reaches_the_result(choose: Choose, tmp_path: Path) -> None:
    """A sum favours what is long; of the means of n-grams the purer document's is the greater."""
    long, pure, unlike = "a b " * 40 + "c d " * 10, "a b " * 5, "c d " * 45
    data = write(tmp_path / "data.jsonl", [long, pure, unlike])
    target = write(tmp_path / "target.jsonl", ["a b " * 5 + "c d "])
    options = {"count": 3, "min_tokens": 0, "noise": False, "ngrams": 1}
    summed, mean = (choose(data, target, by_length=each, **options) for each in (False, True))
    assert summed.documents.row.tolist() == [0, 1, 2]
    assert mean.documents.row.tolist() == [1, 0, 2]
    grams = np.array([100, 10, 90])
    assert scores_by_row(mean) == pytest.approx(scores_by_row(summed) * grams.mean() / grams, rel=1e-5)


def test_truncation_reaches_the_result(choose: Choose, mixture: tuple[Path, Path, NDArray[np.bool_]]) -> None:
    data, target, _ = mixture
    options = {"count": 1000, "min_tokens": 0, "noise": False}
    plain, cut = (choose(data, target, truncate=each, **options) for each in (False, True))
    logs = scores_by_row(plain)
    most = np.log(np.exp(logs - logs.max()).sum()) + logs.max() - np.log(1000) / 2
    assert most < logs.max(), "nothing would be cut"
    assert scores_by_row(cut) == pytest.approx(np.minimum(logs, most), rel=1e-4, abs=1e-4)
    assert cut.targets[0].effective > plain.targets[0].effective


# Several targets, and how many documents.


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    """A corpus and two targets, of 30 and 10 n-grams."""
    rng = np.random.default_rng(3)
    words = [f"w{number}" for number in range(30)]
    texts = [" ".join(rng.choice(words, 12)) for _ in range(80)]
    targets = {
        "large": write(tmp_path / "large.jsonl", [" ".join(words[:30])]),
        "small": write(tmp_path / "small.jsonl", [" ".join(words[:10])]),
    }
    return write(tmp_path / "data.jsonl", texts), targets


@pytest.mark.parametrize(
    ("count", "proportions", "taken"),
    [
        (8, None, [6, 2]),  # the shares of their n-grams
        (9, None, [6, 3]),  # the last takes what remains
        (10, {"small": 0.7, "large": 0.3}, [3, 7]),
        (10, {"large": 1.0, "small": 0.0}, [10, 0]),
        (3, {"large": 0.1, "small": 0.9}, [0, 3]),
    ],
)
def test_targets_take_their_shares(
    count: int,
    proportions: dict[str, float] | None,
    taken: list[int],
    choose: Choose,
    several: tuple[Path, dict[str, Path]],
) -> None:
    data, targets = several
    found = choose(data, targets, count=count, proportions=proportions, min_tokens=0, ngrams=1)
    assert [(each.name, each.chosen) for each in found.targets] == list(zip(targets, taken, strict=True))
    rows = found.documents.row.tolist()
    assert len(set(rows)) == count, "no document is taken twice"
    for each in found.targets:
        assert (each.kl_chosen is None) == (each.chosen == 0)
    alone = choose(data, targets["large"], count=80, min_tokens=0, ngrams=1).documents
    known = dict(zip(alone.row.tolist(), alone.selection.scores.tolist(), strict=True))
    first = found.documents.selection.scores[: taken[0]].tolist()
    assert first == pytest.approx([known[row] for row in rows[: taken[0]]]), "scores are of the one that took"


@pytest.mark.parametrize("names", [["large"], ["large", "small", "more"], ["large", "smal"]])
def test_proportions_of_other_names_are_refused(names: list[str]) -> None:
    step = DSIR(DSIR.Config(count=1, proportions=dict.fromkeys(names, 1 / len(names))))
    with pytest.raises(InputError, match="not those of the targets") as caught:
        step.check(("large", "small"))
    assert (caught.value.where, caught.value.allowed) == ("proportions", "large, small")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of count and fraction"),
        ({"count": 1, "fraction": 0.1}, "exactly one of count and fraction"),
        ({"count": 0}, "count"),
        ({"fraction": 1.1}, "fraction"),
        ({"count": 1, "proportions": {"a": 0.5, "b": 0.4}}, "add up to 0.9"),
        ({"count": 1, "proportions": {"a": -0.5, "b": 1.5}}, "proportions"),
        ({"count": 1, "proportions": {}}, "proportions"),
        ({"count": 1, "hash": "md5"}, "hash"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DSIR.Config.model_validate(options)


@pytest.mark.parametrize(("fraction", "kept"), [(1.0, 80), (0.1, 8), (0.0188, 2)])
def test_a_fraction_is_of_the_documents(
    fraction: float, kept: int, choose: Choose, several: tuple[Path, dict[str, Path]]
) -> None:
    data, targets = several
    assert len(choose(data, targets["large"], fraction=fraction, min_tokens=0).documents) == kept


@pytest.mark.parametrize(
    ("options", "where", "message"),
    [
        ({"count": 81}, "count", "81 documents are asked for, and the corpus holds 80"),
        ({"fraction": 0.001}, "fraction", "0 documents are asked for"),
        ({"count": 80, "min_tokens": 13}, "count", "80 documents are asked for, and 0 have 13 tokens"),
        ({"fraction": 0.5, "min_tokens": 13}, "fraction", "40 documents are asked for, and 0 have 13"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(
    options: dict[str, Any],
    where: str,
    message: str,
    choose: Choose,
    several: tuple[Path, dict[str, Path]],
) -> None:
    data, targets = several
    with pytest.raises(InputError, match=message) as caught:
        choose(data, targets["large"], **{"min_tokens": 0, **options})
    assert caught.value.where == where


def test_a_target_without_a_common_n_gram_is_refused(choose: Choose, tmp_path: Path) -> None:
    data = write(tmp_path / "data.jsonl", ["one two three"] * 4)
    like, unlike = write(tmp_path / "l.jsonl", ["two one"]), write(tmp_path / "u.jsonl", ["vier fünf"])
    options = {"count": 1, "min_tokens": 0, "buckets": 1 << 20}
    with pytest.raises(InputError, match="the target other shares no n-gram") as caught:
        choose(data, {"like": like, "other": unlike}, **options)
    assert caught.value.where == "target"
    assert caught.value.found == "3 buckets of the target, 5 of the data"
    choose(data, like, **options)


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": ""}\n', b'{"text": " \\n "}\n'])
@pytest.mark.parametrize("empty", ["data", "target", "target two"])
def test_what_holds_no_words_is_refused(content: bytes, empty: str, choose: Choose, tmp_path: Path) -> None:
    files = {name: write(tmp_path / f"{name}.jsonl", ["some words"]) for name in ("data", "target")}
    other = tmp_path / "empty.jsonl"
    other.write_bytes(content)
    targets: Path | dict[str, Path] = other if empty == "target" else files["target"]
    if empty == "target two":
        targets = {"one": files["target"], "two": other}
    with pytest.raises(InputError, match=f"the {empty} holds no words") as caught:
        choose(other if empty == "data" else files["data"], targets, count=1, min_tokens=0)
    assert caught.value.where == empty.split()[0]


# Rows that cannot be read.


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """200 lines in two files and many pieces; lines 42 and 61 of the second file cannot be read."""
    monkeypatch.setattr(Corpus.pieces, "__kwdefaults__", {"piece_bytes": 500})
    write(tmp_path / "data" / "a.jsonl", [f"word{number} and" for number in range(100)])
    lines = [json.dumps({"text": f"word{number} or"}) for number in range(100)]
    lines[41], lines[60] = '{"txt": 1}', "{"
    (tmp_path / "data" / "b.jsonl").write_text("\n".join(lines))
    return tmp_path / "data"


def test_rows_within_the_rate_are_left_out_and_told(
    choose: Choose, broken: Path, tmp_path: Path, warnings: Warnings
) -> None:
    target = write(tmp_path / "target.jsonl", ["word1 or word2"])
    found = choose(broken, target, read={"bad_lines": 0.01}, count=198, min_tokens=0)
    assert (found.corpus.rows, found.corpus.documents, found.corpus.unreadable) == (200, 198, 2)
    rows = {(found.documents.files[file], row) for file, row in zip(*places(found), strict=True)}
    every = {(name, row) for name in ("a.jsonl", "b.jsonl") for row in range(100)}
    assert every - rows == {("b.jsonl", 41), ("b.jsonl", 60)}
    (told,) = warnings.told
    assert told.startswith("2 of 200 rows of the data cannot be read, and are left out; the first is ")
    assert told.endswith("b.jsonl, line 42, which has no field 'text'; it has 'txt'")


def places(found: DocumentChoice) -> tuple[list[int], list[int]]:
    return found.documents.file.tolist(), found.documents.row.tolist()


def test_more_than_the_rate_are_refused(choose: Choose, broken: Path, tmp_path: Path) -> None:
    target = write(tmp_path / "target.jsonl", ["word1 or word2"])
    with pytest.raises(DamagedDataError, match="too many rows of the data") as caught:
        choose(broken, target, read={"bad_lines": 0.0099}, count=5, min_tokens=0)
    assert caught.value.exit_code == 3
    assert caught.value.where == f"{broken / 'b.jsonl'}, line 42"
    assert caught.value.found == "2 of 200 rows"


def test_a_target_whose_rows_cannot_be_read_is_refused_by_its_name(choose: Choose, tmp_path: Path) -> None:
    data, good = write(tmp_path / "data.jsonl", ["a b"] * 3), write(tmp_path / "good.jsonl", ["a b"])
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(gzip.compress(b'{"text": "a b"}\n[]\n'))
    with pytest.raises(
        DamagedDataError, match=r"of the target bad cannot be read; .* is no JSON object"
    ) as caught:
        choose(data, {"good": good, "bad": bad}, count=1, min_tokens=0)
    assert caught.value.where == f"{bad}, line 2"
    bad.write_bytes(gzip.compress(b"[]\n[]\n"))
    with pytest.raises(InputError, match="of the target bad cannot be read") as none:
        choose(data, {"good": good, "bad": bad}, count=1, min_tokens=0)
    assert none.value.exit_code == 2


def test_a_row_of_parquet_is_called_a_row(choose: Choose, tmp_path: Path) -> None:
    """A null is an empty document; text that is none cannot stand in a column of text."""
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(
        pyarrow.table({"text": ["a b", None, "", "c d"]}), tmp_path / "data.parquet", row_group_size=1
    )
    target = write(tmp_path / "target.jsonl", ["c d"])
    found = choose(tmp_path / "data.parquet", target, count=2, min_tokens=0, noise=False)
    assert (found.corpus.rows, found.corpus.documents, found.corpus.unreadable) == (4, 2, 0)
    assert found.documents.row.tolist() == [3, 0]


def test_random_documents_are_as_many_as_each_target_took(choose: Choose, tmp_path: Path) -> None:
    """A target beside another is compared as it is alone, with the same number."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), 20)) for _ in range(300)]
    data, one = write(tmp_path / "data.jsonl", texts), write(tmp_path / "one.jsonl", texts[:30])
    two = write(tmp_path / "two.jsonl", texts[30:60])
    options: dict[str, Any] = {"min_tokens": 0, "buckets": 1000}
    alone = choose(data, {"one": one}, count=10, **options).targets[0]
    shares = {"one": 0.1, "two": 0.9}
    beside = choose(data, {"one": one, "two": two}, count=100, proportions=shares, **options).targets[0]
    assert (alone.chosen, beside.chosen) == (10, 10)
    assert alone.kl_random is not None and beside.kl_random is not None
    assert beside.kl_chosen == alone.kl_chosen
    assert beside.kl_random == alone.kl_random


def test_divergences_are_those_of_the_target_as_it_is(choose: Choose, toy: Path) -> None:
    """Smoothing changes weights, and not what is measured."""
    data, target = toy / "toy_pile_data.jsonl", toy / "toy_target_data.jsonl"
    found = [
        choose(data, target, read=CONTENTS, count=20, smoothing=smoothing, **TOY).targets[0]
        for smoothing in (0.0, 1.0)
    ]
    assert found[0].kl_corpus == found[1].kl_corpus == pytest.approx(2.984670, abs=1e-6)
    assert found[0].kl_chosen != found[1].kl_chosen


@pytest.mark.parametrize(
    ("shares", "taken"),
    [((1.0, 9e-7, 0.0), [5_000_000, 0, 0]), ((0.5, 0.5, 0.0), [2_500_000, 2_500_000, 0])],
)
def test_shares_are_never_below_nothing(shares: tuple[float, ...], taken: list[int]) -> None:
    names = ("a", "b", "c")
    config = DSIR.Config(count=5_000_000, proportions=dict(zip(names, shares, strict=True)))
    nobody = (np.zeros(1, dtype=np.int64), CorpusFacts(1, 1, 1, 0, 1, ""))
    counts = _shared(5_000_000, dict.fromkeys(names, nobody), config)
    assert min(counts) >= 0 and sum(counts) == 5_000_000
    assert counts == pytest.approx(taken, abs=5)
