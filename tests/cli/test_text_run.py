"""`distill run` over text, and what is made of its set: from the recipe to report and documents; what is refused."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result

import distill
from dataselect import dsir
from distill.contracts import DocumentSet
from distill.document_results import DocumentReport, from_report
from distill.store.reader import read_documents
from distill.text import streams

Call = Callable[..., Result]
OUTPUTS = {"set.h5", "report.json", "report.html", "recipe.yaml", "log.jsonl"}


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def lines_of(path: Path) -> list[bytes]:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).split(b"\n")


def chosen_lines(documents: DocumentSet, corpus: Path) -> list[bytes]:
    """The lines of a set's documents, in the order of the corpus."""
    places = sorted((documents.files[file], row) for file, row in zip(*places_of(documents), strict=True))
    return [lines_of(corpus / name)[row] for name, row in places]


def places_of(documents: DocumentSet) -> tuple[list[int], list[int]]:
    return documents.file.tolist(), documents.row.tolist()


def nothing_is_half_written(folder: Path) -> None:
    """No result, and no file that was begun; the folder itself may be absent."""
    left = {path.name for path in folder.rglob("*")}
    assert not left & {"set.h5", "report.json", "report.html", "documents.jsonl", "documents.parquet"}
    assert not [name for name in left if "partial" in name or name == ".lock"]


# What a run writes.


def test_a_run_writes_its_files_and_tells_where(call: Call, text_recipe: Path, tmp_path: Path) -> None:
    result = call("run", text_recipe, "--out", "out")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path / "out") == OUTPUTS
    lines = result.stdout.splitlines()
    assert lines[-3:] == [str(Path("out") / name) for name in ("set.h5", "report.json", "report.html")]
    assert re.match(r"12 of 117 documents: their n-grams are \d\.\d{3} nats closer to the target", lines[0])
    row = next(line.split() for line in lines if line.startswith("  target  ") and "documents" not in line)
    assert row[:3] == ["target", "59", "12"]
    for told in (
        "count n-grams of data",
        "score documents",
        "count n-grams of the choice",
        "wrote out/set.h5",
    ):
        assert told in result.stderr


def test_the_report_tells_what_was_found(
    call: Call, chosen_documents: Path, corpus: Path, tmp_path: Path
) -> None:
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert list(report) == [
        "version", "kind", "chosen", "passed", "kl_reduction", "corpus", "targets", "bytes", "examples", "cost",
        "recipe", "environment", "notes",
    ]  # fmt: skip
    assert (report["kind"], report["chosen"]) == ("documents", 12)
    corpus_facts, (target,) = report["corpus"], report["targets"]
    assert [corpus_facts[name] for name in ("files", "rows", "documents", "unreadable")] == [3, 120, 117, 0]
    assert report["kl_reduction"] == target["kl_reduction"] == target["kl_corpus"] - target["kl_chosen"] > 0
    assert report["bytes"] == {"total": chosen_documents.stat().st_size}
    assert list(report["cost"]) == ["selector dsir"]
    assert report["recipe"]["evaluate"]["on"] == "nothing" and report["recipe"]["engine"] == "local"
    texts = [json.loads(line)["text"] for name in corpus.rglob("*.*") for line in lines_of(name) if line]
    assert report["passed"] == sum(len(text.split()) >= 10 for text in texts)
    documents = read_documents(chosen_documents)
    for number, example in enumerate(report["examples"]):
        name, row = documents.files[documents.file[number]], int(documents.row[number])
        assert example["place"] == f"{name}, row {row}"
        assert example["text"] == json.loads(lines_of(corpus / name)[row])["text"][:400]
        assert example["score"] == documents.selection.scores[number]
    assert len(report["examples"]) == 3
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<title>text: dsir</title>" in page and example["text"] in page and "größe" in page
    from_report(report, where="report.json")


def test_the_set_says_where_documents_lie_and_not_where_the_corpus_does(
    chosen_documents: Path, corpus: Path, tmp_path: Path
) -> None:
    documents = read_documents(chosen_documents)
    assert len(documents) == 12
    offsets = dict(zip(("a/one.jsonl", "b/two.jsonl.gz", "c.jsonl"), (0, 40, 80), strict=True))
    assert set(documents.files) <= set(offsets)
    for index, file, row in zip(documents.selection.indices, *places_of(documents), strict=True):
        assert index == offsets[documents.files[file]] + row
        assert len(json.loads(lines_of(corpus / documents.files[file])[row])["text"].split()) >= 10
    told = json.dumps([documents.provenance, documents.selection.meta])
    assert str(tmp_path) not in told and "corpus" in told
    assert documents.provenance["recipe"]["data"] == {
        "name": "text", "field": "text", "document": "line", "bad_lines": 0.001, "document_bytes": 16 << 20,
    }  # fmt: skip
    assert documents.selection.meta["passed"] > 12
    assert "cache" not in documents.provenance["recipe"] and "engine" not in documents.provenance["recipe"]


def test_several_targets_have_names(call: Call, text_recipe: Path, corpus: Path, tmp_path: Path) -> None:
    files = {"own": "target.jsonl", "two.b": [str(corpus / "b"), str(corpus / "c.jsonl")]}
    proportions = {"own": 0.25, "two.b": 0.75}
    recipe = yaml.safe_load(text_recipe.read_text())
    recipe["target"]["files"] = files
    recipe["steps"][0]["dsir"]["proportions"] = proportions
    text_recipe.write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = call("run", text_recipe, "--out", "out")
    assert result.exit_code == 0, result.output
    assert re.search("(closer to|farther from) the 2 targets, in the mean, than", result.stdout)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert [(target["name"], target["chosen"]) for target in report["targets"]] == [("own", 3), ("two.b", 9)]
    reductions = [target["kl_reduction"] for target in report["targets"]]
    assert report["kl_reduction"] == pytest.approx(sum(reductions) / 2)
    assert [example["target"] for example in report["examples"]] == ["own"] * 3 + ["two.b"] * 3
    told = read_documents(tmp_path / "out" / "set.h5").provenance
    assert set(told["targets"]) == {"own", "two.b"}
    assert told["recipe"]["target"] == told["recipe"]["data"], "no place and no name"


def test_inspect_tells_of_documents(call: Call, chosen_documents: Path) -> None:
    told = call("inspect", chosen_documents)
    assert told.exit_code == 0, told.output
    assert re.search(r"documents +12 in \d files?; their texts are not in the set", told.stdout)
    assert "documents/row" in told.stdout and "images" not in told.stdout
    summary = json.loads(call("inspect", chosen_documents, "--json").stdout)
    documents = read_documents(chosen_documents)
    assert summary["documents"] == {"count": 12, "files": len(documents.files)}
    assert summary["selection"]["meta"]["passed"] == documents.selection.meta["passed"]
    assert "images" not in summary and "labels" not in summary
    verified = call("inspect", chosen_documents, "--verify")
    assert verified.exit_code == 0 and "not verified" not in verified.stdout


def test_a_dry_run_writes_nothing(call: Call, text_recipe: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    result = call("run", text_recipe, "--dry-run", "--out", "out")
    assert result.exit_code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    for told in (
        "text: 3 files",
        "target: 1 file",
        "selector dsir: 12 documents",
        "time ",
        "memory ",
        "disk ",
    ):
        assert told in result.stdout
    for name in OUTPUTS:
        assert str(Path("out") / name) in result.stdout
    share = ["steps.0.dsir.count=null", "steps.0.dsir.fraction=0.25"]
    assert "0.25 of the documents" in call("run", text_recipe, *share, "--dry-run").stdout


def test_a_dry_run_refuses_what_the_first_rows_show(call: Call, text_recipe: Path, tmp_path: Path) -> None:
    result = call("run", text_recipe, "data.field=txt", "--dry-run", "--out", "out")
    assert result.exit_code == 2
    assert "data.field" in result.stderr and not (tmp_path / "out").exists()


def test_a_finished_run_is_shown_again(call: Call, text_recipe: Path, tmp_path: Path) -> None:
    first = call("run", text_recipe, "--out", "out")
    kept = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    again = call("run", text_recipe, "--out", "out")
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "is finished" in again.stderr and "started" not in again.stderr
    assert kept == {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()
    }
    dry = call("run", text_recipe, "--out", "out", "--dry-run")
    assert dry.exit_code == 0 and "is finished" in dry.stdout


@pytest.mark.parametrize("damage", ["", "[]", '{"version": 1, "kind": "documents"}', '{"version": 1}'])
def test_a_damaged_report_is_told(call: Call, text_recipe: Path, chosen_documents: Path, damage: str) -> None:
    chosen_documents.with_name("report.json").write_text(damage)
    result = call("run", text_recipe, "--out", "out")
    assert result.exit_code == 3
    assert "report.json" in result.stderr and "Traceback" not in result.stderr


def test_python_has_the_same_functions(text_recipe: Path, corpus: Path, tmp_path: Path) -> None:
    result = distill.run(text_recipe, out=tmp_path / "out", materialise="jsonl", quiet=True)
    assert isinstance(result.evaluation, DocumentReport) and result.evaluation.chosen == 12
    assert result.documents == tmp_path / "out" / "documents.jsonl"
    assert distill.run(text_recipe, out=tmp_path / "out", quiet=True).evaluation == result.evaluation


# Documents written out.


def test_lines_are_those_of_the_corpus_in_its_order(
    call: Call, text_recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    result = call("run", text_recipe, "--out", "out", "--materialise", "jsonl")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path / "out") == OUTPUTS | {"documents.jsonl"}
    assert result.stdout.splitlines()[-1] == str(Path("out") / "documents.jsonl")
    wanted = chosen_lines(read_documents(tmp_path / "out" / "set.h5"), corpus)
    assert len(wanted) == 12
    assert (tmp_path / "out" / "documents.jsonl").read_bytes() == b"".join(line + b"\n" for line in wanted)


def test_parquet_holds_texts_and_where_they_were(
    call: Call, text_recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    from pyarrow.parquet import read_table

    result = call("run", text_recipe, "--out", "out", "--materialise", "parquet", "--quiet")
    assert result.exit_code == 0, result.output
    documents = read_documents(tmp_path / "out" / "set.h5")
    table = read_table(tmp_path / "out" / "documents.parquet").to_pydict()
    assert list(table) == ["text", "file", "row", "score"]
    wanted = [json.loads(line)["text"] for line in chosen_lines(documents, corpus)]
    assert table["text"] == wanted
    order = sorted(range(12), key=lambda n: (documents.files[documents.file[n]], documents.row[n]))
    assert table["file"] == [documents.files[documents.file[n]] for n in order]
    assert table["row"] == documents.row[order].tolist()
    assert table["score"] == documents.selection.scores[order].tolist()


def test_a_finished_run_is_written_out_later_and_once(
    call: Call, text_recipe: Path, chosen_documents: Path, corpus: Path
) -> None:
    result = call("run", text_recipe, "--out", "out", "--materialise", "jsonl")
    assert result.exit_code == 0, result.output
    path = chosen_documents.with_name("documents.jsonl")
    assert path.read_bytes().splitlines() == chosen_lines(read_documents(chosen_documents), corpus)
    before = path.stat().st_mtime_ns
    assert call("run", text_recipe, "--out", "out", "--materialise", "jsonl").exit_code == 0
    assert path.stat().st_mtime_ns == before
    assert call("run", text_recipe, "--out", "out", "--materialise", "parquet").exit_code == 0
    assert listing(path.parent) == OUTPUTS | {"documents.jsonl", "documents.parquet"}


def test_a_fresh_run_takes_written_documents_away(
    call: Call, text_recipe: Path, chosen_documents: Path
) -> None:
    """They are of another choice."""
    for form in ("jsonl", "parquet"):
        assert call("run", text_recipe, "--out", "out", "--materialise", form).exit_code == 0
    assert call("run", text_recipe, "--out", "out", "--seed", "4", "--fresh", "-q").exit_code == 0
    assert listing(chosen_documents.parent) == OUTPUTS


def reverse_lines(path: Path) -> None:
    """Other documents at every row, and as many bytes."""
    path.write_bytes(b"".join(reversed(path.read_bytes().splitlines(keepends=True))))


def test_a_corpus_that_changed_is_not_written_out(
    call: Call, text_recipe: Path, chosen_documents: Path, corpus: Path
) -> None:
    reverse_lines(corpus / "c.jsonl")
    result = call("run", text_recipe, "--out", "out", "--materialise", "jsonl")
    assert result.exit_code == 2
    assert "not the document that was chosen" in result.stderr and "c.jsonl, row" in result.stderr
    assert listing(chosen_documents.parent) == OUTPUTS, "the run itself stays"


@pytest.mark.parametrize("to", ["jsonl", "parquet", "indices"])
def test_export_writes_what_the_run_would(
    to: str, call: Call, text_recipe: Path, chosen_documents: Path, tmp_path: Path
) -> None:
    result = call("export", chosen_documents, "--to", to, "--out", "exported")
    assert result.exit_code == 0, result.output
    if to == "indices":
        documents = read_documents(chosen_documents)
        told = [json.loads(line) for line in (tmp_path / "exported").read_text().splitlines()]
        assert [(each["index"], each["row"]) for each in told] == list(
            zip(documents.selection.indices.tolist(), documents.row.tolist(), strict=True)
        )
        assert [each["file"] for each in told] == [documents.files[file] for file in documents.file]
        assert [each["score"] for each in told] == documents.selection.scores.tolist()
        assert all(each["weight"] == 1 for each in told)
        return
    assert call("run", text_recipe, "--out", "out", "--materialise", to, "-q").exit_code == 0
    written = chosen_documents.with_name(f"documents.{to}")
    assert (tmp_path / "exported").read_bytes() == written.read_bytes()


def test_a_moved_set_asks_for_the_files_and_takes_them(
    call: Call, chosen_documents: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "far").mkdir()
    moved = Path(shutil.move(chosen_documents, tmp_path / "far" / "set.h5"))
    elsewhere = Path(shutil.move(corpus, tmp_path / "far" / "texts"))
    refused = call("export", moved, "--to", "jsonl", "--out", "no")
    assert refused.exit_code == 2 and "data.files" in refused.stderr
    assert not (tmp_path / "no").exists()
    result = call("export", moved, f"data.files={elsewhere}", "--to", "jsonl", "--out", "yes")
    assert result.exit_code == 0, result.output
    wanted = chosen_lines(read_documents(moved), elsewhere)
    assert (tmp_path / "yes").read_bytes().splitlines() == wanted
    assert call("export", moved, "--to", "indices", "--out", "indices").exit_code == 0, "no file is read"


@pytest.mark.parametrize("change", ["gone", "renamed", "fewer", "other rows"])
def test_other_files_are_refused(
    change: str, call: Call, chosen_documents: Path, corpus: Path, tmp_path: Path
) -> None:
    files: Any = str(corpus)
    if change == "gone":
        (corpus / "c.jsonl").unlink()
    elif change == "renamed":
        (corpus / "c.jsonl").rename(corpus / "cc.jsonl")
    elif change == "other rows":
        reverse_lines(corpus / "c.jsonl")
    else:
        files = f"[{corpus / 'a'}, {corpus / 'b'}]"
    result = call("export", chosen_documents, f"data.files={files}", "--to", "jsonl", "--out", "no")
    assert result.exit_code == 2, result.output
    told = "not the document that was chosen" if change == "other rows" else "are not there"
    assert told in result.stderr
    assert not (tmp_path / "no").exists() and not list(tmp_path.glob(".*"))


def test_more_files_and_rows_beside_the_chosen_do_not_matter(
    call: Call, chosen_documents: Path, corpus: Path, tmp_path: Path
) -> None:
    wanted = chosen_lines(read_documents(chosen_documents), corpus)
    (corpus / "d.jsonl").write_text('{"text": "a"}\n')
    with (corpus / "c.jsonl").open("ab") as file:
        file.write(b'{"text": "more"}\n')
    assert call("export", chosen_documents, "--to", "jsonl", "--out", "yes").exit_code == 0
    assert (tmp_path / "yes").read_bytes().splitlines() == wanted


def test_a_document_that_is_not_there_any_more_is_damage(
    call: Call, chosen_documents: Path, corpus: Path, tmp_path: Path
) -> None:
    """Names and sizes are those of the set, and the lines are not."""
    for name in ("a/one.jsonl", "c.jsonl"):
        path = corpus / name
        path.write_bytes(b"x" * (path.stat().st_size - 1) + b"\n")
    result = call("export", chosen_documents, "--to", "jsonl", "--out", "no")
    assert result.exit_code == 3, result.output
    assert "a document of the set is not there" in result.stderr and ".jsonl, row" in result.stderr
    assert not (tmp_path / "no").exists()


def test_nothing_is_exported_into_the_corpus(call: Call, chosen_documents: Path, corpus: Path) -> None:
    before = listing(corpus)
    for files in ("corpus", "corpus/**/*.jsonl*"):
        arguments = [f"data.files={files}", "--to", "jsonl"]
        result = call("export", chosen_documents, *arguments, "--out", corpus / "chosen.jsonl")
        assert result.exit_code == 2
        assert "the corpus is read from there" in result.stderr
        assert listing(corpus) == before
    elsewhere = call("export", chosen_documents, "--to", "jsonl", "--out", corpus.parent / "chosen.jsonl")
    assert elsewhere.exit_code == 0, elsewhere.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "folder"], "one of documents"),
        (["--to", "webdataset"], "one of documents"),
        (["--to", "jsonl", "--pixels"], "one of documents"),
        (["--to", "jsonl", "--originals"], "one of documents"),
        (["--to", "indices", "data.files=corpus"], "the corpus is not read"),
        (["--to", "jsonl", "steps.0.dsir.count=3"], "reads only the data"),
    ],
)
def test_export_options_that_do_not_fit_documents(
    options: list[str], message: str, call: Call, chosen_documents: Path, tmp_path: Path
) -> None:
    result = call("export", chosen_documents, *options, "--out", "no")
    assert result.exit_code == 2, result.output
    assert message in result.stderr and not (tmp_path / "no").exists()


@pytest.mark.parametrize("to", ["jsonl", "parquet"])
def test_sets_of_images_hold_no_documents(
    to: str, call: Call, made: Path, recipe: Path, tmp_path: Path
) -> None:
    result = call("export", made, "--to", to, "--out", "no")
    assert result.exit_code == 2
    assert "one of images" in result.stderr and not (tmp_path / "no").exists()
    refused = call("run", recipe, "--out", "out", "--materialise", to)
    assert refused.exit_code == 2 and "--materialise" in refused.stderr


def test_a_set_of_documents_is_not_evaluated(call: Call, chosen_documents: Path) -> None:
    result = call("evaluate", chosen_documents)
    assert result.exit_code == 2
    assert "is a set of documents" in result.stderr and "Traceback" not in result.stderr


# Recipes that are wrong: one error each, before anything is chosen.

TWO = "steps=[{dsir: {count: 3}}, {dsir: {count: 2}}]"
WRONG: dict[str, tuple[list[str], str, str]] = {
    "no target": (["target=null"], "target", "the recipe names none"),
    "image target": (["target={name: digits}"], "target.name", "the target is not"),
    "validation as target": (["target={name: valid}"], "target.name", "the target is not"),
    "image step": (["steps=[{random: {ipc: 3}}]"], "steps.0.random", "works on images"),
    "image step behind": (["steps=[{dsir: {count: 3}}, {random: {ipc: 3}}]"], "steps.1.random", "works on images"),
    "two steps": ([TWO], "steps.1.dsir", "one step chooses"),
    "images": (["data={name: digits}"], "steps.0.dsir", "the data are images"),
    "students": (["evaluate.on=data"], "evaluate.on", "no student learns text"),
    "another device": (["--device", "cuda"], "--device", "no device serves"),
    "another field": (["data.field=txt"], "a/one.jsonl, line 1", "has no field 'txt'"),
    "another field of the target": (["target.field=txt"], "target.jsonl, line 1", "has no field 'txt'"),
    "no files": (["data.files=nothing/*.jsonl"], "data.files", "no file of text is there"),
    "no target files": (["target.files=nothing"], "target.files", "no file of text is there"),
    "a file of no kind": (["data.files=text.yaml"], "data.files", "no file of text that is known"),
    "proportions": (
        ["steps.0.dsir.proportions={a: 0.5, b: 0.5}"],
        "steps.0.dsir.proportions",
        "not those of the targets",
    ),
    "no budget": (["steps.0.dsir.count=null"], "steps.0.dsir", "exactly one of count and fraction"),
    "two budgets": (["steps.0.dsir.fraction=0.5"], "steps.0.dsir", "exactly one of count and fraction"),
    "too many": (["steps.0.dsir.count=118"], "steps.0.dsir.count", "118 documents are asked for"),
    "too many long": (["steps.0.dsir.count=117"], "steps.0.dsir.count", "117 documents are asked for"),
    "too large a share": (
        ["steps.0.dsir={fraction: 0.99, min_tokens: 10}"],
        "steps.0.dsir.fraction",
        "116 documents are asked for",
    ),
    "a target's name": (["target.files={'a b': target.jsonl}"], "target", "is no name of a target"),
    "targets as data": (["data.files={a: corpus}"], "data.files", ""),
    "an unknown engine": (["engine=spark"], "engine", "ray"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_refused(name: str, call: Call, text_recipe: Path, tmp_path: Path) -> None:
    arguments, where, what = WRONG[name]
    result = call("run", text_recipe, *arguments, "--out", "out")
    assert result.exit_code == 2, result.output
    assert where in result.stderr and what in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert len(re.findall(r"^  fix: ", result.stderr, re.MULTILINE)) <= 1, "one error"
    nothing_is_half_written(tmp_path / "out")


@pytest.mark.parametrize(
    ("argument", "where"), [("engine=ray", "engine"), ("target={name: text, files: t.jsonl}", "target.name")]
)
def test_what_belongs_to_text_is_refused_for_images(
    argument: str, where: str, call: Call, recipe: Path, tmp_path: Path
) -> None:
    result = call("run", recipe, argument, "--out", "out")
    assert result.exit_code == 2
    assert where in result.stderr and "images" in result.stderr
    nothing_is_half_written(tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"text": " "}\n', b'{"text": ""}\n'], ids=repr)
@pytest.mark.parametrize("section", ["data", "target"])
def test_files_without_a_word_are_refused(
    section: str, content: bytes, call: Call, text_recipe: Path, tmp_path: Path
) -> None:
    (tmp_path / "none.jsonl").write_bytes(content)
    result = call("run", text_recipe, f"{section}.files=none.jsonl", "--out", "out")
    assert result.exit_code == 2, result.output
    assert f"{section}: the {section} holds no words" in result.stderr
    assert call("run", text_recipe, f"{section}.files=none.jsonl", "--dry-run").exit_code == 0
    nothing_is_half_written(tmp_path / "out")


def test_a_target_that_shares_nothing_is_refused(call: Call, text_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "target.jsonl").write_text('{"text": "etwas ganz anderes"}\n')
    result = call("run", text_recipe, "steps.0.dsir.buckets=1000000", "--out", "out")
    assert result.exit_code == 2 and "shares no n-gram" in result.stderr
    nothing_is_half_written(tmp_path / "out")


# Files that are broken, that change, or that are bombs.


def test_rows_that_cannot_be_read(call: Call, text_recipe: Path, corpus: Path, tmp_path: Path) -> None:
    lines = lines_of(corpus / "c.jsonl")
    lines[6] = b'{"text": "cut'
    (corpus / "c.jsonl").write_bytes(b"\n".join(lines))
    refused = call("run", text_recipe, "--out", "out")
    assert refused.exit_code == 3
    assert "c.jsonl, line 7" in refused.stderr and "1 of 117 rows" in refused.stderr
    nothing_is_half_written(tmp_path / "out")
    allowed = call("run", text_recipe, "data.bad_lines=1%", "--out", "other")
    assert allowed.exit_code == 2, "a share is a number"
    allowed = call("run", text_recipe, "data.bad_lines=0.01", "--out", "other")
    assert allowed.exit_code == 0, allowed.output
    assert "c.jsonl, line 7, which is no JSON" in allowed.stderr
    assert re.search("unreadable +1 rows, left out", allowed.stdout)
    assert json.loads((tmp_path / "other" / "report.json").read_text())["corpus"]["unreadable"] == 1


@pytest.mark.parametrize("moment", ["count_corpus", "score_corpus", "count_chosen"])
@pytest.mark.parametrize("change", ["another time", "another size"])
def test_a_file_that_changes_is_refused_and_the_run_goes_on_when_it_may(
    moment: str,
    change: str,
    call: Call,
    text_recipe: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = getattr(dsir, moment)
    share = ["steps.0.dsir.fraction=0.3", "steps.0.dsir.count=null"]
    path = corpus / "c.jsonl"
    content = path.read_bytes()
    done = []

    def disturbed(*arguments: Any, **options: Any) -> Any:
        if not done:
            done.append(True)
            path.write_bytes(content + b"\n" * (change == "another size"))
            os.utime(path, ns=(1, 1))
        return begun(*arguments, **options)

    monkeypatch.setattr(dsir, moment, disturbed)
    result = call("run", text_recipe, *share, "--out", "out")
    assert result.exit_code == 2, result.output
    assert "has changed since the run began" in result.stderr and "c.jsonl" in result.stderr
    nothing_is_half_written(tmp_path / "out")
    path.write_bytes(content)
    again = call("run", text_recipe, *share, "--out", "out", "-q")
    assert again.exit_code == 0, again.output
    assert call("run", text_recipe, *share, "--out", "plain", "-q").exit_code == 0
    assert (tmp_path / "out" / "set.h5").read_bytes() == (tmp_path / "plain" / "set.h5").read_bytes()


def test_a_corpus_that_changed_after_an_interruption_is_read_again(
    call: Call, text_recipe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dsir, "score_corpus", stopped)
        assert call("run", text_recipe, "--out", "out").exit_code == 130
    nothing_is_half_written(tmp_path / "out")
    with (corpus / "c.jsonl").open("ab") as file:
        file.write(b'{"text": "more"}\n')
    assert call("run", text_recipe, "--out", "out").exit_code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["corpus"]["documents"] == 118


@pytest.mark.parametrize("readable", [False, True])
def test_a_bomb_is_refused(
    readable: bool,
    call: Call,
    text_recipe: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of lines that hold nothing, and of documents."""
    monkeypatch.setattr(streams, "_EXPANSION_FROM", 1 << 22)
    monkeypatch.setattr(streams, "_EXPANSION", 100)
    line = b'{"text": "' + b"boom " * 20_000 + b'"}\n' if readable else b"\n" * 100_000
    squeezed = zlib.compressobj(9, wbits=31)
    bomb = b"".join(squeezed.compress(line) for _ in range(100)) + squeezed.flush()
    (corpus / "a" / "bomb.jsonl.gz").write_bytes(bomb)
    result = call("run", text_recipe, "--out", "out")
    assert result.exit_code == 3, result.output
    told = "100 times" if readable else "more rows than bytes"
    assert "bomb.jsonl.gz" in result.stderr and told in result.stderr
    nothing_is_half_written(tmp_path / "out")


@pytest.mark.parametrize("name", ["b/two.jsonl.gz", "p.parquet"])
def test_a_damaged_file_is_told(
    name: str, call: Call, text_recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    path = corpus / name
    path.write_bytes(path.read_bytes()[:-20] if path.exists() else b"no parquet")
    result = call("run", text_recipe, "--out", "out")
    assert result.exit_code == 3, result.output
    assert name in result.stderr and "damaged" in result.stderr
    nothing_is_half_written(tmp_path / "out")


@pytest.mark.parametrize(
    "files", ["corpus", "corpus/**/*.jsonl", "corp*/out/*", "[target.jsonl, corpus/*/*.parquet]"]
)
@pytest.mark.parametrize("section", ["data", "target"])
def test_a_run_into_its_own_corpus_is_refused(
    section: str, files: str, call: Call, text_recipe: Path, corpus: Path
) -> None:
    """What it writes would be read as documents: log.jsonl, report.json, documents.parquet."""
    (corpus / "a" / "more.parquet").write_bytes(b"")
    before = sorted(corpus.rglob("*"))
    given = [f"{section}.files={files}", *(["data.files=corpus/a"] if section == "target" else [])]
    for option in ("--quiet", "--dry-run"):
        result = call("run", text_recipe, *given, "--out", corpus / "out", option)
        assert result.exit_code == 2, result.output
        assert f"{section}.files: a run would write among the files that it reads" in result.stderr
        assert sorted(corpus.rglob("*")) == before


def test_a_run_beside_its_corpus_is_no_run_into_it(call: Call, text_recipe: Path, corpus: Path) -> None:
    (corpus / "a" / "runs").mkdir()
    files = "data.files=corpus/*/*.jsonl*"  # not what lies deeper
    result = call("run", text_recipe, files, "--out", corpus / "a" / "runs" / "one", "--quiet")
    assert result.exit_code == 0, result.output


# Other kinds of files give the same choice.


def indices(call: Call, recipe: Path, name: str, files: str, *more: str) -> list[dict[str, Any]]:
    quiet = ["steps.0.dsir.noise=false", "--out", name, "--quiet"]
    result = call("run", recipe, f"data.files={files}", *more, *quiet)
    assert result.exit_code == 0, result.output
    assert call("export", Path(name) / "set.h5", "--to", "indices", "--out", f"{name}.i").exit_code == 0
    return [json.loads(line) for line in Path(f"{name}.i").read_text(encoding="utf-8").splitlines()]


def test_compressed_and_plain_files_and_parquet_give_the_same(
    call: Call, text_recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    """Names are other ones, so that the choice is made without noise."""
    import pyarrow
    import zstandard
    from pyarrow.parquet import write_table

    for kind in ("plain", "zstd", "parquet"):
        (tmp_path / kind).mkdir()
    for number, name in enumerate(("a/one.jsonl", "b/two.jsonl.gz", "c.jsonl")):
        lines = lines_of(corpus / name)[:40]
        content = b"\n".join(lines)
        (tmp_path / "plain" / f"{number}.jsonl").write_bytes(content)
        (tmp_path / "zstd" / f"{number}.jsonl.zst").write_bytes(zstandard.compress(content))
        texts = [json.loads(line)["text"] if line else None for line in lines]
        table = pyarrow.table({"text": texts, "more": list(range(40))})
        write_table(table, tmp_path / "parquet" / f"{number}.parquet", row_group_size=7)
    wanted = indices(call, text_recipe, "first", "corpus")
    assert len(wanted) == 12
    for kind in ("plain", "zstd", "parquet"):
        found = indices(call, text_recipe, f"by-{kind}", kind)
        for one, other in zip(wanted, found, strict=True):
            assert {**one, "file": None} == {**other, "file": None}
        assert {each["file"].partition(".")[2] for each in found} == {
            {"plain": "jsonl", "zstd": "jsonl.zst", "parquet": "parquet"}[kind]
        }
    written = call("export", Path("by-parquet") / "set.h5", "--to", "jsonl", "--out", "rows.jsonl")
    assert written.exit_code == 0, written.output
    rows = [json.loads(line) for line in Path("rows.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = chosen_lines(read_documents(tmp_path / "first" / "set.h5"), corpus)
    assert [row["text"] for row in rows] == [json.loads(line)["text"] for line in lines]
    assert [set(row) for row in rows] == [{"text", "more"}] * 12


def test_text_files_are_documents_by_line_or_whole(
    call: Call, text_recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    documents = [json.loads(line)["text"] for line in lines_of(corpus / "c.jsonl") if line]
    for number, text in enumerate(documents):
        (tmp_path / "texts" / f"{number:02}.txt").write_text(text.replace(" ", "\n"), encoding="utf-8")
    (tmp_path / "lines.txt").write_text("\n".join(documents), encoding="utf-8")
    whole = indices(call, text_recipe, "whole", "texts", "data.document=file")
    lines = indices(call, text_recipe, "lines", "lines.txt")
    assert [each["index"] for each in whole] == [each["index"] for each in lines]
    assert [each["score"] for each in whole] == [each["score"] for each in lines]
    assert [int(each["file"][:2]) for each in whole] == [each["row"] for each in lines]
    assert call("export", Path("whole") / "set.h5", "--to", "jsonl", "--out", "w.jsonl").exit_code == 0
    first = json.loads((tmp_path / "w.jsonl").read_text(encoding="utf-8").splitlines()[0])
    number = min(each["index"] for each in whole)
    assert first == {"text": documents[number].replace(" ", "\n")}
    assert np.all([each["row"] == 0 for each in whole])


@pytest.mark.skipif(os.name == "nt" or sys.platform == "darwin", reason="file names there are Unicode")
def test_names_and_texts_that_are_no_unicode(
    call: Call, text_recipe: Path, corpus: Path, tmp_path: Path
) -> None:
    """A file's name of any bytes, one that terminals obey, and halves of surrogate pairs in lines of JSON."""
    from pyarrow.parquet import read_table

    shutil.rmtree(corpus)
    corpus.mkdir()
    half = b'{"text": "w\\ud83d word1"}'
    for name in (b"a\xff.jsonl", b"\x1b[2J.jsonl"):
        Path(os.fsdecode(os.fsencode(corpus) + b"/" + name)).write_bytes(half + b'\n{"text": "word2"}\n{\n')
    options = ["steps.0.dsir.count=4", "steps.0.dsir.min_tokens=0", "data.bad_lines=0.5"]
    result = call("run", text_recipe, *options, "--out", "out")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and "2 of 6 rows" in result.stderr
    assert set(read_documents(tmp_path / "out" / "set.h5").files) == {"a\udcff.jsonl", "\x1b[2J.jsonl"}
    written = {}
    for to in ("jsonl", "parquet", "indices"):
        assert call("export", tmp_path / "out" / "set.h5", "--to", to, "--out", to).exit_code == 0
        written[to] = (tmp_path / to).read_bytes()
    assert written["jsonl"].splitlines().count(half) == 2
    names = {json.loads(line)["file"] for line in written["indices"].decode("utf-8").splitlines()}
    assert names == {"a\udcff.jsonl", "\x1b[2J.jsonl"}
    table = read_table(tmp_path / "parquet").to_pydict()
    assert sorted(table["text"]) == ["word2"] * 2 + ["w\ufffd word1"] * 2
    assert set(table["file"]) == {r"a\udcff.jsonl", "\x1b[2J.jsonl"}
    assert "\x1b" not in call("inspect", tmp_path / "out" / "set.h5").stdout
