"""How large tensors are that some code makes: torch's memory, which tracemalloc does not see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Largest(TorchDispatchMode):
    """While open, `bytes` is the size of the largest tensor that an operation made and that is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = _storages((args, kwargs))
        made = func(*args, **(kwargs or {}))
        new = [size for place, size in _storages(made).items() if place not in given]
        self.bytes = max([self.bytes, *new])
        return made


def _storages(values: Any) -> dict[int, int]:
    """Address -> bytes of the memory of tensors."""
    held = [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, torch.Tensor)]
    return {each.data_ptr(): each.nbytes() for each in held}
