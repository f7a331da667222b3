"""docs/format.md: its example reads a real set, and it names every dataset and attribute."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet, DocumentSet, Selection
from distill.preprocessing import Transform
from distill.store import format as fmt
from distill.store.writer import write_documents, write_set

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def example() -> str:
    return examples()[0]


def examples() -> list[str]:
    """Of a set of images, and of one of documents, which goes on from the imports of the first."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    return blocks


def test_example_is_ten_lines_of_h5py_and_numpy() -> None:
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 10
    imported = {line.split()[1] for line in lines if line.startswith("import ")}
    assert imported == {"json", "h5py", "numpy"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_example_reads_a_set(
    plain: DistilledSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    distilled = replace(plain, images=plain.images if dtype == torch.uint8 else (plain.images / 255).half())
    write_set(distilled, tmp_path / "set.h5")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example(), names)
    np.testing.assert_array_equal(names["images"], distilled.images.permute(0, 2, 3, 1).numpy())
    assert names["labels"].tolist() == distilled.labels.tolist()
    assert tuple(names["classes"]) == distilled.classes
    expected = Transform(distilled.preprocessing)(distilled.images).permute(0, 2, 3, 1)
    np.testing.assert_allclose(names["x"], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_example_reads_a_set_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selection = Selection(
        indices=np.array([7, 2]), weights=np.ones(2, np.float32), scores=np.array([1.5, -3], np.float32)
    )
    documents = DocumentSet(
        selection,
        ("b.jsonl", "a.txt"),
        np.array([1, 0], np.int32),
        np.array([2, 5]),
        np.array([8, 9], np.uint64),
        {"seed": 0},
    )
    write_documents(documents, tmp_path / "set.h5")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"json": json, "h5py": h5py}
    exec(examples()[1], names)
    assert names["where"] == [("a.txt", 2), ("b.jsonl", 5)]


def test_page_names_everything() -> None:
    optional = [name for together in fmt.OPTIONAL for name in together]
    names = [
        *fmt.REQUIRED,
        fmt.CODEC,
        *fmt.DOCUMENTS,
        *fmt.GROUPS,
        *optional,
        *fmt.ROOT_ATTRIBUTES,
        fmt.SHA256_ATTRIBUTE,
    ]
    assert [name for name in names if name.split("/")[-1] not in PAGE] == []
