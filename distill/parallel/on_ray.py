"""Processes of a Ray cluster that is there: the one that RAY_ADDRESS names, else the one of this machine.

distill must be installed on its nodes, and files must be found under the same paths there.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

from distill.errors import DistillError, InputError

_KNOCK_SECONDS = 5.0

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
            address = os.environ.get("RAY_ADDRESS", "")
            try:
                _knock(address, self._ray.util.get_node_ip_address)
                self._ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
            except (
                OSError,
                ValueError,
                RuntimeError,
            ) as error:  # addresses that Ray cannot read are ValueErrors
                raise _no_cluster(address, error) from error
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


def _knock(address: str, own_host: Callable[[], str]) -> None:
    """Raise OSError where nothing listens at HOST:PORT, or ValueError where nothing can.

    Ray would go on trying for minutes, without a word.

    Args:
        address: what else it may be, a name or a URL, Ray reads by itself.
        own_host: the address of this machine, where Ray looks for a cluster at localhost.
    """
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdecimal():
        return
    if int(port) > 65535:
        raise ValueError(f"there is no port {port}")
    host = host.strip("[]")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
    except OSError:
        if host not in ("localhost", "127.0.0.1", "::1"):
            raise
        socket.create_connection((own_host(), int(port)), timeout=_KNOCK_SECONDS).close()


def _no_cluster(address: str, error: Exception) -> InputError:
    why = str(error).split("\n")[0]
    return InputError(
        f"there is no Ray cluster at RAY_ADDRESS={address}" if address else "there is no Ray cluster",
        where="engine",
        found=why,
        allowed="RAY_ADDRESS=HOST:PORT of a cluster's head, such as 10.0.0.1:6379, or unset"
        if address
        else None,
        fix="start one with `ray start --head`, name it by RAY_ADDRESS, or set engine: local",
    )


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
