"""Dataset distillation and data selection: a large dataset in, a small one that trains nearly as well out.

`distill.run(recipe)`, `distill.load(path)`, `distill.evaluate(path)` and `distill.export(path, to=..., out=...)` are
the command line's functions, and `distill.views(set, epoch)` gives a set's labelled views to a loop of one's own.
They are imported on first use, so that `import distill` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "load", "run", "views"]

_LAZY = {
    "run": "distill.pipeline",
    "load": "distill.store.dataset",
    "evaluate": "distill.pipeline",
    "export": "distill.exporting",
    "views": "distill.labels.reading",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'distill' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
