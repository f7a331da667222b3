"""The examples of docs/cache.md, tried out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distill import cache as cache_module
from distill.cache import Cache, Network
from distill.cache import quantities as quantities_module
from distill.contracts import Source, Split

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "cache.md").read_text(encoding="utf-8")


EXAMPLES = re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.DOTALL | re.MULTILINE)


def test_the_example_of_a_method_runs(
    make_cache: Callable[..., Cache],
    make_split: Callable[..., Split],
    network: Network,
) -> None:
    example = EXAMPLES[0]
    source = Source("random", ("a", "b", "c"), make_split(), make_split(5, 1), (0.4, 0.5), (0.2, 0.3))
    example = example.replace('train_teacher(ctx, source, TeacherConfig(), name="feature network")', "given")
    names: dict[str, Any] = {
        "ctx": SimpleNamespace(cache=make_cache()),
        "source": source,
        "given": network,
        "indices": torch.tensor([3, 1]),
    }
    exec(compile(example, "docs/cache.md", "exec"), names)
    assert names["block"].shape == (37, 256)
    assert names["picked"].shape == (2, 16)
    assert names["ctx"].cache.images_forwarded == 37


def test_the_whole_program_runs_as_typed(tmp_path: Path) -> None:
    """From nothing, in an empty folder; the second run finds everything."""
    (_, program) = EXAMPLES
    for forwarded in (1797, 0):
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        *blocks, last = done.stdout.splitlines()
        assert blocks[-1].endswith("torch.Size([773, 256])")
        assert last == str(forwarded)


def test_the_table_names_every_quantity() -> None:
    table = set(re.findall(r"`(\w+)\(", DOCS))
    quantities = {
        name
        for name in cache_module.__all__
        if getattr(cache_module, name) in vars(quantities_module).values()
        and name not in ("PENULTIMATE", "Projection")
    }
    assert len(quantities) == 12, quantities
    assert quantities <= table
