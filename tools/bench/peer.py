"""The other half of a benchmark: a script that runs in the environment of the package that is measured against."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self


class Peer:
    """The other interpreter: it computes when told to, one thing at a time.

    Args:
        python: the interpreter of its environment.
        script: its script in this folder, which answers each line of its input with a number of seconds.
        arguments: of the script.
        package: what the environment must have, for the message where it ends.
        environment: variables beside ours.
    """

    def __init__(
        self,
        python: str,
        script: str,
        arguments: Sequence[object],
        *,
        package: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        command = [python, str(Path(__file__).with_name(script)), *map(str, arguments)]
        self.package = package
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def ask(self, what: str) -> float:
        """Seconds that it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the peer ended: has the interpreter of --peer-python {self.package}?")
        return float(answer)
