"""The summary behind `distill inspect`: stable names, bytes that add up, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet
from distill.errors import DamagedDataError, InputError
from distill.store.summary import describe, summarise
from distill.store.writer import write_set


def test_names_and_values(file: Path) -> None:
    summary = summarise(file, verify=True)
    assert list(summary) == [
        "path",
        "format_version",
        "content_sha256",
        "images",
        "classes",
        "images_per_class",
        "labels",
        "bytes",
        "preprocessing",
        "train_recipe",
        "selection",
        "provenance",
        "arrays",
    ]
    assert summary["images"] == {"shape": [6, 4, 5, 2], "dtype": "float16"}
    assert summary["labels"] == {
        "hard": {"shape": [6], "dtype": "int64"},
        "soft": {
            "codec": "full",
            "teacher": "convnet",
            "temperature": 4.0,
            "epochs": 3,
            "arrays": {"logits": {"shape": [2, 6, 3], "dtype": "float16"}},
        },
    }
    assert summary["preprocessing"] == {"mean": [0.1, 1 / 3], "std": [0.3, 0.25], "zca": True}
    assert summary["train_recipe"]["lr"] == 0.1 + 0.2
    meta = {"score": "distance to the nearest pick"}
    weights = {"least": 0.25, "greatest": 1.75}
    assert summary["selection"] == {"count": 6, "rows": True, "weights": weights, "meta": meta}
    assert summary["images_per_class"] == [2, 2, 2]
    assert summary["provenance"]["recipe"] == {"steps": [{"kcenter": {"ipc": 2}}]}
    assert json.loads(json.dumps(summary)) == summary


def test_a_set_without_options(plain: DistilledSet, tmp_path: Path) -> None:
    write_set(plain, tmp_path / "set.h5")
    summary = summarise(tmp_path / "set.h5", verify=False)
    assert (summary["labels"]["soft"], summary["selection"]) == (None, None)
    assert summary["preprocessing"]["zca"] is False
    assert {entry["verified"] for entry in summary["arrays"]} == {None}


def test_bytes_are_those_of_the_file(file: Path) -> None:
    summary = summarise(file, verify=False)
    with h5py.File(file) as plain:
        stored = {entry["name"]: plain[entry["name"]].id.get_storage_size() for entry in summary["arrays"]}
    assert {entry["name"]: entry["stored_bytes"] for entry in summary["arrays"]} == stored
    size = summary["bytes"]
    assert size["images"] == stored["images"]
    assert size["labels"] == stored["labels/hard"] + stored["labels/codec"] + stored["labels/soft/logits"]
    assert size["images"] + size["labels"] + size["aux"] == size["total"] == file.stat().st_size


def test_verify_finds_what_a_look_does_not(file: Path) -> None:
    assert {entry["verified"] for entry in summarise(file, verify=True)["arrays"]} == {True}
    with h5py.File(file, "r+") as broken:
        broken["selection/scores"][0] = 5
    summarise(file, verify=False)
    with pytest.raises(DamagedDataError) as caught:
        summarise(file, verify=True)
    assert "selection/scores" in (caught.value.where or "")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        summarise(tmp_path / "absent.h5", verify=False)


def test_describe_says_what_there_is(file: Path) -> None:
    text = describe(summarise(file, verify=True))
    for part in (
        "6 of 4 x 5 x 2, float16",
        "codec full",
        "teacher convnet",
        "ZCA",
        "recipe {steps}",
        "images",
        "aux",
    ):
        assert part in text
    assert text.count(" verified") == len(summarise(file, verify=False)["arrays"])


def described(distilled: DistilledSet, folder: Path) -> str:
    write_set(distilled, folder / "set.h5")
    return describe(summarise(folder / "set.h5", verify=False))


def test_weights_are_described_where_they_differ(full: DistilledSet, tmp_path: Path) -> None:
    assert "6 samples of the source, weights 0.25 to 1.75, score" in described(full, tmp_path)
    assert full.selection is not None
    alike = replace(full.selection, weights=np.ones(6, np.float32))
    assert ", weights " not in described(replace(full, selection=alike), tmp_path)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0, 1, 2, 0, 1, 2], None),
        ([0, 0, 0, 0, 1, 2], "1 to 4\n"),
        ([2, 2, 2, 2, 2, 0], "1 to 5, none of 1 of 3 classes\n"),
        ([1, 1, 1, 1, 1, 1], "6, none of 2 of 3 classes\n"),
    ],
)
def test_images_a_class_are_described_where_they_differ(
    plain: DistilledSet, tmp_path: Path, labels: list[int], told: str | None
) -> None:
    text = described(replace(plain, labels=torch.tensor(labels)), tmp_path)
    if told is None:
        assert "images a class" not in text
    else:
        assert f"  images a class {told}" in text


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ({"target": {"name": "digits", "cap": 10}}, "  target         digits\n"),
        ({"target": {"name": "a\x1b[2J"}}, "  target         a\\x1b[2J\n"),
        ({"target": None}, None),
        ({"target": ["digits"]}, None),
        ("digits", None),
    ],
)
def test_the_target_is_named(plain: DistilledSet, tmp_path: Path, recipe: object, told: str | None) -> None:
    text = described(replace(plain, provenance={"recipe": recipe}), tmp_path)
    assert ("  target " in text) is (told is not None)
    assert told is None or told in text


@pytest.mark.parametrize("name", ["labels/hard", "selection/weights"])
def test_values_that_cannot_be_described_are_damage(file: Path, name: str) -> None:
    with h5py.File(file, "r+") as broken:
        broken[name][0] = {"labels/hard": 3, "selection/weights": np.nan}[name]
    with pytest.raises(DamagedDataError) as caught:
        summarise(file, verify=False)
    assert name in (caught.value.where or "")


def test_describe_sends_no_control_codes_to_the_terminal(plain: DistilledSet, tmp_path: Path) -> None:
    hostile = replace(plain, provenance={"note\x1b[31m": "a\rb\nc"})
    write_set(hostile, tmp_path / "set.h5")
    text = describe(summarise(tmp_path / "set.h5", verify=False))
    assert all(line.isprintable() for line in text.split("\n"))
    assert "größer" in text
    text.encode()


def test_no_torch_is_imported() -> None:
    code = "import sys, distill.store.summary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
