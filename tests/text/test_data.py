"""The data name `text`: what a recipe may say of files, and where errors say that they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill.errors import InputError
from distill.text.data import ONLY, Text, TextConfig, TextTarget, TextTargetConfig


def data(**options: Any) -> TextConfig:
    return TextConfig.model_validate({"name": "text", "files": "a", **options})


def target(**options: Any) -> TextTargetConfig:
    return TextTargetConfig.model_validate({"name": "text", "files": "a", **options})


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.jsonl", "a/2.txt", "b/3.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_defaults() -> None:
    config = data()
    assert (config.field, config.document, config.bad_lines, config.document_bytes) == (
        "text", "line", 0.001, 16 << 20,
    )  # fmt: skip
    assert Text.Config is TextConfig and TextTarget.Config is TextTargetConfig
    assert Text.name == TextTarget.name == "text"


@pytest.mark.parametrize("config", [data, target])
@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"files": ""}, "files"),
        ({"files": []}, "files"),
        ({"files": ["a", ""]}, "files"),
        ({"files": 3}, "files"),
        ({"field": ""}, "field"),
        ({"document": "page"}, "document"),
        ({"bad_lines": 1.5}, "bad_lines"),
        ({"bad_lines": -0.1}, "bad_lines"),
        ({"document_bytes": 0}, "document_bytes"),
        ({"lang": "en"}, "lang"),
    ],
)
def test_values_that_cannot_be(config: Any, options: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**options)
    assert {error["loc"][0] for error in caught.value.errors()} == {where}


def test_only_targets_have_names() -> None:
    with pytest.raises(ValidationError):
        data(files={"a": "b"})
    assert dict(target(files={"b": "x", "a.1_é-": ["y", "z"]}).named) == {"b": "x", "a.1_é-": ["y", "z"]}
    assert list(target(files={"b": "x", "a": "y"}).named) == ["b", "a"], "in the order of the recipe"
    assert dict(target(files=["x", "y"]).named) == {ONLY: ["x", "y"]}


@pytest.mark.parametrize("name", ["", " a", "a b", "-a", "a/b", "<b>", "a\n", ".a"])
def test_names_that_cannot_be_told(name: str) -> None:
    with pytest.raises(ValidationError, match="is no name of a target"):
        target(files={name: "x"})


@pytest.mark.parametrize("files", [{}, {"a": ""}, {"a": []}, {"a": {"b": "c"}}])
def test_targets_without_files(files: Any) -> None:
    with pytest.raises(ValidationError):
        target(files=files)


def test_a_corpus_is_opened_with_its_options(files: Path) -> None:
    options = {"field": "body", "document": "file", "bad_lines": 0.5, "document_bytes": "1 MiB"}
    for corpus in (data(**options).open(), target(**options).open_targets()[ONLY]):
        assert [file.name for file in corpus.files] == ["1.jsonl", "2.txt"]
        config = corpus.config
        assert (config.field, config.document, config.bad_lines) == ("body", "file", 0.5)
        assert config.document_bytes == 1 << 20
    both = data(files=["b/*", "a"]).open()
    assert [file.name for file in both.files] == ["a/1.jsonl", "a/2.txt", "b/3.parquet"]


def test_every_target_is_a_corpus_of_its_own(files: Path) -> None:
    opened = target(files={"two": "b", "one": ["a/1.jsonl"]}).open_targets()
    assert {name: [file.name for file in corpus.files] for name, corpus in opened.items()} == {
        "two": ["3.parquet"], "one": ["1.jsonl"],
    }  # fmt: skip
    assert list(opened) == ["two", "one"]


@pytest.mark.parametrize(
    ("found", "where"),
    [
        (lambda: data(files="none").open(), "data.files"),
        (lambda: target(files="none").open_targets(), "target.files"),
        (lambda: target(files={"a": "a", "b": "none"}).open_targets(), "target.files.b"),
    ],
)
def test_errors_say_which_files_they_mean(found: Any, where: str, files: Path) -> None:
    with pytest.raises(InputError, match="no file of text is there") as caught:
        found()
    assert caught.value.where == where
