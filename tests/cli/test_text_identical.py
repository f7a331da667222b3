"""Documents are chosen alike by one process, by two and by a Ray cluster, however files are named, ordered and cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from click.testing import Result

from distill.text import Corpus

Call = Callable[..., Result]
Choice = tuple[bytes, dict[str, object]]


@pytest.fixture
def choose(call: Call, text_recipe: Path, tmp_path: Path) -> Callable[..., Choice]:
    """choose(*arguments): the bytes of the set, and what the report found."""
    runs = 0

    def choose(*arguments: str) -> Choice:
        nonlocal runs
        runs += 1
        out = tmp_path / f"run-{runs}"
        result = call("run", text_recipe, *arguments, "--out", out, "--quiet")
        assert result.exit_code == 0, result.output
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        return (out / "set.h5").read_bytes(), {
            name: report[name]
            for name in ("chosen", "passed", "kl_reduction", "corpus", "targets", "examples")
        }

    return choose


@pytest.mark.parametrize("more", [[], ["steps.0.dsir.noise=false", "steps.0.dsir.hash=sha256"]])
@pytest.mark.parametrize("piece_bytes", [1 << 26, 700])
def test_two_processes_choose_as_one(
    more: list[str], piece_bytes: int, choose: Callable[..., Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = choose(*more)
    monkeypatch.setattr(Corpus.pieces, "__kwdefaults__", {"piece_bytes": piece_bytes})
    monkeypatch.setenv("DISTILL_WORKERS", "2")
    assert choose(*more) == alone


@pytest.mark.parametrize("piece_bytes", [600, 4000])
def test_pieces_do_not_matter(
    piece_bytes: int, choose: Callable[..., Choice], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["steps.0.dsir.by_length=true", "steps.0.dsir.truncate=true"]
    whole = choose(*options)
    monkeypatch.setattr(Corpus.pieces, "__kwdefaults__", {"piece_bytes": piece_bytes})
    assert choose(*options) == whole


def test_the_order_of_files_does_not_matter(choose: Callable[..., Choice], tmp_path: Path) -> None:
    wanted = choose()
    for files in (
        "[corpus/c.jsonl, corpus/b/two.jsonl.gz, corpus/a/one.jsonl]",
        "[corpus/b, corpus/c.jsonl, corpus/a, corpus/b/two.jsonl.gz]",
        "corpus/**/*.jsonl*",
        str(tmp_path / "corpus"),
    ):
        assert choose(f"data.files={files}") == wanted


def test_another_seed_chooses_others(choose: Callable[..., Choice]) -> None:
    """The control: these are choices that could differ."""
    assert choose()[1]["targets"] != choose("seed=4")[1]["targets"]


@pytest.fixture
def cluster(ray_cluster: Callable[..., AbstractContextManager[None]]) -> Iterator[None]:
    with ray_cluster():
        yield


@pytest.mark.slow
def test_a_ray_cluster_chooses_as_this_machine(
    choose: Callable[..., Choice],
    call: Call,
    text_recipe: Path,
    corpus: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Many pieces for two nodes; and a corpus that it cannot read is told as here."""
    monkeypatch.setattr(Corpus.pieces, "__kwdefaults__", {"piece_bytes": 2000})
    assert choose("engine=ray") == choose("engine=local")
    (corpus / "c.jsonl").write_bytes(b'{"text": "a b"}\n' * 20 + b"{\n")
    for engine in ("local", "ray"):
        refused = call("run", text_recipe, f"engine={engine}", "--out", engine)
        assert refused.exit_code == 3 and "c.jsonl, line 21" in refused.stderr, refused.output
        assert not (Path(engine) / "set.h5").exists()
