"""What the tests of pools have done in other processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from distill.errors import InputError


def square(number: int) -> int:
    return number * number


def slow_first(number: int) -> int:
    time.sleep(0.5 if number == 0 else 0)
    return os.getpid()


def refuse(number: int) -> int:
    if number == 3:
        raise InputError("three is refused", where="items", found="3", fix="take another")
    return number


def fail(number: int) -> int:
    return 1 // number


def be_killed(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def leave_a_mark(place: tuple[str, int]) -> int:
    folder, number = place
    Path(folder, str(number)).touch()
    time.sleep(0.2)
    return number


def large(number: int) -> bytes:
    return bytes(number)
