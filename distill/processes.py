"""Processes of our own, spoken to over their standard input and output in frames: a length, then a pickle.

Both ends are this program. A fresh interpreter, rather than a fork, is safe beside this process's threads, and lets a
user's script be without `if __name__ == "__main__"`.
"""

from __future__ import annotations

import os
import pickle
import queue
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from distill.errors import DistillError, MemoryExhaustedError

_LENGTH = struct.Struct("<Q")

# A worker imports from where this process does: `-m` would put the working directory, and whatever lies there, first.
_START = "import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"

Events = queue.Queue[tuple["WorkerProcess", Any]]


def write_frame(stream: IO[bytes], message: Any) -> None:
    """Send one message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(_LENGTH.pack(len(data)))
    stream.write(data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any | None:
    """Receive one message, None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack(head)
    data = stream.read(size)
    return pickle.loads(data) if len(data) == size else None


class WorkerProcess:
    """One process, and the thread that reads what it says.

    Args:
        module: whose function `main` it runs.
        events: where its messages go, with itself; None where it has ended.
        fix: what to do where it was killed for memory.

    Attributes:
        label: what it does now, for messages: `trained teacher`.
    """

    def __init__(self, module: str, events: Events, *, fix: str) -> None:
        self.label = ""
        self.fix = fix
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START.format(module=module), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # No threads before it is told how many.
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            # A group of its own: Ctrl-C is heard by this process alone, which then ends the worker.
            process_group=0,
        )
        threading.Thread(target=self._read, args=(events,), daemon=True).start()

    def _read(self, events: Events) -> None:
        assert self.process.stdout is not None
        while True:
            message = read_frame(self.process.stdout)
            events.put((self, message))
            if message is None:
                return

    def send(self, message: Any) -> None:
        """Give it a message.

        Raises:
            DistillError: it has ended.
        """
        assert self.process.stdin is not None
        try:
            write_frame(self.process.stdin, message)
        except BrokenPipeError as error:
            raise self.death() from error

    def death(self) -> DistillError:
        """What to say of a process that has ended."""
        code = self.process.wait()
        if code in (-9, 137):
            return MemoryExhaustedError(
                f"the process that {self.label} was killed, most likely for memory", fix=self.fix
            )
        return DistillError(f"the process that {self.label} ended with code {code}; its message stands above")

    def peak_bytes(self) -> int:
        """The greatest memory that it has had so far; 0 where the system does not tell."""
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        return 0

    def stop(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(OSError):  # what was buffered for a dead process cannot be written
                    stream.close()


def next_event(events: Events) -> tuple[WorkerProcess, Any]:
    """The next message of any worker; waits for it.

    Raises:
        DistillError: a worker has ended.
    """
    while True:
        try:
            worker, message = events.get(timeout=0.5)  # short, so that Ctrl-C is heard
        except queue.Empty:
            continue
        if message is None:
            raise worker.death()
        return worker, message


def serve(
    answer: Callable[[Any, Callable[[Any], None]], Any],
    *,
    heard: Callable[[Any], None] = lambda message: None,
    at_end: Callable[[], None] = lambda: None,
) -> None:
    """Answer messages from standard input on standard output, in a worker process; never returns.

    It ends when its input ends, without a word and even in the middle of an answer, so that nothing outlives a parent
    that was killed.

    Args:
        answer: makes an answer of a message; it may send more on the way, by the function it is given.
        heard: called with each message as it comes, in another thread.
        at_end: called before the end, in that thread.
    """
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not reach the frames
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        while (message := read_frame(sys.stdin.buffer)) is not None:
            heard(message)
            messages.put(message)
        at_end()
        os._exit(0)

    def send(message: Any) -> None:
        """Where nobody reads any more, wait for `listen` to end this process."""
        with suppress(BrokenPipeError):
            write_frame(results, message)
            return
        threading.Event().wait()

    threading.Thread(target=listen, daemon=True).start()
    while True:
        send(answer(messages.get(), send))
