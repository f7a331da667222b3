"""docs/format.md: its example reads a real set, and it names every dataset and attribute."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distill.contracts import DistilledSet
from distill.preprocessing import Transform
from distill.store import format as fmt
from distill.store.writer import write_set

PAGE = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")


def example() -> str:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(block)


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


def test_page_names_everything() -> None:
    optional = [name for together in fmt.OPTIONAL for name in together]
    names = [*fmt.REQUIRED, fmt.CODEC, *fmt.GROUPS, *optional, *fmt.ROOT_ATTRIBUTES, fmt.SHA256_ATTRIBUTE]
    assert [name for name in names if name.split("/")[-1] not in PAGE] == []
