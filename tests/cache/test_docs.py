"""The example of docs/cache.md, tried out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from distill import cache as cache_module
from distill.cache import Cache, Network
from distill.cache import quantities as quantities_module
from distill.contracts import Source, Split

DOCS = (Path(__file__).parents[2] / "docs" / "cache.md").read_text(encoding="utf-8")


def test_the_example_runs(
    make_cache: Callable[..., Cache],
    make_split: Callable[..., Split],
    network: Network,
) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.DOTALL | re.MULTILINE)
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


def test_the_table_names_every_quantity() -> None:
    table = set(re.findall(r"`(\w+)\(", DOCS))
    quantities = {
        name
        for name in cache_module.__all__
        if getattr(cache_module, name) in vars(quantities_module).values()
        and name not in ("PENULTIMATE", "Projection")
    }
    assert len(quantities) == 11, quantities
    assert quantities <= table
