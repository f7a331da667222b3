"""The data name `text` of recipes: files of text to choose documents from, and files that they are to resemble."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distill.machine_paths import MachinePath
from distill.text.corpus import Corpus, CorpusConfig, find_files

_Path = Annotated[str, Field(min_length=1)]  # an empty one would be the folder that one stands in
Files = _Path | Annotated[list[_Path], Field(min_length=1)]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
ONLY = "target"  # the name of a target that has none of its own


class TextConfig(CorpusConfig):
    """Files of text.

    Args:
        name: the data name.
        files: a path, a folder (every file below it that can be read) or a pattern such as `data/**/*.jsonl.gz`, or a
            list of them. JSON lines and text files may be compressed by gzip or zstd; parquet is read too.
        field: name of the text in lines of JSON, and in parquet.
        document: in text files a document is a `line` or the whole `file`.
        bad_lines: share of rows that may be unreadable; they are left out and counted.
        document_bytes: longest line that is read.
    """

    name: Literal["text"]
    files: Annotated[Files, MachinePath()]  # type: ignore[assignment]

    def corpus_config(self, files: str | list[str]) -> CorpusConfig:
        """How these files are read."""
        options = self.model_dump(exclude={"files"})
        return CorpusConfig(files=[files] if isinstance(files, str) else files, **options)

    def open(self) -> Corpus:
        """The corpus of a recipe's `data`. Errors: see `find_files`."""
        return find_files(self.corpus_config(self.files), where="data.files")


class TextTargetConfig(TextConfig):
    """Files of text that documents are to resemble; `files` of several targets is a mapping of their names to files."""

    files: Annotated[Files | Annotated[dict[str, Files], Field(min_length=1)], MachinePath()]  # type: ignore[assignment]

    @model_validator(mode="after")
    def _names_that_can_be_told(self) -> Self:
        wrong = [name for name in self.named if not _NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no name of a target: letters, digits, _, - and . are")
        return self

    @property
    def named(self) -> Mapping[str, str | list[str]]:
        """The files of each target by its name."""
        return self.files if isinstance(self.files, dict) else {ONLY: self.files}

    def open_targets(self) -> dict[str, Corpus]:
        """Every target, in the order of the recipe. Errors: see `find_files`."""
        several = isinstance(self.files, dict)
        return {
            name: find_files(
                self.corpus_config(files), where=f"target.files.{name}" if several else "target.files"
            )
            for name, files in self.named.items()
        }


class Text:
    """The data name `text`."""

    name = "text"
    Config = TextConfig


class TextTarget:
    """The target name `text`."""

    name = "text"
    Config = TextTargetConfig
