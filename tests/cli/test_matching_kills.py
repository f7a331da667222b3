"""`distill run` of trajectory matching, killed with SIGKILL at random moments: it goes on to the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """\
seed: 3
data: {name: digits, cap: 30}
train: {epochs: 2, batch_size: 20}
steps:
  - trajectory:
      ipc: 1
      experts: {model: {name: convnet, width: 4}, count: 2, batch_size: 32}
      start_epochs: {last: 1}
      expert_epochs: 1
      iterations: 150
      inner_steps: 4
      lr_images: 1.0
      labels: learned
      average: 0.9
evaluate: {students: [{name: mlp, width: 8}], seeds: 2, against: []}
"""
KILLS = 4
# As the command does it, but for the state being kept more often than every 20 seconds.
PROGRAM = """
import sys
from distill.distillers import trajectory
trajectory._SAVE_SECONDS = 0.2
from distill.cli import main
main(["run", "tiny.yaml", "--out", sys.argv[1], "--quiet"])
"""


def start(folder: Path, out: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "DISTILL_CACHE": str(folder / f"cache-{out}"), "DISTILL_WORKERS": "1"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, out], cwd=folder, env=env)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_matching_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    assert start(tmp_path, "whole").wait() == 0
    state = tmp_path / "cut" / ".resume" / "step-0" / "matching.npz"
    draw = random.Random(0)
    for _ in range(KILLS):
        process = start(tmp_path, "cut")
        before = state.stat().st_mtime_ns if state.exists() else 0
        while not (state.exists() and state.stat().st_mtime_ns != before):
            assert process.poll() is None, "too quick to be interrupted"
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(tmp_path, "cut").wait() == 0
    whole, cut = ((tmp_path / name / "set.h5").read_bytes() for name in ("whole", "cut"))
    assert cut == whole
    assert not (tmp_path / "cut" / ".resume").exists()
