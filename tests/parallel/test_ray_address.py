"""A RAY_ADDRESS at which there is no cluster is one clear error, and soon."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from distill.errors import InputError
from distill.parallel import on_ray, open_pool
from distill.parallel.on_ray import RayPool

ray = pytest.importorskip("ray")


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, and at which nobody listens."""
    with socket.socket() as held:
        held.bind(("", 0))
        yield held.getsockname()[1]


def refused(address: str, monkeypatch: pytest.MonkeyPatch) -> InputError:
    monkeypatch.setenv("RAY_ADDRESS", address)
    before = time.monotonic()
    with (
        pytest.raises(InputError, match="there is no Ray cluster at RAY_ADDRESS=") as caught,
        open_pool("ray", workers=1),
    ):
        pass
    assert time.monotonic() - before < 30
    assert address in caught.value.what
    assert caught.value.where == "engine"
    assert "ray start --head" in str(caught.value.fix)
    return caught.value


@pytest.mark.parametrize(
    "address",
    ["nonsense", "ray://nonsense:10001", "http://127.0.0.1:8265", "127.0.0.1:port", "127.0.0.1:99999"],
)
def test_an_address_that_ray_cannot_read(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(address, monkeypatch).found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_port_where_nothing_listens(host: str, closed_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "refused" in str(refused(f"{host}:{closed_port}", monkeypatch).found)


def test_a_host_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> socket.socket:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    assert "Name or service not known" in str(refused("nobody.invalid:6379", monkeypatch).found)


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []

    def silent(_: object, timeout: float) -> socket.socket:
        waited.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", silent)
    assert "timed out" in str(refused("10.255.255.1:6379", monkeypatch).found)
    assert waited == [5.0]


@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError, TimeoutError])
def test_whatever_ray_says_of_a_cluster_it_does_not_reach(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise error("no such cluster\nand much more")

    monkeypatch.setattr(ray, "init", init)
    assert refused("a-name", monkeypatch).found == "no such cluster"


def test_a_cluster_that_listens_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """At this machine's own address too, where Ray looks for what is at localhost."""
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options))
    with socket.socket() as here:
        own = ray.util.get_node_ip_address()
        here.bind((own, 0))
        here.listen()
        for host in (own, "localhost"):
            monkeypatch.setenv("RAY_ADDRESS", f"{host}:{here.getsockname()[1]}")
            RayPool().__enter__()
    assert len(asked) == 2 and asked[0]["address"] == "auto"


@pytest.mark.parametrize("address", ["", "auto", "local", "ray://head:10001", "https://head:80", "head:x"])
def test_ray_reads_all_other_addresses_itself(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> socket.socket:
        raise AssertionError("knocked")

    monkeypatch.setattr(socket, "create_connection", never)
    on_ray._knock(address, lambda: "127.0.0.1")
