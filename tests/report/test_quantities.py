"""Numbers as people read them, at the edges of units and digits."""

from __future__ import annotations

import pytest

from distill.report.quantities import percent, points, seconds, size, with_interval


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_990, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (1_500_000_000, "1.50 GB"),
        (643_000_000_000, "643 GB"),
        (2_500_000_000_000_000, "2500 TB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("duration", "text"), [(0.0, "0.00 s"), (9.99, "9.99 s"), (9.996, "10.0 s"), (12345.6, "12,345.6 s")]
)
def test_seconds(duration: float, text: str) -> None:
    assert seconds(duration) == text


def test_fractions_become_percent() -> None:
    assert percent(1.0) == "100.0%"
    assert with_interval(0.8234, 0.0061) == "82.3% ± 0.6"
    assert with_interval(0.8234, None) == "82.3%"
    assert points(0.113, 0.017) == "+11.3 ± 1.7"
    assert points(-0.02, None) == "-2.0"
