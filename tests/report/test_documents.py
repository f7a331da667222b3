"""The report on a selection of documents: stable names, a page without anything from outside, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from distill.contracts import CorpusFacts, TargetFacts
from distill.document_results import DocumentReport, Example, from_report, to_report
from distill.errors import DamagedDataError, InputError
from distill.evaluation.results import StageCost
from distill.report.documents import render, target_table, verdict, write_report

HOSTILE = "<script>alert('x')</script>\"&</p>"
VOID = {"meta"}


class Page(HTMLParser):
    """Tags and text of a page; every tag must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def report() -> DocumentReport:
    """Two targets, the second of which took nothing that has an n-gram."""
    corpus = CorpusFacts(
        files=3, rows=1210, documents=1200, unreadable=0, ngrams=34_567, counts_sha256="ab" * 32
    )
    small = CorpusFacts(files=1, rows=5, documents=5, unreadable=0, ngrams=500, counts_sha256="cd" * 32)
    return DocumentReport(
        chosen=20,
        passed=1100,
        corpus=corpus,
        targets=(
            TargetFacts(
                "near", small, chosen=12, effective=34.56, kl_corpus=1.5, kl_chosen=0.25, kl_random=1.25
            ),
            TargetFacts("far", small, chosen=8, effective=1.0, kl_corpus=2.0, kl_chosen=2.5, kl_random=2.375),
        ),
        bytes=4321,
        examples=(Example("near", 12.34, "a/one.jsonl, row 7", "some text"),),
        cost={"selector dsir": StageCost(12.34, 512_000_000)},
        recipe={
            "seed": 0,
            "data": {"name": "text", "files": "corpus"},
            "steps": [{"dsir": {"count": 20, "min_tokens": 30}}],
        },
        environment={"cores": 2, "versions": {"numpy": "2"}},
        notes=("a note",),
    )


def write(folder: Path, report: DocumentReport) -> tuple[dict[str, Any], str]:
    paths = folder / "report.json", folder / "report.html"
    write_report(report, json_path=paths[0], html_path=paths[1])
    return json.loads(paths[0].read_text(encoding="utf-8")), paths[1].read_text(encoding="utf-8")


def test_what_is_written_is_what_is_read(report: DocumentReport, tmp_path: Path) -> None:
    told, _ = write(tmp_path, report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert from_report(told, where="report.json") == report
    assert told == json.loads(json.dumps(to_report(report)))


def test_names_are_stable(report: DocumentReport) -> None:
    told = to_report(report)
    assert list(told) == [
        "version", "kind", "chosen", "passed", "kl_reduction", "corpus", "targets", "bytes", "examples", "cost",
        "recipe", "environment", "notes",
    ]  # fmt: skip
    facts = ["files", "rows", "documents", "unreadable", "ngrams", "counts_sha256"]
    assert list(told["corpus"]) == facts
    assert list(told["targets"][0]) == [
        "name", "corpus", "chosen", "effective", "kl_corpus", "kl_chosen", "kl_random", "kl_reduction",
    ]  # fmt: skip
    assert list(told["targets"][0]["corpus"]) == facts
    assert list(told["examples"][0]) == ["target", "score", "place", "text"]
    assert (told["version"], told["kind"], told["bytes"]) == (1, "documents", {"total": 4321})
    assert told["targets"][0]["kl_reduction"] == 1.25
    assert told["kl_reduction"] == pytest.approx((1.25 - 0.5) / 2)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"kind": "images"},
        {"kind": None},
        {"targets": [{"name": "a"}]},
        {"targets": None},
        {"corpus": {"files": 1}},
        {"corpus": {**dict.fromkeys(["files", "rows", "documents", "unreadable", "ngrams"], 1), "more": 1}},
        {"bytes": 3},
        {"examples": [{"target": "a"}]},
        {"cost": {"data": {"time": 1}}},
        {"recipe": None},
        {"notes": None},
    ],
)
def test_a_damaged_report_is_told(change: dict[str, Any], report: DocumentReport) -> None:
    with pytest.raises(DamagedDataError) as caught:
        from_report({**to_report(report), **change}, where="there")
    assert caught.value.where == "there"


@pytest.mark.parametrize(
    "name", ["chosen", "passed", "corpus", "targets", "bytes", "examples", "cost", "notes"]
)
def test_a_name_that_is_missing_is_told(name: str, report: DocumentReport) -> None:
    told = to_report(report)
    del told[name]
    with pytest.raises(DamagedDataError, match="damaged"):
        from_report(told, where="there")


@pytest.mark.parametrize("other", [[], None, "text", 3])
def test_what_is_no_report_is_told(other: Any) -> None:
    with pytest.raises(DamagedDataError):
        from_report(other, where="there")


def test_the_verdict_says_how_close(report: DocumentReport) -> None:
    first, second = report.targets
    told = "20 of 1,200 documents"
    assert verdict(report) == (
        f"{told}: their n-grams are 0.438 nats closer to the 2 targets, in the mean, than as many random documents'."
    )
    assert verdict(replace(report, targets=(first,))) == (
        f"{told}: their n-grams are 1.000 nats closer to the target than as many random documents'."
    )
    assert "0.125 nats farther from the target than" in verdict(replace(report, targets=(second,)))
    empty = replace(second, kl_chosen=None)
    lost = replace(report, targets=(first, empty))
    assert lost.kl_reduction is None and "nothing tells how close" in verdict(lost)
    assert target_table(lost).rows[1] == ("far", "5", "8", "2.000", "2.375", "none", "none", "1.0")


def test_the_terminal_tells_everything(report: DocumentReport) -> None:
    told = render(report)
    for expected in (
        "1,200 documents in 3 files",
        "34,567",
        "1,100, of 30 tokens or more",
        "4.32 kB",
        "selector dsir",
        "12.3 s",
        "a note",
        "Closeness to the targets",
    ):
        assert expected in told
    assert "unreadable" not in told
    broken = replace(report, corpus=replace(report.corpus, unreadable=1234))
    assert "unreadable  1,234 rows, left out" in render(broken)
    bare = replace(report, recipe={}, cost={}, notes=())
    assert "tokens or more" not in render(bare) and "Cost" not in render(bare) and "Notes" not in render(bare)


def test_the_page_holds_everything(report: DocumentReport, tmp_path: Path) -> None:
    page = Page(write(tmp_path, replace(report, corpus=replace(report.corpus, unreadable=77)))[1])
    for expected in (
        "text: dsir",
        verdict(report),
        "1,200",
        "77",
        "rows unreadable",
        "near: a/one.jsonl, row 7, log weight 12.3",
        "some text",
        "selector dsir",
        "a note",
        "min_tokens: 30",
        "versions.numpy",
    ):
        assert expected in page.text


def test_nothing_from_outside_is_obeyed(report: DocumentReport, tmp_path: Path) -> None:
    """Texts, names of files and of targets, notes, recipe and environment come from strangers."""
    first = report.targets[0]
    hostile = replace(
        report,
        targets=(replace(first, name=HOSTILE),),
        examples=(Example(HOSTILE, 1.0, f"{HOSTILE}.jsonl, row 1", HOSTILE),),
        notes=(HOSTILE,),
        cost={HOSTILE: StageCost(1.0, None)},
        recipe={"data": {"name": HOSTILE}, "steps": [{HOSTILE: {"field": HOSTILE}}]},
        environment={HOSTILE: HOSTILE},
    )
    _, text = write(tmp_path, hostile)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) >= 8
    policy = next(facts["content"] for tag, facts in page.tags if "http-equiv" in facts)
    assert policy is not None and "default-src 'none'" in policy
    assert not {"src", "href", "onload"} & {name for _, facts in page.tags for name in facts}
    assert "\x1b" not in render(replace(report, notes=("plain",)))


def test_half_a_pair_of_surrogates_is_written(report: DocumentReport, tmp_path: Path) -> None:
    """JSON lines may hold one; UTF-8 cannot."""
    odd = replace(report, examples=(Example("near", 1.0, "a\udc80.jsonl, row 1", "half \ud83d"),))
    told, page = write(tmp_path, odd)
    assert told["examples"][0]["text"] == "half \ud83d"
    assert from_report(told, where="there") == odd
    assert r"half \ud83d" in page


def test_a_report_without_examples_has_no_heading_for_them(report: DocumentReport, tmp_path: Path) -> None:
    assert "Some of the chosen" in write(tmp_path, report)[1]
    assert "Some of the chosen" not in write(tmp_path, replace(report, examples=()))[1]


def test_numbers_that_json_cannot_say_leave_no_file(report: DocumentReport, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, replace(report, environment={"load": float("nan")}))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_the_user_s_error(report: DocumentReport, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"report\.json"):
        write(tmp_path / "missing", report)
