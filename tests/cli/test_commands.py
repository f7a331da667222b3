"""The smaller commands: evaluate, inspect, recipes, methods, schema, --help."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from distill import cli

Call = Callable[..., Result]
ROOT = Path(__file__).parents[2]


def test_evaluate_takes_its_data_from_the_set(call: Call, made: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved.h5"
    moved.write_bytes(made.read_bytes())
    options = ("--students", "mlp", "--seeds", "3", "--against", "random", "--regime", "soft", "--json")
    result = call("evaluate", moved, *options)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = {(row["arm"], row["regime"], row["student"], row["seeds"]) for row in report["results"]}
    assert rows == {("set", "soft", "mlp-w128-d2", 3), ("random", "hard", "mlp-w128-d2", 3)}


def test_evaluate_labels_random_images_like_the_set(call: Call, made: Path) -> None:
    result = call("evaluate", made, "--against", "random,random_soft", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    arms = {(row["arm"], row["regime"]): row["accuracies"] for row in report["results"]}
    assert arms.keys() == {("set", "hard"), ("set", "soft"), ("random", "soft"), ("random", "hard")}
    assert arms["random", "soft"] != arms["random", "hard"], "other labels teach otherwise"


def test_a_run_without_teachers_refuses_to_label_random_images(
    call: Call, recipe: Path, tmp_path: Path
) -> None:
    steps = "steps=[{kcenter: {ipc: 2}}]"
    result = call("run", recipe, steps, "evaluate.against=[random_soft]", "--out", "out")
    assert result.exit_code == 2
    assert "no teacher labels the set" in result.stderr and "the last step is kcenter" in result.stderr
    assert not (tmp_path / "out" / "set.h5").exists()


def test_evaluate_writes_a_report_where_asked(call: Call, made: Path, tmp_path: Path) -> None:
    assert call("evaluate", made, "--seeds", "2", "--out", "again").exit_code == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"report.json", "report.html"}


def test_evaluate_repeats_the_run(call: Call, made: Path) -> None:
    report = json.loads(made.with_name("report.json").read_text())
    again = json.loads(call("evaluate", made, "--json").stdout)
    assert again["results"] == report["results"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--regime", "teacher"), "hard, soft"),
        (("--against", "everything"), "random"),
        (("--students", "convnett"), "did you mean 'convnet'"),
        (("data.name=folder",), "folder"),
    ],
)
def test_evaluate_refuses(call: Call, made: Path, options: tuple[str, ...], said: str) -> None:
    result = call("evaluate", made, *options)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_evaluate_warns_of_other_data(call: Call, made: Path) -> None:
    result = call("evaluate", made, "data.cap=20", "--against", "random")
    assert result.exit_code == 0, result.output
    assert "not the training data" in result.stderr


def test_inspect(call: Call, made: Path) -> None:
    text = call("inspect", made, "--verify").stdout
    assert "30 of 8 x 8 x 1, uint8" in text and "verified" in text
    summary = json.loads(call("inspect", made, "--json").stdout)
    assert summary["bytes"]["total"] == made.stat().st_size


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "flipped"])
def test_inspect_refuses_what_is_no_set(call: Call, made: Path, tmp_path: Path, damage: str) -> None:
    path, content = tmp_path / "bad.h5", bytearray(made.read_bytes())
    if damage == "text":
        path.write_text("hello")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    result = call("inspect", path, "--verify")
    assert result.exit_code == (2 if damage == "missing" else 3)
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr


def test_shipped_recipes_are_listed_shown_and_valid(call: Call) -> None:
    from distill.recipe import load_recipe

    names = [line.split()[0] for line in call("recipes", "ls").stdout.splitlines()]
    assert {"digits", "digits-kcenter", "digits-herding", "mnist", "cifar10", "folder"} <= set(names)
    for name in names:
        text = call("recipes", "show", name).stdout
        assert text == (ROOT / "recipes" / f"{name}.yaml").read_text()
        assert text.startswith("# ") and f"distill run {name}" in text
        load_recipe(name)
    assert call("recipes", "show", "digit").exit_code == 2


def test_recipes_are_listed_in_whole_sentences(call: Call) -> None:
    lines = dict(line.split(maxsplit=1) for line in call("recipes", "ls").stdout.splitlines())
    assert all(line.endswith(".") for line in lines.values())
    assert lines["digits-tarot"].endswith(" all digits to resemble those of the validation split.")
    assert lines["imagenet-nrr"].endswith("NRR-DD, CVPR 2025."), "the first sentence of two"


def test_recipes_are_wrapped_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "name     Digits, 60 images for telling threes apart: picked by optimal transport."
    assert cli._wrapped(line, indent=9) == line, "a pipe"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    assert cli._wrapped(line, indent=9).splitlines() == [
        "name     Digits, 60 images for telling",
        "         threes apart: picked by optimal",
        "         transport.",
    ]
    monkeypatch.setenv("COLUMNS", "38")
    assert cli._wrapped(line, indent=9) == line, "no room for a column"


def test_methods_and_schema(call: Call) -> None:
    for arguments in (("methods",), ("methods", "ls")):
        text = call(*arguments).stdout
        assert [line.split()[:2] for line in text.splitlines()] == [
            ["random", "selector"],
            ["kcenter", "selector"],
            ["herding", "selector"],
            ["facility_location", "selector"],
            ["graph_cut", "selector"],
            ["craig", "selector"],
            ["gradmatch", "selector"],
            ["glister", "selector"],
            ["kmeans", "selector"],
            ["semdedup", "selector"],
            ["simcore", "selector"],
            ["tarot", "selector"],
            ["importance", "selector"],
            ["trak", "selector"],
            ["less", "selector"],
            ["score", "selector"],
            ["ccs", "selector"],
            ["d2", "selector"],
            ["dsir", "selector"],
            ["soft_label", "distiller"],
            ["trajectory", "distiller"],
            ["committee", "distiller"],
            ["nrr", "distiller"],
        ]
    assert "kcenter" in json.dumps(json.loads(call("schema").stdout))


def test_help_is_there_for_every_command(call: Call) -> None:
    commands = (
        [],
        ["run"],
        ["evaluate"],
        ["inspect"],
        ["recipes"],
        ["recipes", "ls"],
        ["methods"],
        ["schema"],
    )
    for command in commands:
        assert "Usage:" in call(*command, "--help").stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from distill.cli import main;"
        "CliRunner().invoke(main, ['run', '--help']);"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'h5py', 'rich') if name in sys.modules])"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]", f"after {time.monotonic() - start:.1f} s"


def test_evaluate_changes_only_what_is_named(call: Call, recipe: Path, tmp_path: Path) -> None:
    """The temperature that soft_label gave the set stays, whatever else of `train` is overridden."""
    assert call("run", recipe, "steps.1.temperature=4", "--out", "warm", "--quiet").exit_code == 0
    path = tmp_path / "warm" / "set.h5"
    options = ("--against", "random", "--json")
    plain = json.loads(call("evaluate", path, *options).stdout)["results"]
    named = json.loads(call("evaluate", path, "train.epochs=2", *options).stdout)["results"]
    assert named == plain
