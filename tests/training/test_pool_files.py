"""Pools travel to workers through files, each array once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.errors import InputError
from distill.training import pool_files as pool_files_module
from distill.training.job import Pool
from distill.training.pool_files import PoolFiles, load_pool


def test_pools_come_back_as_they_were(tmp_path: Path, digits: Pool, soft_digits: Pool) -> None:
    files = PoolFiles(tmp_path)
    for pool in (digits, soft_digits, replace(digits, images=(digits.images / 255).half())):
        read = load_pool(files.paths(pool))
        assert torch.equal(read.images, pool.images)
        assert read.images.dtype == pool.images.dtype
        assert torch.equal(read.targets, pool.targets)
        assert read.preprocessing == pool.preprocessing


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
