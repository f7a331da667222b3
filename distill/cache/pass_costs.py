"""What passes over the data cost, told beside the rows that they left, so that later runs are charged for them.

FOLDER/.cost    lines `PASS START STOP SECONDS PEAK_BYTES`: samples [START, STOP) went through the network in pass PASS

A pass that brought several quantities leaves the same line with each, and who reads several of them is charged once.
Who reads one of them is charged for the whole pass: what that one alone would have cost is not known.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

FILE = ".cost"


class PassCost(NamedTuple):
    """What a range of samples cost.

    Args:
        of: which pass.
        start, stop: the samples.
        seconds: of the pass, until they were done.
        peak_bytes: of memory, then.
    """

    of: str
    start: int
    stop: int
    seconds: float
    peak_bytes: int

    @property
    def key(self) -> str:
        """Under which it is charged: the same with every quantity of the pass."""
        return f"{self.of}-{self.start}-{self.stop}"


def keep(folder: Path, cost: PassCost) -> None:
    """Add a line: a short one, appended, so that processes do not disturb each other."""
    line = f"{cost.of} {cost.start} {cost.stop} {cost.seconds:.6f} {cost.peak_bytes}\n"
    # A cost that cannot be kept is not known later, and that is told then.
    with suppress(OSError), (folder / FILE).open("a") as file:
        file.write(line)


def kept(folder: Path) -> list[PassCost]:
    """The whole lines, in order; what was torn off is passed over."""
    found = []
    with suppress(OSError):
        for line in (folder / FILE).read_text(errors="replace").splitlines():
            with suppress(ValueError):
                of, start, stop, seconds, peak = line.split()
                found.append(PassCost(of, int(start), int(stop), float(seconds), int(peak)))
    return found
