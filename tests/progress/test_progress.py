"""Progress: plain lines by a fake clock, bars on a terminal, quiet, and a log that nothing can silence."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import progress as module
from distill.progress import NullProgress, open_progress


class FakeClock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def events(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


def test_plain_lines_of_one_task(clock: FakeClock) -> None:
    stream = io.StringIO()
    with open_progress(None, stream=stream, clock=clock) as progress:  # noqa: SIM117
        with progress.task("features", total=1000, unit="image") as task:
            for _ in range(10):
                clock.sleep(2)
                task.advance(100)
    assert stream.getvalue().splitlines() == [
        "features: started (1000 image)",
        "features: 300/1000 (30%), 50 image/s, 14 s left",
        "features: 600/1000 (60%), 50 image/s, 8.0 s left",
        "features: 900/1000 (90%), 50 image/s, 2.0 s left",
        "features: done, 1000 image in 20 s (50 image/s)",
    ]


def test_plain_lines_of_a_task_without_total_or_count(clock: FakeClock) -> None:
    stream = io.StringIO()
    with open_progress(None, stream=stream, clock=clock) as progress:
        with progress.task("search", unit="step") as task:
            clock.sleep(8)
            task.advance(2)
        with progress.task("verify"):
            clock.sleep(75)
    assert stream.getvalue().splitlines() == [
        "search: started",
        "search: 2, 0.25 step/s",
        "search: done, 2 step in 8.0 s (0.25 step/s)",
        "verify: started",
        "verify: done in 1 min 15 s",
    ]


def test_nested_tasks_are_indented_and_each_keeps_its_own_interval(clock: FakeClock) -> None:
    stream = io.StringIO()
    with (
        open_progress(None, stream=stream, clock=clock) as progress,
        progress.task("outer", total=2) as outer,
    ):
        clock.sleep(6)
        with progress.task("inner", total=2) as inner:
            outer.advance()
            inner.advance()
        progress.note("half-way")
    assert stream.getvalue().splitlines() == [
        "outer: started (2)",
        "  inner: started (2)",
        "outer: 1/2 (50%), 0.167/s, 6.0 s left",
        "  inner: done, 1 in 0.0 s",
        "half-way",
        "outer: done, 1 in 6.0 s (0.167/s)",
    ]


def test_remaining_time_is_not_told_from_the_start_up_alone(clock: FakeClock) -> None:
    stream = io.StringIO()
    with open_progress(None, stream=stream, clock=clock) as progress:  # noqa: SIM117
        with progress.task("students", total=1000, unit="step") as task:
            for count in (9, 1):
                clock.sleep(6)
                task.advance(count)
    assert stream.getvalue().splitlines()[1:3] == [
        "students: 9/1000 (1%), 1.5 step/s",
        "students: 10/1000 (1%), 0.833 step/s, 19 min 48 s left",
    ]


def test_rate_forgets_a_resumed_run_s_head_start(clock: FakeClock) -> None:
    stream = io.StringIO()
    with (
        open_progress(None, stream=stream, clock=clock) as progress,
        progress.task("recover", total=2000, unit="step") as task,
    ):
        clock.sleep(1)
        task.advance(1000)  # found on disk
        for _ in range(60):
            clock.sleep(1)
            task.advance(2)
    assert stream.getvalue().splitlines()[-2] == "recover: 1118/2000 (56%), 2 step/s, 7 min 21 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 00 s"),
     (3599, "59 min 59 s"), (3600, "1 h 00 min"), (7384, "2 h 03 min")],
)  # fmt: skip
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert module._duration(seconds) == text


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_shows_warnings_alone_and_logs_everything(tmp_path: Path, terminal: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    with open_progress(tmp_path / "log.jsonl", quiet=True, stream=stream) as progress:
        progress.note("100 of 200 images used")
        with progress.task("features", total=3) as task:
            task.advance(3)
        progress.warn("2 bad images", bad=2)
    assert stream.getvalue() == "warning: 2 bad images\n"
    assert [entry["event"] for entry in events(tmp_path / "log.jsonl")] == [
        "note", "started", "finished", "warning",
    ]  # fmt: skip


def test_terminal_draws_bars_and_leaves_a_line(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with open_progress(None, stream=stream, clock=clock) as progress:
        with progress.task("features [raw]", total=100, unit="image") as task:
            clock.sleep(4)
            task.advance(50)
            with progress.task("shards"):
                pass
            progress.warn("careful")
        left = stream.getvalue()
    assert "━" in left
    assert "\x1b[?25h" in left, "the cursor is shown again when the last task ends"
    assert "✓" in left
    assert "features [raw]: done, 50 image in 4.0 s (12.5 image/s)" in left.split("✓")[1]
    assert left.count("✓") == 1, "inner tasks vanish"
    assert "careful" in left


def test_bars_show_count_rate_and_remaining_time(clock: FakeClock) -> None:
    from rich.console import Console

    stream = Terminal()
    with (
        open_progress(None, stream=stream, clock=clock) as progress,
        progress.task("features", total=100, unit="image") as task,
    ):
        clock.sleep(4)
        task.advance(50)
        drawn = io.StringIO()
        Console(file=drawn, width=100).print(progress.display._draw())  # type: ignore[attr-defined]
    assert drawn.getvalue().startswith("features ━")
    assert drawn.getvalue().rstrip().endswith("50/100 (50%), 12.5 image/s, 4.0 s left")


def test_dumb_terminal_gets_plain_lines(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with open_progress(None, stream=stream, clock=clock) as progress, progress.task("features"):
        pass
    assert stream.getvalue() == "features: started\nfeatures: done in 0.0 s\n"


def test_log_tells_every_event_with_time_and_facts(tmp_path: Path, clock: FakeClock) -> None:
    log = tmp_path / "log.jsonl"
    with open_progress(log, stream=io.StringIO(), clock=clock) as progress:
        with progress.task("teacher", total=4, unit="epoch") as task:
            clock.sleep(2.5)
            task.advance(4)
        progress.note("1000 of 60000 images used", used=1000)
        progress.record("cache", hit=True)
    found = events(log)
    for entry in found:
        time = datetime.fromisoformat(entry.pop("time"))
        assert time.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
    assert found == [
        {"event": "started", "task": "teacher", "total": 4, "unit": "epoch"},
        {"event": "finished", "task": "teacher", "count": 4, "seconds": 2.5},
        {"event": "note", "text": "1000 of 60000 images used", "used": 1000},
        {"event": "cache", "hit": True},
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_does_not_obey_what_is_told(tmp_path: Path, terminal: bool) -> None:
    """Names of files come from strangers; the log, which is JSON, has them as far as UTF-8 has."""
    stream = Terminal() if terminal else io.StringIO()
    with open_progress(tmp_path / "log.jsonl", stream=stream, quiet=True) as progress:
        progress.warn("see a\x1b[2J\udcff.jsonl")
    assert "\x1b[2J" not in stream.getvalue() and r"a\x1b[2J\udcff.jsonl" in stream.getvalue()
    (event,) = events(tmp_path / "log.jsonl")
    assert event["text"] == "see a\x1b[2J?.jsonl"


def test_log_is_written_at_once(tmp_path: Path) -> None:
    with open_progress(tmp_path / "log.jsonl", stream=io.StringIO()) as progress:
        progress.record("begin")
        assert [entry["event"] for entry in events(tmp_path / "log.jsonl")] == ["begin"]


def test_log_of_a_resumed_run_continues_after_a_torn_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"event": "first"}\n{"event": "to')
    with open_progress(log, stream=io.StringIO()) as progress:
        progress.record("resumed")
    first, torn, resumed = log.read_text().splitlines()
    assert (first, torn) == ('{"event": "first"}', '{"event": "to')
    assert json.loads(resumed)["event"] == "resumed"


def test_log_takes_facts_that_json_cannot_say(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    facts = {
        "loss": float("nan"),
        "best": np.float32(0.5),
        "n": np.int64(3),
        "path": Path("a"),
        "pair": (1, {2}),
    }
    with open_progress(log, stream=io.StringIO()) as progress:
        progress.record("step", **facts, time=7, name="\udcff")
    (entry,) = events(log)
    assert entry["time_"] == 7
    assert entry["name"] == "?"
    assert {name: entry[name] for name in facts} == {
        "loss": "nan", "best": 0.5, "n": 3, "path": "a", "pair": [1, [2]],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "ending"),
    [(RuntimeError("boom"), "failed"), (SystemExit(3), "failed"), (KeyboardInterrupt(), "interrupted")],
)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_task_that_did_not_finish_is_closed_and_recorded(
    tmp_path: Path,
    clock: FakeClock,
    terminal: bool,
    error: BaseException,
    ending: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal() if terminal else io.StringIO()
    with (
        pytest.raises(type(error)),
        open_progress(tmp_path / "log.jsonl", stream=stream, clock=clock) as progress,
        progress.task("outer"),
        progress.task("features", total=9) as task,
    ):
        task.advance(2)
        clock.sleep(1)
        raise error
    assert f"features: {ending} after 1.0 s, 2/9" in stream.getvalue()
    ends = [entry for entry in events(tmp_path / "log.jsonl") if entry["event"] != "started"]
    assert [(entry["event"], entry["task"], entry["count"], entry["seconds"]) for entry in ends] == [
        (ending, "features", 2, 1.0), (ending, "outer", 0, 1.0),
    ]  # fmt: skip
    told = f"{type(error).__name__}: {error}" if ending == "failed" else None
    assert ends[0].get("error") == told
    drawing = [thread for thread in threading.enumerate() if "Refresh" in type(thread).__name__]
    for thread in drawing:  # told to stop, but not waited for
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in drawing)


def test_log_that_cannot_be_opened_warns_once_and_the_run_goes_on(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_progress(tmp_path / "missing" / "log.jsonl", quiet=True, stream=stream) as progress:
        progress.record("one")
        progress.record("two")
    assert stream.getvalue().count("warning:") == 1
    assert "log.jsonl: not written" in stream.getvalue()


def test_full_disk_warns_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    put = module._Log._put
    with open_progress(tmp_path / "log.jsonl", quiet=True, stream=stream) as progress:
        progress.record("before")

        def full(self: Any, line: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module._Log, "_put", full)
        with progress.task("features") as task:
            task.advance()
        monkeypatch.setattr(module._Log, "_put", put)
        progress.record("after")
    assert stream.getvalue().count("No space left on device") == 1
    assert [entry["event"] for entry in events(tmp_path / "log.jsonl")] == ["before"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_real_full_device_does_not_end_the_run() -> None:
    stream = io.StringIO()
    with open_progress(Path("/dev/full"), quiet=True, stream=stream) as progress:
        progress.record("one")
        progress.record("two")
    assert stream.getvalue().count("warning: /dev/full: not written") == 1


@pytest.mark.parametrize("quiet", [False, True])
def test_closed_pipe_does_not_end_the_run(tmp_path: Path, quiet: bool) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with (
        open_progress(tmp_path / "log.jsonl", quiet=quiet, stream=Gone()) as progress,
        progress.task("features"),
    ):
        progress.warn("nobody hears this")
    assert [entry["event"] for entry in events(tmp_path / "log.jsonl")] == ["started", "warning", "finished"]


def test_threads_advance_one_task_without_losing_counts(tmp_path: Path) -> None:
    def work() -> None:
        for _ in range(2000):
            task.advance()

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with (
            open_progress(tmp_path / "log.jsonl", quiet=True, stream=io.StringIO()) as progress,
            progress.task("features") as task,
        ):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert events(tmp_path / "log.jsonl")[-1]["count"] == 8000


def test_null_progress_tells_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    progress = NullProgress()
    with progress.task("features", total=3, unit="image") as task:
        task.advance()
        progress.note("a")
        progress.warn("b", fact=1)
        progress.record("c")
    assert capfd.readouterr() == ("", "")


def test_nothing_heavy_is_imported_without_a_terminal() -> None:
    code = (
        "import sys\n"
        "from distill.progress import open_progress\n"
        "with open_progress(None) as progress, progress.task('features') as task: task.advance()\n"
        "print(sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert done.stderr.startswith("features: started\n")
