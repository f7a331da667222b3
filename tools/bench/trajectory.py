"""Time and memory of the matching gradient: exact, first_order and unroll, in one run.

    python tools/bench/trajectory.py [--width 128] [--batch 32] [--steps 10 20 40] [--segment 5] [--repeats 3]

One outer step of one student: ConvNet on 3 x 32 x 32 images, hard labels, DSA. Times alternate within each repeat, in
one process; the table shows the median, per inner step. Memory is the peak above what the process held before the
first step (a CPU: resident set, each figure from a process of its own; a GPU: allocated).

Floors of an inner step, in forward passes F of a batch: unroll is a forward and a backward pass and the backward pass
through both, 9 F; exact and first_order take the steps once more without a graph, and spare the convolutions' part of
the gradient within the graph (distill/matching/convolution.py), 11 F; segments of k steps are unroll and that pass as
well, but for one segment, 12 F. Memory: 4 P bytes an inner step for exact (its snapshots), a whole step's
graph an inner step for unroll.

`ratio`: time of unroll over exact, the least over T. `memory_ratio`: peak of unroll over exact at the longest T.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from distill.cache.trajectories import Layout
from distill.matching.gradient import Learned, match
from distill.matching.networks import FlatNetworks
from distill.matching.steps import InnerSteps
from distill.models import build, model_config
from distill.training.memory import keep_freed_memory, peak_bytes, reset_peak

SHAPE, CLASSES = (3, 32, 32), 10


@dataclass(frozen=True)
class Way:
    """A gradient and its segment."""

    gradient: str
    segment: int = 1

    def __str__(self) -> str:
        return self.gradient if self.segment == 1 else f"{self.gradient}, segment {self.segment}"


def main() -> None:
    args = arguments()
    if args.memory is not None:
        gradient, segment, steps = args.memory
        print(peak(args, Way(gradient, int(segment)), int(steps)))
        return
    keep_freed_memory()
    ways = [Way("exact"), Way("exact", args.segment), Way("first_order"), Way("unroll")]
    rows = []
    for steps in args.steps:
        times = measure(args, ways, steps)
        for way in ways:
            rows.append({"way": str(way), "steps": steps, "ms": round(times[way], 1)})
            print(f"T = {steps:3d}   {way!s:20} {times[way]:8.1f} ms per inner step", flush=True)
    first, last = args.steps[0], args.steps[-1]
    peaks = {}
    for steps in args.steps:
        for way in ways:
            peaks[way, steps] = peak_in_a_process(args, way, steps)
            print(f"T = {steps:3d}   {way!s:20} {peaks[way, steps] / 1e6:8.0f} MB", flush=True)
    for row in rows:
        for (way, steps), found in peaks.items():
            if (row["way"], row["steps"]) == (str(way), steps):
                row["peak_bytes"] = found
    exact, unroll = ways[0], ways[-1]
    snapshots = 4 * parameters(args) * (last - first)
    grown = peaks[exact, last] - peaks[exact, first]
    print(f"exact from T = {first} to {last}: {grown / 1e6:.0f} MB; snapshots are {snapshots / 1e6:.0f} MB")
    result = {
        "benchmark": "trajectory",
        "ratio": round(min(time_ratios(rows, exact, unroll)), 3),
        "memory_ratio": round(peaks[unroll, last] / peaks[exact, last], 2),
        "exact_grown_bytes": grown,
        "snapshot_bytes": snapshots,
        "parameters": parameters(args),
        "rows": rows,
    }
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20, 40])
    parser.add_argument("--segment", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps.sort()
    return args


class Problem:
    """One student's outer step."""

    def __init__(self, args: argparse.Namespace, steps: int) -> None:
        device = torch.device(args.device)
        module = network(args).to(device)
        self.networks = FlatNetworks(module, Layout.of(module, (0,)))
        generator = torch.Generator().manual_seed(0)
        self.start = torch.cat([value.detach().reshape(-1) for value in module.parameters()])[None]
        drift = 0.01 * torch.randn(self.start.shape, generator=generator)
        self.target = self.start + drift.to(device)
        images = torch.randn(args.batch, *SHAPE, generator=generator).to(
            device, memory_format=torch.channels_last
        )
        labels = torch.arange(args.batch, device=device) % CLASSES
        self.learned = Learned(images, labels, torch.tensor(0.01, device=device))
        self.steps = InnerSteps(
            steps,
            seeds=[0],
            samples=args.batch,
            batch=args.batch,
            augment="dsa",
            size=SHAPE[1:],
            device=device,
        )

    def run(self, way: Way) -> float:
        """Seconds of one outer step."""
        start = time.perf_counter()
        match(
            self.networks,
            self.steps,
            self.learned,
            start=self.start,
            target=self.target,
            gradient=way.gradient,  # type: ignore[arg-type]
            segment=way.segment,
        )
        if self.start.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def network(args: argparse.Namespace) -> torch.nn.Module:
    config = model_config({"name": "convnet", "width": args.width})
    return build(config, image_shape=SHAPE, classes=CLASSES, seed=0)


def parameters(args: argparse.Namespace) -> int:
    return sum(value.numel() for value in network(args).parameters())


def measure(args: argparse.Namespace, ways: list[Way], steps: int) -> dict[Way, float]:
    """Median milliseconds per inner step."""
    problem = Problem(args, steps)
    warm = Problem(args, 2)
    for way in ways:
        warm.run(way)
    seconds: dict[Way, list[float]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way in ways:
            seconds[way].append(problem.run(way))
    return {way: statistics.median(found) / steps * 1e3 for way, found in seconds.items()}


def peak(args: argparse.Namespace, way: Way, steps: int) -> int:
    """Bytes above what the process held before."""
    device = torch.device(args.device)
    Problem(args, 1).run(Way("exact"))  # libraries load, kernels are chosen
    problem = Problem(args, steps)
    reset_peak(device)
    before = peak_bytes(device)
    problem.run(way)
    return peak_bytes(device) - before


def peak_in_a_process(args: argparse.Namespace, way: Way, steps: int) -> int:
    command = [sys.executable, __file__, "--memory", way.gradient, str(way.segment), str(steps)]
    command += ["--width", str(args.width), "--batch", str(args.batch), "--device", args.device]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def time_ratios(rows: list[dict], one: Way, other: Way) -> list[float]:
    """Time of `other` over `one` at every T."""
    times = {(row["way"], row["steps"]): row["ms"] for row in rows}
    return [times[str(other), steps] / times[str(one), steps] for way, steps in times if way == str(one)]


if __name__ == "__main__":
    main()
