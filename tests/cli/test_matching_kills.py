"""`distill run` of trajectory matching, killed with SIGKILL: it goes on to the same bytes, whenever it was."""

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
# Few experts, each so wide that two threads would be worth it for one that is trained alone, and would round otherwise.
WIDE = """\
seed: 3
data: {name: digits, cap: 30}
train: {epochs: 2, batch_size: 20}
steps:
  - trajectory:
      ipc: 1
      experts: {model: {name: convnet, width: 128}, count: 3, epochs: 3, batch_size: 256}
      start_epochs: {last: 1}
      expert_epochs: 1
      iterations: 1
      inner_steps: 1
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


def start(folder: Path, out: str, *, workers: int = 1) -> subprocess.Popen[bytes]:
    env = {**os.environ, "DISTILL_CACHE": str(folder / f"cache-{out}"), "DISTILL_WORKERS": str(workers)}
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


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_while_experts_train_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """First before any of three is finished; then, twice side by side, until one is left, which is trained alone."""
    (tmp_path / "tiny.yaml").write_text(WIDE)
    assert start(tmp_path, "whole", workers=2).wait() == 0

    def written(pattern: str) -> int:
        return len(list((tmp_path / "cache-cut" / "trajectories").glob(f"*/{pattern}")))

    for pattern, count in (("weights.npy", 1), ("expert-*", 2)):
        process = start(tmp_path, "cut", workers=2)
        while written(pattern) < count:
            assert process.poll() is None, "too quick to be interrupted"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert written("expert-*") == (0 if pattern == "weights.npy" else 2)
    assert start(tmp_path, "cut", workers=2).wait() == 0
    assert written("expert-*") == 3
    (whole,), (cut,) = (weights(tmp_path / f"cache-{name}") for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes(), "other experts"
    whole, cut = (tmp_path / name / "set.h5" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes(), "another set of the same experts"


def weights(cache: Path) -> list[Path]:
    return list(cache.glob("trajectories/*/weights.npy"))
