"""Processes of a Ray cluster that is there: the one that RAY_ADDRESS names, else the one of this machine.

distill must be installed on its nodes, and files must be found under the same paths there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from distill.errors import DistillError, InputError

Item = TypeVar("Item")
Result = TypeVar("Result")


class RayPool:
    """Tasks on the cluster; ours is left when the pool ends, the cluster stays.

    Raises:
        InputError: Ray is not installed, or there is no cluster.
    """

    def __init__(self) -> None:
        self._ray = _ray()
        self._begun = not self._ray.is_initialized()

    def __enter__(self) -> Self:
        if self._begun:
            try:
                self._ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
            except ConnectionError as error:
                raise InputError(
                    "there is no Ray cluster",
                    where="engine",
                    found=str(error).split("\n")[0],
                    fix="start one with `ray start --head`, name it by RAY_ADDRESS, or set engine: local",
                ) from error
        return self

    def __exit__(self, *error: Any) -> None:
        if self._begun:
            self._ray.shutdown()

    def each(
        self, function: Callable[[Item], Result], items: Sequence[Item], *, doing: str
    ) -> Iterator[tuple[int, Result]]:
        """See `distill.parallel.Pool`."""
        ray = self._ray
        remote = ray.remote(max_retries=1)(_call)
        most = max(1, int(ray.cluster_resources().get("CPU", 1)))
        waiting = iter(enumerate(items))
        under_way: dict[Any, int] = {}
        try:
            while True:
                while len(under_way) < most and (following := next(waiting, None)) is not None:
                    number, item = following
                    under_way[remote.remote(function, item)] = number
                if not under_way:
                    return
                (done, *_), _ = ray.wait(list(under_way), num_returns=1)
                yield under_way.pop(done), _result(ray, done, doing)
        finally:
            for task in under_way:
                ray.cancel(task, force=True)

    def take_worker_peak(self) -> int:
        """See `distill.parallel.Pool`."""
        return 0


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    """On a node: errors meant for users come back as results, whole."""
    try:
        return function(item)
    except DistillError as error:
        return error


def _result(ray: Any, task: Any, doing: str) -> Any:
    try:
        result = ray.get(task)
    except ray.exceptions.RayError as error:
        raise DistillError(f"a task of the Ray cluster that {doing} failed: {error}") from error
    if isinstance(result, DistillError):
        raise result
    return result


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("engine: ray needs the package ray", fix="pip install 'distill[ray]'") from error
    return ray
