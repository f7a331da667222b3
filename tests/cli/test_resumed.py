"""An interrupted run goes on only with the data and the installation that it began with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from sklearn.datasets import load_digits

from distill import pipeline
from distill.evaluation.protocol import Ledger
from distill.run_folder import RunFolder

Call = Callable[..., Result]
RECIPE = """\
data: {name: arrays, path: digits.npz, cap: 10, valid: 0.2}
train: {epochs: 1, batch_size: 20, augment: none}
steps: [random: {ipc: 2}]
evaluate: {students: [{name: mlp, width: 4}], seeds: 2, against: [random]}
"""


def write_digits(path: Path, **changed: np.ndarray) -> dict[str, np.ndarray]:
    """Real digits as the arrays of an .npz file, some of them changed."""
    bunch = load_digits()
    images, labels = (bunch.images * 15).astype(np.uint8)[..., None], bunch.target.astype(np.int64)
    arrays = {"x_train": images[:300], "y_train": labels[:300], "x_test": images[300:400]}
    arrays |= {"y_test": labels[300:400], **changed}
    np.savez(path, **arrays)
    return arrays


@pytest.fixture
def interrupted(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A run in `out` that was stopped behind its first student; the arrays it read."""
    arrays = write_digits(tmp_path / "digits.npz")
    (tmp_path / "arrays.yaml").write_text(RECIPE)
    add = Ledger.add

    def stop(ledger: Ledger, job: str, accuracy: float) -> None:
        add(ledger, job, accuracy)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "add", stop)
        assert call("run", "arrays.yaml", "--out", "out").exit_code == 130
    return arrays


@pytest.mark.parametrize(
    ("name", "told"),
    [("x_train", "data.train"), ("y_test", "data.test"), ("x_test", "data.test"), ("fewer", "data.train")],
)
def test_changed_data_are_refused(
    call: Call, interrupted: dict[str, np.ndarray], tmp_path: Path, name: str, told: str
) -> None:
    changed = {"x_train": interrupted["x_train"][:200], "y_train": interrupted["y_train"][:200]}
    if name != "fewer":
        changed = {name: interrupted[name][::-1]}
    write_digits(tmp_path / "digits.npz", **changed)
    result = call("run", "arrays.yaml", "--out", "out")
    assert result.exit_code == 2, result.output
    assert "the data changed since the interruption" in result.stderr
    assert told in result.stderr and "--fresh" in result.stderr
    assert call("run", "arrays.yaml", "--out", "out", "--fresh", "--quiet").exit_code == 0


def test_the_same_data_go_on(call: Call, interrupted: dict[str, np.ndarray]) -> None:
    result = call("run", "arrays.yaml", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "1 of 4 students are known" in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("versions", {"torch": "1.0"}, "versions.torch: "),
        ("code_revision", "another", "code: "),
        ("device_name", "another", "device: "),
    ],
)
def test_another_installation_or_device_is_refused(
    call: Call,
    interrupted: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: object,
    told: str,
) -> None:
    monkeypatch.setattr(pipeline, name, lambda *_: value)
    result = call("run", "arrays.yaml", "--out", "out")
    assert result.exit_code == 2, result.output
    assert "began with another installation or device" in result.stderr
    assert told in result.stderr and "--fresh" in result.stderr


@pytest.mark.parametrize("damage", [None, "", "{", "[1]"])
def test_where_nothing_says_what_the_run_began_with_it_is_refused(
    call: Call, interrupted: dict[str, np.ndarray], tmp_path: Path, damage: str | None
) -> None:
    origin = tmp_path / "out" / ".resume" / "origin.json"
    if damage is None:
        origin.unlink()
    else:
        origin.write_text(damage)
    result = call("run", "arrays.yaml", "--out", "out")
    assert result.exit_code == 2, result.output
    assert "nothing tells" in result.stderr and "--fresh" in result.stderr


def test_students_are_known_by_the_test_data_too(
    call: Call, interrupted: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured on other test data is not the accuracy of a student on these."""
    write_digits(tmp_path / "digits.npz", y_test=interrupted["y_test"][::-1])
    monkeypatch.setattr(RunFolder, "refuse_other_origin", lambda *_: None)
    result = call("run", "arrays.yaml", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "students are known" not in result.stderr
