"""A file list gives back the paths it was given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.file_list import FileList

# Any bytes that a POSIX file system takes for a file's name, among them such that are not UTF-8.
NAMES = st.binary(min_size=1, max_size=12).filter(lambda raw: not {0, ord("/")} & set(raw)).map(os.fsdecode)


@given(st.lists(st.lists(NAMES)))
def test_paths_come_back(parts: list[list[str]]) -> None:
    root = Path("some", "where")
    files = FileList(root)
    for names in parts:
        files.extend(names)
    expected = [root / name for names in parts for name in names]
    assert len(files) == len(expected)
    assert [files[row] for row in range(len(files))] == expected
    assert list(files) == expected


@pytest.mark.parametrize("row", [-1, 2])
def test_rows_outside_are_refused(row: int) -> None:
    files = FileList(Path())
    files.extend(["a", "b/c"])
    with pytest.raises(IndexError, match=f"row {row} of 2"):
        _ = files[row]
