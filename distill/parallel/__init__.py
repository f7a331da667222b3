"""The same function over many items, in processes side by side: on this machine, or on a Ray cluster.

    with open_pool("local") as pool:
        for number, result in pool.each(function, items): ...

Results come as they are done, each with its item's number. Functions are looked up by name where they run, so that they
must stand in a module; functions, items and results are pickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, Protocol, TypeVar

from distill.parallel.local import LocalPool

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)
Where = Literal["local", "ray"]


class Pool(Protocol):
    """Processes that work side by side."""

    def each(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, doing: str
    ) -> Iterator[tuple[int, Result]]:
        """function(item) of every item, with its number, as they are done.

        No more results are under way than there are processes: who takes them slowly slows them down.

        Args:
            function: of a module; errors of it reach the caller.
            items: pickled one by one.
            doing: what it does with one, for messages: "scored a part of the corpus".
        """
        ...

    def take_worker_peak(self) -> int:
        """Memory that the processes besides this one had at most, together, since the last call, in bytes.

        0 where none worked, and on Ray.
        """
        ...


def open_pool(where: Where, *, workers: int) -> AbstractContextManager[Pool]:
    """Processes of this machine, or of the Ray cluster that is there.

    Args:
        where: `ray` needs the extra of that name.
        workers: processes on this machine; on Ray, the cluster's cores count.

    Raises:
        InputError: no Ray.
    """
    if where == "local":
        return LocalPool(workers)
    from distill.parallel.on_ray import RayPool

    return RayPool()
