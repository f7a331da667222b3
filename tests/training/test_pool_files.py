"""Pools travel to workers through files, each array once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.contracts import SoftLabels
from distill.errors import InputError
from distill.labels.view_labels import StoredLabels, plan_attributes
from distill.training import pool_files as pool_files_module
from distill.training.job import Pool, ViewPlan
from distill.training.pool_files import PoolFiles, load_pool


def test_pools_come_back_as_they_were(tmp_path: Path, digits: Pool, soft_digits: Pool) -> None:
    files = PoolFiles(tmp_path)
    weighted = replace(digits, weights=torch.rand(len(digits), generator=torch.Generator().manual_seed(0)))
    for pool in (digits, soft_digits, weighted, replace(digits, images=(digits.images / 255).half())):
        read = load_pool(files.paths(pool))
        assert torch.equal(read.images, pool.images)
        assert read.images.dtype == pool.images.dtype
        assert torch.equal(read.targets, pool.targets)
        assert read.preprocessing == pool.preprocessing
        assert (read.weights is None) == (pool.weights is None)
        assert pool.weights is None or torch.equal(read.weights, pool.weights)  # type: ignore[arg-type]


def test_an_array_is_written_once(tmp_path: Path, digits: Pool) -> None:
    """A teacher and an evaluation make pools of their own of the same images."""
    files = PoolFiles(tmp_path)
    first = files.paths(digits)
    assert files.paths(replace(digits)) == first
    soft = torch.zeros(len(digits), 10)
    second = files.paths(replace(digits, images=digits.images.view_as(digits.images), targets=soft))
    assert second.images == first.images
    assert second.targets != first.targets
    assert len(list(tmp_path.iterdir())) == 4


def test_parts_of_one_memory_are_told_apart(tmp_path: Path, digits: Pool) -> None:
    files = PoolFiles(tmp_path)
    files.paths(digits)
    for images in (digits.images[:5], digits.images[1:], digits.images.transpose(2, 3)):
        part = Pool(images, digits.targets[: len(images)], digits.preprocessing)
        assert torch.equal(load_pool(files.paths(part)).images, images)


def test_memory_that_is_free_again_is_not_taken_for_what_lay_there(tmp_path: Path, digits: Pool) -> None:
    files = PoolFiles(tmp_path)
    for value in range(20):
        images = torch.full((3, 1, 8, 8), value, dtype=torch.uint8)
        read = load_pool(files.paths(Pool(images, torch.arange(3), digits.preprocessing)))
        assert torch.equal(read.images, images)


def test_a_full_disk_is_told(tmp_path: Path, digits: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pool_files_module.np, "save", full)
    with pytest.raises(InputError, match="the disk is full"):
        PoolFiles(tmp_path).paths(digits)


def test_mapped_labels_are_not_copied(tmp_path: Path, digits: Pool) -> None:
    """They stay in the set's file, at their place; a part of them is an array like any other."""
    path = tmp_path / "set"
    whole = np.arange(4 * len(digits) * 10, dtype="<f2").reshape(4, len(digits), 10)
    path.write_bytes(b"head" * 2 + whole.tobytes())
    mapped = np.memmap(path, mode="r", dtype="<f2", shape=whole.shape, offset=8)
    (tmp_path / "files").mkdir()
    plan = ViewPlan(0, 4, 8, augment="none", crop_scale=1.0, mix="none", mix_alpha=1.0)
    attributes = {"teacher": "t", "temperature": 1.0, "views": plan_attributes(plan)}
    for arrays in (mapped, mapped[1:3]):
        labels = StoredLabels(SoftLabels("full", {"logits": arrays}, attributes), digits.targets)
        paths = PoolFiles(tmp_path / "files").paths(replace(digits, views=labels))
        written = sum(each.stat().st_size for each in (tmp_path / "files").iterdir())
        kept = digits.images.nbytes + 2 * digits.targets.nbytes
        assert (written < kept + 5000) == (arrays is mapped)
        views = load_pool(paths).views
        assert isinstance(views, StoredLabels)
        np.testing.assert_array_equal(views.soft.arrays["logits"], np.asarray(arrays))
        for each in (tmp_path / "files").iterdir():
            each.unlink()
