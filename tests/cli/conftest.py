"""A recipe that runs in a second or two, and a way to call the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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
