"""Recipes that run in a second or two, of images and of text, and a way to call the command line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from distill.cli import main

RECIPE = """\
seed: 3
data: {name: digits, cap: 30}
train: {epochs: 2, batch_size: 20, augment: crop}
steps:
  - kcenter: {ipc: 3, features: pixels}
  - soft_label: {teacher: {model: {name: mlp, width: 8}, train: {epochs: 2}}}
evaluate: {students: [{name: mlp, width: 8}], seeds: 2, against: [random, full]}
"""
TEXT_RECIPE = """\
seed: 3
data: {name: text, files: corpus}
target: {name: text, files: target.jsonl}
steps: [{dsir: {count: 12, min_tokens: 10, ngrams: 1, buckets: 1000}}]
"""

Call = Callable[..., Result]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DISTILL_WORKERS", "1")  # one process: the work is too small for more
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def call() -> Call:
    def invoke(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def made(call: Call, recipe: Path, tmp_path: Path) -> Path:
    """The set of a finished run."""
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 0
    return tmp_path / "out" / "set.h5"


def text_lines(count: int, seed: int, *, kinds: int = 2) -> list[bytes]:
    """Lines of JSON as no writer of ours would write them: spaces, escapes and other fields; the third is empty.

    Documents are of two kinds, whose words are seldom and often in other ways.
    """
    rng = np.random.default_rng(seed)
    words = [f"word{number}" if number % 5 else f"größe{number}" for number in range(40)]
    shares = np.random.default_rng(0).dirichlet(np.full(40, 0.5), size=2)
    lines = []
    for number in range(count):
        text = " ".join(rng.choice(words, rng.integers(5, 40), p=shares[number % kinds]))
        told = json.dumps(text, ensure_ascii=number % 2 == 0)
        lines.append(f'{{ "id" : {number},"text":{told}, "more": [1.50, null]  }}'.encode())
    lines[2] = b""
    return lines


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three files of 40 lines, one of them compressed, and beside them target.jsonl of 60 of one kind."""
    for seed, name in enumerate(("a/one.jsonl", "b/two.jsonl.gz", "c.jsonl")):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = b"\n".join(text_lines(40, seed + 1)) + b"\n"
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    (tmp_path / "target.jsonl").write_bytes(b"\n".join(text_lines(60, 9, kinds=1)))
    return tmp_path / "corpus"


@pytest.fixture
def text_recipe(corpus: Path, tmp_path: Path) -> Path:
    """Twelve documents of the corpus."""
    path = tmp_path / "text.yaml"
    path.write_text(TEXT_RECIPE)
    return path


@pytest.fixture
def chosen_documents(call: Call, text_recipe: Path, tmp_path: Path) -> Path:
    """The set of a finished run over text, in `out`."""
    assert call("run", text_recipe, "--out", "out", "--quiet").exit_code == 0
    return tmp_path / "out" / "set.h5"
