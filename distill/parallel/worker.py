"""A worker process of `distill.parallel.local`: answers (function, item, number) with the function's result."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from distill.errors import DistillError
from distill.processes import serve


def main() -> None:
    serve(_answer)


def _answer(message: tuple[Callable[[Any], Any], Any, int], _: Callable[[Any], None]) -> tuple[str, int, Any]:
    function, item, number = message
    try:
        return "done", number, function(item)
    except DistillError as error:
        return "error", number, error
    except MemoryError as error:
        return "error", number, DistillError(f"{function.__name__} ran out of memory: {error!r}")
    except Exception as error:
        traceback.print_exc()
        return "error", number, DistillError(f"{function.__name__} failed: {error!r}")
