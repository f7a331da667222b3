"""How a run tells what it does: bars on a terminal, plain lines elsewhere, and always log.jsonl.

`open_progress` chooses the display. log.jsonl holds one JSON object a line: `time` (ISO 8601, UTC), `event`,
and the facts of the event. Tasks and notes write these events, `Progress.record` any other:

    started      task, total, unit
    finished     task, count, seconds
    failed       task, count, seconds, error
    interrupted  task, count, seconds
    note         text and facts
    warning      text and facts

Neither a display nor a log that cannot be written to any more ends a run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol, TextIO

from distill.errors import printable

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    from distill.contracts import Progress, Task

LINE_SECONDS = 5.0  # a task prints at most one plain line in this time
RATE_SECONDS = 30.0  # rates are means over this time, so that warming up and resuming fade out of them
SAMPLE_SECONDS = 1.0
FORETOLD = (
    0.01  # share done from which remaining time is told; before it, starting up is most of what was seen
)

Clock = Callable[[], float]
Ending = Literal["finished", "failed", "interrupted"]


@contextmanager
def open_progress(
    log: Path | None, *, quiet: bool = False, stream: TextIO | None = None, clock: Clock = time.monotonic
) -> Iterator[Progress]:
    """A `Progress` for one run.

    Args:
        log: log.jsonl, appended to so that a resumed run continues it; None writes none.
        quiet: show warnings only. The log is the same.
        stream: where to tell, stderr by default. Bars are drawn where it is a terminal that moves its cursor.
        clock: seconds from any origin.
    """
    stream = sys.stderr if stream is None else stream
    display = _choose_display(stream, quiet=quiet, clock=clock)
    reporter = _Reporter(display, clock=clock)
    if log is not None:
        reporter.log = _Log(log, lost=lambda error: display.say(f"{log}: not written: {error}", warning=True))
    try:
        yield reporter
    finally:
        display.close()
        if reporter.log is not None:
            reporter.log.close()


class NullProgress:
    """A `Progress` that tells nobody, for use as a library."""

    def task(self, title: str, *, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]:
        return nullcontext(_NullTask())

    def note(self, text: str, **facts: Any) -> None:
        pass

    def warn(self, text: str, **facts: Any) -> None:
        pass

    def record(self, event: str, **facts: Any) -> None:
        pass


class _NullTask:
    def advance(self, count: int = 1) -> None:
        pass


class _Job:
    """One open task: how much is done, how fast, and how long it will take."""

    def __init__(self, reporter: _Reporter, title: str, *, total: int | None, unit: str, depth: int) -> None:
        self.title = title
        self.total = total
        self.unit = unit
        self.depth = depth
        self.count = 0
        self.begun = self.told = reporter.clock()
        self._reporter = reporter
        self._samples = deque([(self.begun, 0)])  # (seconds, count), the oldest within RATE_SECONDS

    def advance(self, count: int = 1) -> None:
        with self._reporter.lock:
            self.count += count
            now = self._reporter.clock()
            if now - self._samples[-1][0] >= SAMPLE_SECONDS:
                self._samples.append((now, self.count))
                while len(self._samples) > 2 and now - self._samples[0][0] > RATE_SECONDS:
                    self._samples.popleft()
            self._reporter.display.advanced(self, now)

    def rate(self, now: float) -> float | None:
        """Units a second over the last RATE_SECONDS; None before anything can be said."""
        then, before = self._samples[0]
        return (self.count - before) / (now - then) if now > then and self.count > before else None

    def facts(self, now: float) -> str:
        """Count, rate and remaining time, such as `512/1797 (28%), 146 image/s, 9 s left`."""
        parts = [f"{self.count}" if self.total is None else f"{self.count}/{self.total}"]
        if self.total:
            parts[0] += f" ({self.count / self.total:.0%})"
        rate = self.rate(now)
        if rate is not None:
            parts.append(_per_second(rate, self.unit))
            if self.total is not None and FORETOLD * self.total <= self.count < self.total:
                parts.append(f"{_duration((self.total - self.count) / rate)} left")
        return ", ".join(parts)

    def outcome(self, now: float, ending: Ending) -> str:
        """What the last line says, such as `done, 1797 image in 12 s (146 image/s)`."""
        seconds = now - self.begun
        if ending != "finished":
            of = "" if self.total is None else f"/{self.total}"
            counted = f", {self.count}{of}" if self.count or of else ""
            return f"{ending} after {_duration(seconds)}{counted}"
        if not self.count:
            return f"done in {_duration(seconds)}"
        rate = f" ({_per_second(self.count / seconds, self.unit)})" if seconds > 0 else ""
        return f"done, {_counted(self.count, self.unit)} in {_duration(seconds)}{rate}"


class _Reporter:
    """Implements `Progress`: every event goes to the display and to the log, one at a time."""

    def __init__(self, display: _Display, *, clock: Clock) -> None:
        self.display = display
        self.clock = clock
        self.lock = threading.RLock()
        self.log: _Log | None = None
        self._open = 0

    @contextmanager
    def task(self, title: str, *, total: int | None = None, unit: str = "") -> Iterator[Task]:
        with self.lock:
            job = _Job(self, title, total=total, unit=unit, depth=self._open)
            self._open += 1
            self.display.started(job)
            self.record("started", task=title, total=total, unit=unit)
        try:
            yield job
        except KeyboardInterrupt:
            self._end(job, "interrupted")
            raise
        except BaseException as error:  # whatever it is: a bar must not outlive its task
            self._end(job, "failed", error=f"{type(error).__name__}: {error}")
            raise
        self._end(job, "finished")

    def _end(self, job: _Job, ending: Ending, **facts: str) -> None:
        with self.lock:
            self._open -= 1
            now = self.clock()
            self.display.ended(job, now, ending)
            self.record(ending, task=job.title, count=job.count, seconds=round(now - job.begun, 6), **facts)

    def note(self, text: str, **facts: Any) -> None:
        with self.lock:
            self.display.say(printable(text), warning=False)
            self.record("note", text=text, **facts)

    def warn(self, text: str, **facts: Any) -> None:
        with self.lock:
            self.display.say(printable(text), warning=True)
            self.record("warning", text=text, **facts)

    def record(self, event: str, **facts: Any) -> None:
        with self.lock:
            if self.log is not None:
                self.log.write(event, facts)


class _Display(Protocol):
    """What a user sees. All calls are made under the reporter's lock, except `close`."""

    def started(self, job: _Job) -> None: ...

    def advanced(self, job: _Job, now: float) -> None: ...

    def ended(self, job: _Job, now: float, ending: Ending) -> None: ...

    def say(self, text: str, *, warning: bool) -> None: ...

    def close(self) -> None: ...


def _choose_display(stream: TextIO, *, quiet: bool, clock: Clock) -> _Display:
    if quiet:
        return _Quiet(stream)
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        return _Bars(stream, clock=clock)
    return _Lines(stream)


class _Quiet:
    """Warnings, and nothing else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def started(self, job: _Job) -> None:
        pass

    def advanced(self, job: _Job, now: float) -> None:
        pass

    def ended(self, job: _Job, now: float, ending: Ending) -> None:
        pass

    def say(self, text: str, *, warning: bool) -> None:
        if warning:
            self._write(f"warning: {text}")

    def close(self) -> None:
        pass

    def _write(self, line: str) -> None:
        with suppress(OSError):  # the reader of a pipe may be gone; the run goes on, and so does its log
            self._stream.write(line + "\n")
            self._stream.flush()


class _Lines(_Quiet):
    """Plain lines for files and pipes: at a task's start, now and then, and at its end."""

    def started(self, job: _Job) -> None:
        amount = f" ({_counted(job.total, job.unit)})" if job.total is not None else ""
        self._tell(job, f"started{amount}")

    def advanced(self, job: _Job, now: float) -> None:
        if now - job.told >= LINE_SECONDS:
            job.told = now
            self._tell(job, job.facts(now))

    def ended(self, job: _Job, now: float, ending: Ending) -> None:
        self._tell(job, job.outcome(now, ending))

    def say(self, text: str, *, warning: bool) -> None:
        self._write(f"warning: {text}" if warning else text)

    def _tell(self, job: _Job, what: str) -> None:
        self._write(f"{'  ' * job.depth}{job.title}: {what}")


class _Bars:
    """One moving line for each open task on a terminal; outermost tasks leave a line when they end.

    The bars exist only while a task is open, so that nothing else that prints has to know of them.
    """

    def __init__(self, stream: TextIO, *, clock: Clock) -> None:
        from rich.console import Console

        self._console = Console(file=stream, force_terminal=True)
        self._clock = clock
        self._jobs: list[_Job] = []
        self._live: Live | None = None

    def started(self, job: _Job) -> None:
        self._jobs = [*self._jobs, job]  # a new list: the drawing thread reads the old one meanwhile
        if self._live is None:
            self._live = self._start()

    def advanced(self, job: _Job, now: float) -> None:
        pass  # the drawing thread looks at the jobs by itself

    def ended(self, job: _Job, now: float, ending: Ending) -> None:
        self._jobs = [other for other in self._jobs if other is not job]
        if not self._jobs:
            self.close()
        if ending != "finished" or job.depth == 0:
            mark = "[green]✓[/]" if ending == "finished" else "[red]✗[/]"
            self._print(mark, f"{job.title}: {job.outcome(now, ending)}")

    def say(self, text: str, *, warning: bool) -> None:
        self._print("[yellow]warning:[/]" if warning else "", text)

    def close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            with suppress(OSError):
                live.stop()

    def _start(self) -> Live:
        from rich.live import Live

        live = Live(
            console=self._console,
            get_renderable=self._draw,
            refresh_per_second=4,
            transient=True,
            redirect_stdout=False,  # stdout may be a file, whose lines would land on the terminal
        )
        with suppress(OSError):
            live.start()
        return live

    def _draw(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        now = self._clock()
        grid = Table.grid(padding=(0, 1))
        for job in self._jobs:
            bar = ProgressBar(total=job.total, completed=job.count, width=24, pulse=job.total is None)
            grid.add_row(_plain("  " * job.depth + job.title), bar, _plain(job.facts(now)))
        return grid

    def _print(self, mark: str, text: str) -> None:
        from rich.markup import escape

        with suppress(OSError):
            self._console.print(f"{mark} {escape(text)}".lstrip(), highlight=False, soft_wrap=True)


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


class _Log:
    """log.jsonl, opened for appending. The first failure to write is told once and closes it."""

    def __init__(self, path: Path, *, lost: Callable[[OSError], None]) -> None:
        self._lost = lost
        self._file: BinaryIO | None = None
        try:
            self._file = path.open("ab")
            if _ends_within_a_line(path):
                self._put(b"\n")
        except OSError as error:
            self._give_up(error)

    def write(self, event: str, facts: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        # A fact must not hide the time of its event.
        renamed = {f"{name}_" if name == "time" else name: _jsonable(fact) for name, fact in facts.items()}
        entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **renamed}
        try:
            self._put(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode(errors="replace") + b"\n")
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _put(self, line: bytes) -> None:
        assert self._file is not None
        self._file.write(line)
        self._file.flush()

    def _give_up(self, error: OSError) -> None:
        self.close()
        self._lost(error)


def _ends_within_a_line(path: Path) -> bool:
    """Whether the file was cut in the middle of its last line, as by a killed run."""
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _jsonable(fact: Any) -> Any:
    """`fact` in JSON's own types; what JSON cannot say, such as NaN or a path, becomes text."""
    if fact is None or isinstance(fact, bool | int | str):
        return fact
    if isinstance(fact, float):
        return fact if math.isfinite(fact) else str(fact)
    if isinstance(fact, Mapping):
        return {str(name): _jsonable(value) for name, value in fact.items()}
    if isinstance(fact, list | tuple | set | frozenset):
        return [_jsonable(value) for value in fact]
    if getattr(fact, "ndim", None) == 0:  # a number of numpy or torch
        return _jsonable(fact.item())
    return str(fact)


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}".rstrip()


def _per_second(rate: float, unit: str) -> str:
    number = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
    return f"{number} {unit}/s" if unit else f"{number}/s"


def _duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
