"""`distill run`: what it writes, that it repeats itself, goes on after an interruption, and refuses clearly."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

import distill
from distill.contracts import Method
from distill.evaluation.protocol import Ledger
from distill.evaluation.results import from_report

Call = Callable[..., Result]
OUTPUTS = {"set.h5", "report.json", "report.html", "recipe.yaml", "log.jsonl"}


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_run_writes_its_five_files_and_tells_where(call: Call, recipe: Path, tmp_path: Path) -> None:
    result = call("run", recipe, "--out", "out")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path / "out") == OUTPUTS
    lines = result.stdout.splitlines()
    assert lines[-3:] == [str(Path("out") / name) for name in ("set.h5", "report.json", "report.html")]
    assert any(line.split()[:3] == ["set", "soft", "mlp-w8-d2"] for line in lines)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {(row["arm"], row["regime"]) for row in report["results"]} == {
        ("set", "hard"),
        ("set", "soft"),
        ("random", "hard"),
        ("full", "hard"),
    }
    assert set(report["cost"]) == {"data", "selector kcenter", "distiller soft_label", "evaluate"}
    assert report["bytes"]["total"] == (tmp_path / "out" / "set.h5").stat().st_size
    assert report["paired"][0]["arm_b"] == "random"
    from_report(report, where="report.json")


def test_the_same_recipe_gives_the_same_bytes(call: Call, recipe: Path, tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b", "a"):  # another folder, then the same one again, its cache warm
        assert call("run", recipe, "--out", name, "--fresh", "--quiet").exit_code == 0
        contents.append((tmp_path / name / "set.h5").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_a_finished_run_is_not_run_again(call: Call, recipe: Path, tmp_path: Path) -> None:
    first = call("run", recipe, "--out", "out")
    kept = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()}
    again = call("run", recipe, "--out", "out")
    assert again.exit_code == 0, again.output
    assert again.stdout == first.stdout
    assert "is finished" in again.stderr and "--fresh" in again.stderr
    assert "started" not in again.stderr
    assert kept == {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (tmp_path / "out").iterdir()
    }
    resumed = call("run", recipe, "--out", "out", "--resume")
    assert resumed.exit_code == 2
    assert "a finished run" in resumed.stderr


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1}'])
def test_a_finished_run_whose_report_is_damaged(
    call: Call, recipe: Path, tmp_path: Path, damage: str
) -> None:
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 0
    (tmp_path / "out" / "report.json").write_text(damage)
    result = call("run", recipe, "--out", "out")
    assert result.exit_code == 3
    assert "report.json" in result.stderr and "Traceback" not in result.stderr


def test_old_results_stay_until_the_new_ones_stand(call: Call, recipe: Path, tmp_path: Path) -> None:
    """A fresh run that fails leaves the earlier results, twice in a row; one that succeeds replaces them."""
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 0
    old = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for _ in range(2):
        result = call("run", recipe, "train.lr=1e30", "--out", "out", "--fresh")
        assert result.exit_code == 2
        assert f"kept in {Path('out') / 'previous'}" in result.stderr
        previous = tmp_path / "out" / "previous"
        assert {path.name: path.read_bytes() for path in previous.iterdir()} == old
    assert call("run", recipe, "--out", "out", "--fresh", "--quiet").exit_code == 0
    assert listing(tmp_path / "out") == OUTPUTS


def test_the_set_does_not_know_where_it_was_made(call: Call, recipe: Path, tmp_path: Path) -> None:
    assert call("run", recipe, f"cache.folder={tmp_path}/other", "--out", tmp_path / "out").exit_code == 0
    provenance = distill.load(tmp_path / "out" / "set.h5").set.provenance
    assert str(tmp_path) not in json.dumps(provenance)
    assert provenance["seed"] == 3
    assert "cache" not in provenance["recipe"]


def test_seed_changes_the_set_and_is_recorded(call: Call, recipe: Path, tmp_path: Path) -> None:
    assert call("run", recipe, "--out", "a", "--quiet").exit_code == 0
    assert call("run", recipe, "--out", "b", "--seed", "4", "--quiet").exit_code == 0
    assert (tmp_path / "a" / "set.h5").read_bytes() != (tmp_path / "b" / "set.h5").read_bytes()
    assert yaml.safe_load((tmp_path / "b" / "recipe.yaml").read_text())["seed"] == 4


def test_the_merged_recipe_runs_to_the_same_set(call: Call, recipe: Path, tmp_path: Path) -> None:
    assert call("run", recipe, "train.epochs=3", "--out", "a", "--quiet").exit_code == 0
    assert call("run", tmp_path / "a" / "recipe.yaml", "--out", "b", "--quiet").exit_code == 0
    assert (tmp_path / "a" / "set.h5").read_bytes() == (tmp_path / "b" / "set.h5").read_bytes()


def test_another_recipe_in_the_folder_is_refused_with_the_difference(call: Call, recipe: Path) -> None:
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 0
    result = call("run", recipe, "train.epochs=3", "--out", "out")
    assert result.exit_code == 2
    assert "    train.epochs: 2 -> 3\n" in result.stderr
    assert "--fresh" in result.stderr
    dry = call("run", recipe, "train.epochs=3", "--out", "out", "--dry-run")
    assert (dry.exit_code, dry.stderr) == (2, result.stderr)
    assert call("run", recipe, "train.epochs=3", "--out", "out", "--fresh", "--quiet").exit_code == 0


def test_resume_without_an_interrupted_run_is_refused(call: Call, recipe: Path, tmp_path: Path) -> None:
    result = call("run", recipe, "--out", "out", "--resume")
    assert result.exit_code == 2
    assert "no interrupted run" in result.stderr
    assert not (tmp_path / "out").exists()
    assert call("run", recipe, "--resume", "--fresh").exit_code == 2


def test_an_interrupted_run_goes_on(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop after two students; steps and those students are not computed again, and nothing else differs."""
    assert call("run", recipe, "--out", "whole", "--quiet").exit_code == 0
    add, added = Ledger.add, []

    def stop_after_two(ledger: Ledger, job: str, accuracy: float) -> None:
        add(ledger, job, accuracy)
        added.append(job)
        if len(added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "add", stop_after_two)
    result = call("run", recipe, "--out", "cut")
    assert result.exit_code == 130
    assert "goes on from here" in result.stderr
    assert not (tmp_path / "cut" / "report.json").exists()

    runs: list[str] = []
    for cls in {type(step) for step in _steps(recipe)}:
        monkeypatch.setattr(cls, "run", lambda self, *_: runs.append(self.name))
    resumed = call("run", recipe, "--out", "cut")
    assert resumed.exit_code == 0, resumed.output
    assert runs == []
    assert "2 of 8 students are known" in resumed.stderr
    assert listing(tmp_path / "cut") == OUTPUTS
    assert (tmp_path / "cut" / "set.h5").read_bytes() == (tmp_path / "whole" / "set.h5").read_bytes()
    results = [
        json.loads((tmp_path / name / "report.json").read_text())["results"] for name in ("whole", "cut")
    ]
    assert results[0] == results[1]


def _steps(recipe: Path) -> list[Method]:
    from distill.pipeline import make_steps
    from distill.recipe import load_recipe

    return make_steps(load_recipe(str(recipe)).recipe)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_can_be_resumed(recipe: Path, tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "distill", "run", str(recipe), "evaluate.seeds=30", "--out", "out", "-q"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "DISTILL_WORKERS": "2"}
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    ledger = tmp_path / "out" / ".resume" / "students.jsonl"
    deadline = time.monotonic() + 60
    while not ledger.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    code = process.wait(30)
    assert code == (-9 if number == signal.SIGKILL else 130)
    known = len(ledger.read_text().splitlines())
    assert 0 < known < 120
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert listing(tmp_path / "out") == OUTPUTS


def test_two_runs_in_one_folder_are_kept_apart(call: Call, recipe: Path, tmp_path: Path) -> None:
    from distill.run_folder import RunFolder

    with RunFolder(tmp_path / "out").locked():
        result = call("run", recipe, "--out", "out")
    assert result.exit_code == 2
    assert "another run" in result.stderr


def test_a_dry_run_writes_nothing_and_lists_what_would_be(call: Call, recipe: Path, tmp_path: Path) -> None:
    before = listing(tmp_path)
    result = call("run", recipe, "--dry-run", "--out", "out")
    assert result.exit_code == 0, result.output
    assert listing(tmp_path) == before
    for name in OUTPUTS:
        assert str(Path("out") / name) in result.stdout
    for word in ("time", "memory", "disk", "30 images"):
        assert word in result.stdout


def test_a_dry_run_tells_what_the_folder_holds(call: Call, recipe: Path) -> None:
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 0
    assert "is finished" in call("run", recipe, "--out", "out", "--dry-run").stdout
    assert call("run", recipe, "--out", "out", "--dry-run", "--resume").exit_code == 2
    fresh = call("run", recipe, "train.epochs=3", "--out", "out", "--dry-run", "--fresh")
    assert (fresh.exit_code, "is finished" in fresh.stdout) == (0, False)


def test_a_dry_run_counts_the_images_that_the_run_uses(call: Call, recipe: Path) -> None:
    counts = "10 classes of 1 x 8 x 8 images; 270 train, 30 valid, 359 test"
    assert counts in call("run", recipe, "--dry-run").stdout
    assert counts in call("run", recipe, "--out", "out").stderr


BUDGETS = [
    (["steps.0.ipc=28"], "steps.0.kcenter: 28 images per class"),
    (["steps=[{random: {ipc: 5}}, {kcenter: {ipc: 6}}]"], "steps.1.kcenter: 6 images per class"),
    (
        ["steps=[{random: {fraction: 0.1}}, {random: {fraction: 0.1}}]"],
        "steps.1.random: a fraction of 0.1 keeps 3 images",
    ),
    (["steps=[{soft_label: {ipc: 28}}]"], "steps.0.soft_label: 28 images per class"),
]


@pytest.mark.parametrize(("arguments", "said"), BUDGETS, ids=[said for _, said in BUDGETS])
@pytest.mark.parametrize("option", ["--dry-run", "--quiet"])
def test_a_budget_that_cannot_be_kept_is_refused_before_work(
    call: Call, recipe: Path, arguments: list[str], said: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill import pipeline

    def run(*_: object) -> None:
        raise AssertionError("a step was run")

    monkeypatch.setattr(pipeline, "_run_steps", run)
    result = call("run", recipe, *arguments, option)
    assert result.exit_code == 2
    assert said in result.stderr


def test_the_cost_of_an_interrupted_evaluation_counts_its_parts(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Ledger.add
    calls = []

    def slow(ledger: Ledger, job: str, accuracy: float) -> None:
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        time.sleep(1.0 if len(calls) < 3 else 0.0)
        add(ledger, job, accuracy)

    monkeypatch.setattr(Ledger, "add", slow)
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 130
    start = time.monotonic()
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 0
    last = time.monotonic() - start
    cost = json.loads((tmp_path / "out" / "report.json").read_text())["cost"]
    assert 2.0 <= cost["evaluate"]["seconds"] < 2.0 + last + 5


def test_python_has_the_same_functions(recipe: Path, tmp_path: Path) -> None:
    result = distill.run(recipe, out=tmp_path / "out", quiet=True)
    assert result.folder.set.is_file()
    assert len(distill.load(result.folder.set)) == 30
    evaluation = distill.evaluate(result.folder.set, against=["random"], quiet=True)
    assert {row.arm for row in evaluation.results} == {"set", "random"}


BAD = [
    (["seed=-1"], 2, "seed"),
    (["train.epochs=0"], 2, "train.epochs"),
    (["data.name=digts"], 2, "did you mean 'digits'"),
    (["steps.0.ipc=1000"], 2, "images per class"),
    (["steps.1.ipc=3"], 2, "steps.1.soft_label"),
    (["data.cap=1", "data.valid=0.9"], 2, "no training image"),
    (["data={name: folder, folder: nowhere}"], 2, "nowhere"),
    (["--device", "cuda:99"], 2, "cuda:99"),
    (["--device", "quantum"], 2, "quantum"),
    (["cache.folder=tiny.yaml"], 2, "tiny.yaml"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), BAD, ids=[" ".join(bad[0]) for bad in BAD])
def test_bad_input_is_one_clear_error(
    call: Call, recipe: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    result = call("run", recipe, "--out", "out", *arguments)
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.glob("out/set.h5"))


def test_debug_shows_the_traceback(call: Call, recipe: Path) -> None:
    assert "Traceback" in call("run", recipe, "seed=-1", "--debug").stderr


def test_five_mistakes_are_five_errors(call: Call, tmp_path: Path) -> None:
    path = tmp_path / "five.yaml"
    path.write_text(
        "seed: many\n"
        "data: {name: digts}\n"
        "train:\n"
        "  epoch: 3\n"
        "steps:\n"
        "  - kcentre: {ipc: 1}\n"
        "evaluate: {seeds: 1}\n"
    )
    result = call("run", path)
    assert result.exit_code == 2
    for line, key in (
        (1, "seed"),
        (2, "data.name"),
        (4, "train.epoch"),
        (6, "steps.0"),
        (7, "evaluate.seeds"),
    ):
        assert f"{path}:{line}: {key}" in result.stderr


def test_an_unwritable_folder(call: Call, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = call("run", recipe, "--out", Path("file") / "out")
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_a_full_disk(call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system refuses the last move of set.h5: exit code 2, and nothing half-written."""
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if Path(target).name == "set.h5":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    result = call("run", recipe, "--out", "out")
    assert result.exit_code == 2
    assert "the disk is full" in result.stderr
    assert not (tmp_path / "out" / "set.h5").exists()
    assert not list((tmp_path / "out").glob("*.partial"))


def test_out_of_memory_names_the_knob(call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from distill.training import loop

    def exhaust(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(loop, "_fit", exhaust)
    result = call("run", recipe, "--out", "out")
    assert result.exit_code == 4
    assert "batch_size" in result.stderr


def test_a_defect_of_ours_says_so(call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distill import pipeline

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr(pipeline, "open_source", fail)
    result = call("run", recipe, "--out", "out")
    assert result.exit_code == 1
    assert "defect" in result.stderr and "surprise" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_diverging_student_says_what_to_change_and_the_set_stays(
    call: Call, recipe: Path, tmp_path: Path
) -> None:
    result = call("run", recipe, "--out", "out", "train.lr=1e30")
    assert result.exit_code == 2
    assert "lower lr" in result.stderr and "student mlp-w8-d2 on" in result.stderr
    assert call("inspect", tmp_path / "out" / "set.h5", "--verify").exit_code == 0


def test_a_run_that_failed_early_does_not_block_its_folder(call: Call, recipe: Path, tmp_path: Path) -> None:
    assert call("run", recipe, "--out", "out", "steps.0.ipc=1000").exit_code == 2
    assert not (tmp_path / "out" / ".lock").exists()
    assert call("run", recipe, "--out", "out", "--quiet").exit_code == 0
    assert listing(tmp_path / "out") == OUTPUTS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "RECIPE", "--out", "out"), "interrupted; the same command goes on from here"),
        (("run", "RECIPE", "--out", "out", "--fresh"), "the same command without --fresh goes on from here"),
        (("evaluate", "SET"), "the same command starts again"),
    ],
)
def test_ctrl_c_promises_what_is_true(
    call: Call,
    recipe: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    said: str,
) -> None:
    from distill import pipeline

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "open_source", interrupt)
    paths = {"RECIPE": str(recipe), "SET": str(made), "out": "another"}
    result = call(*(paths.get(argument, argument) for argument in arguments))
    assert result.exit_code == 130
    assert said in result.stderr


def test_steps_of_one_method_have_costs_of_their_own(recipe: Path, tmp_path: Path) -> None:
    steps = [{"random": {"ipc": 4}}, {"random": {"ipc": 2}}]
    done = distill.run(
        {**yaml.safe_load(recipe.read_text()), "steps": steps}, out=tmp_path / "out", quiet=True
    )
    assert [name for name in done.evaluation.cost if "random" in name] == [
        "selector random (step 0)",
        "selector random (step 1)",
    ]


def test_what_a_method_says_of_its_set_is_kept(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from distill.distillers.soft_label import SoftLabel

    plain = SoftLabel.run

    def telling(step: SoftLabel, *arguments: Any) -> Any:
        return replace(plain(step, *arguments), provenance={"rounds": 3})

    monkeypatch.setattr(SoftLabel, "run", telling)
    assert call("run", recipe, "--out", "out").exit_code == 0
    assert distill.load(tmp_path / "out" / "set.h5").set.provenance["method"] == {"rounds": 3}
