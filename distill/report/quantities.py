"""How numbers are written for people: the same in the table and on the page."""

from __future__ import annotations


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal, such as `82.3%`."""
    return f"{100 * fraction:.1f}%"


def with_interval(mean: float, half_width: float | None) -> str:
    """An accuracy and its 95% interval, such as `82.3% ± 0.6`; without the interval where there is none."""
    return percent(mean) if half_width is None else f"{percent(mean)} ± {100 * half_width:.1f}"


def points(mean: float, half_width: float | None) -> str:
    """A difference of accuracies in percentage points and its 95% interval, such as `+11.3 ± 1.7`."""
    difference = f"{100 * mean:+.1f}"
    return difference if half_width is None else f"{difference} ± {100 * half_width:.1f}"


def size(count: int) -> str:
    """Bytes in decimal units with three digits, such as `6.40 kB`."""
    if count < 1000:
        return f"{count} B"
    value, units = count / 1000, ["TB", "GB", "MB", "kB"]
    while value >= 999.5 and len(units) > 1:  # what would round to 1000 belongs to the next unit
        value /= 1000
        units.pop()
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {units[-1]}"


def seconds(duration: float) -> str:
    """Seconds as seconds, such as `12.3 s`, so that stages can be compared at a glance."""
    return f"{duration:.2f} s" if duration < 9.995 else f"{duration:,.1f} s"


def long_seconds(duration: float) -> str:
    """Seconds, and what they are in larger units where there are many, such as `7,200.0 s (2.0 hours)`."""
    for least, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if duration >= 1.5 * least:
            return f"{seconds(duration)} ({duration / least:.1f} {unit})"
    return seconds(duration)
