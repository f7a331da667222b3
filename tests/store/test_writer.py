"""The writer refuses sets that break the contract, and leaves a whole file or none."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill.contracts import DistilledSet, Preprocessing, SoftLabels
from distill.errors import DamagedDataError, InputError
from distill.store import format as fmt
from distill.store import writer
from distill.store.sparse import SparseFile
from distill.store.writer import write_set

Change = Callable[[DistilledSet], DistilledSet]


def selection(**changes: Any) -> Change:
    return lambda full: replace(full, selection=replace(full.selection, **changes))


def preprocessing(**changes: Any) -> Change:
    return lambda full: replace(full, preprocessing=replace(full.preprocessing, **changes))


def soft(**changes: Any) -> Change:
    return lambda full: replace(full, soft=replace(full.soft, **changes))


def pixel(value: float) -> Change:
    def change(full: DistilledSet) -> DistilledSet:
        images = full.images.clone()
        images[2, 0, 0, 0] = value
        return replace(full, images=images)

    return change


ONES = np.ones(6, dtype=np.float32)
BROKEN: dict[str, tuple[Change, str]] = {
    "NaN": (pixel(float("nan")), "1 of 6 images"),
    "infinite": (pixel(float("inf")), "1 of 6 images"),
    "float32 images": (lambda full: replace(full, images=full.images.float()), "uint8 or float16"),
    "flat images": (lambda full: replace(full, images=full.images.flatten(1)), "uint8 or float16"),
    "empty": (lambda full: replace(full, images=full.images[:0], labels=full.labels[:0]), "none of them 0"),
    "label too high": (lambda full: replace(full, labels=full.labels + 1), "2 labels are out of range"),
    "label below 0": (lambda full: replace(full, labels=full.labels - 1), "2 labels are out of range"),
    "int32 labels": (lambda full: replace(full, labels=full.labels.int()), "hard labels do not match"),
    "a label short": (lambda full: replace(full, labels=full.labels[1:]), "hard labels do not match"),
    "no classes": (lambda full: replace(full, classes=()), "out of range"),
    "mean of 1 channel": (preprocessing(mean=(0.5,)), "mean and std"),
    "std 0": (preprocessing(std=(0.5, 0.0)), "mean and std"),
    "NaN mean": (preprocessing(mean=(0.5, float("nan"))), "mean and std"),
    "ZCA in part": (preprocessing(zca_mean=None), "ZCA"),
    "ZCA of wrong size": (preprocessing(zca_mean=np.zeros(3, dtype=np.float32)), "ZCA"),
    "NaN in ZCA": (preprocessing(zca_mean=np.full(40, np.nan, dtype=np.float32)), "ZCA"),
    "soft labels of other images": (soft(arrays={"logits": np.zeros((1, 5, 3), np.float16)}), "soft labels"),
    "soft labels of other classes": (soft(arrays={"logits": np.zeros((1, 6, 4), np.float16)}), "soft labels"),
    "NaN in soft labels": (soft(arrays={"logits": np.full((1, 6, 3), np.nan, np.float16)}), "soft labels"),
    "unknown codec": (soft(codec="fool"), "unknown soft-label codec"),
    "no temperature": (soft(attributes={"teacher": "t"}), "temperature"),
    "no teacher": (soft(attributes={"temperature": 1.0}), "teacher"),
    "twice the same sample": (selection(indices=np.array([9, 2, 7, 0, 5, 9])), "distinct"),
    "negative sample": (selection(indices=np.array([-1, 2, 7, 0, 5, 3])), "non-negative"),
    "weights of sum 1": (selection(weights=ONES / 6), "mean 1"),
    "negative weight": (
        selection(weights=np.array([3, -1, 1, 1, 1, 1], dtype=np.float32)),
        "selection weights",
    ),
    "NaN weight": (selection(weights=(ONES * np.nan)), "mean 1"),
    "a score short": (selection(scores=ONES[1:]), "selection scores"),
    "a row short": (selection(rows=np.arange(5)), "selection rows"),
    "twice the same row": (selection(rows=np.array([9, 2, 7, 0, 5, 9])), "selection rows are not distinct"),
    "negative row": (selection(rows=np.array([-1, 2, 7, 0, 5, 3])), "non-negative"),
    "NaN in provenance": (lambda full: replace(full, provenance={"a": float("nan")}), "provenance"),
    "object in meta": (selection(meta={"a": object()}), "selection/meta"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_sets_are_refused(name: str, full: DistilledSet, tmp_path: Path) -> None:
    change, message = BROKEN[name]
    with pytest.raises(DamagedDataError, match=message):
        write_set(change(full), tmp_path / "set.h5")
    assert list(tmp_path.iterdir()) == []


def test_text_above_the_limit(plain: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(DamagedDataError, match="provenance is too long"):
        write_set(replace(plain, provenance={"a": "x" * 1000}), tmp_path / "set.h5")


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only"),
        KeyboardInterrupt(),
    ],
    ids=["full disk", "read-only", "Ctrl-C"],
)
def test_interrupted_write_leaves_the_old_file(
    failure: BaseException,
    full: DistilledSet,
    plain: DistilledSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "set.h5"
    write_set(plain, path)
    before = path.read_bytes()

    def fail_halfway(image: SparseFile, partial: Path, pieces: list[tuple[int, np.ndarray]]) -> None:
        copy_to(image, partial, pieces)
        with partial.open("r+b") as file:
            file.truncate(partial.stat().st_size // 2)
        raise failure

    copy_to = SparseFile.copy_to
    monkeypatch.setattr(SparseFile, "copy_to", fail_halfway)
    expected = InputError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_set(full, path)
    if isinstance(caught.value, InputError):
        assert caught.value.where == str(path)
        assert caught.value.fix
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_disk_that_does_not_give_back_what_was_written(
    full: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(image: SparseFile, partial: Path, pieces: list[tuple[int, np.ndarray]]) -> None:
        copy_to(image, partial, pieces)
        broken = bytearray(partial.read_bytes())
        broken[len(broken) // 2] ^= 1
        partial.write_bytes(broken)

    copy_to = SparseFile.copy_to
    monkeypatch.setattr(SparseFile, "copy_to", flip)
    with pytest.raises(DamagedDataError, match="does not read back"):
        write_set(full, tmp_path / "set.h5")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written(plain: DistilledSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file" / "set.h5", tmp_path / "absent" / "set.h5", tmp_path):
        with pytest.raises(InputError) as caught:
            write_set(plain, path)
        assert caught.value.where == str(path)
        assert caught.value.exit_code == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_arrays_are_made_in_order_of_name(full: DistilledSet, tmp_path: Path) -> None:
    arrays = writer._pack(full)
    turned = dict(reversed(list(arrays.items())))
    for name, content in (("one", arrays), ("other", turned)):
        image, pieces = writer._build(content)
        image.copy_to(tmp_path / name, pieces)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_soft_labels_without_arrays(full: DistilledSet, tmp_path: Path) -> None:
    empty = SoftLabels("full", {}, {"teacher": "t", "temperature": 1.0})
    with pytest.raises(DamagedDataError, match="wrong arrays"):
        write_set(replace(full, soft=empty), tmp_path / "set.h5")


def test_no_zca_is_sound(full: DistilledSet, tmp_path: Path) -> None:
    without = Preprocessing(mean=full.preprocessing.mean, std=full.preprocessing.std)
    write_set(replace(full, preprocessing=without), tmp_path / "set.h5")
    assert (tmp_path / "set.h5").exists()
