"""Facility location by exact lazy greedy: ours against the PyPI package apricot-select.

    python -m venv apricot && apricot/bin/pip install apricot-select scikit-learn
    python tools/bench/facility.py --peer-python apricot/bin/python [--repeats 5] [--threads 2]
    python tools/bench/facility.py --large [--rows 200000] [--picks 2000] [--optimizer lazy|stochastic]

n = 10,000 rows in D = 256 dimensions around 200 centres of unequal weight, drawn from a seed; k = 500 picks; s_ij =
max(0, cos). Both start from the same float32 rows of length 1 and compute the similarities themselves: the peer by one
product in float32, which it needs in float64, then its `lazy` optimizer. Times alternate within each repeat, and only
one works at a time; ratios are medians over repeats. After a warm-up of both the peer still compiles its kernels at
every fit, one or two seconds; `ratio` is with that, as its users have it, `ratio_without_compile` less what a fit of
64 points takes. Values of the picks are computed in float64 from one matrix.

What it must cost here, on one core: the half of all products, 10,000^2 / 2 x 256 = 1.3e10 multiplications (0.15 to
0.25 s); writing the matrix, 4e8 bytes (0.05 s, and 0.2 s where its pages are touched first); for each pick the rows of
the references that it serves better, some n ln k of 40 kB in all, 2e9 bytes (0.3 s).

`--large` is ours alone, in a process of its own: seconds and peak memory.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peer import Peer
from torch import Tensor

from dataselect.facility import FacilityLocation, facility_location
from dataselect.greedy import Picked, stochastic_greedy
from dataselect.similarity import similarity_of
from distill.randomness import generator
from distill.training.memory import keep_freed_memory, peak_bytes, reset_peak

EPSILON = 0.01


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    if args.large:
        measure_large(args)
    else:
        measure(args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--peer-python", help="interpreter of an environment with apricot-select")
    what.add_argument("--large", action="store_true", help="ours alone on many rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--picks", type=int)
    parser.add_argument("--references", type=int, help="of --large; all without")
    parser.add_argument("--optimizer", choices=("lazy", "stochastic"), default="lazy")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.rows = args.rows or (200_000 if args.large else 10_000)
    args.picks = args.picks or (2_000 if args.large else 500)
    return args


def clustered(rows: int, dims: int) -> Tensor:
    """float32 (rows, dims): centred rows of length 1, around 200 centres of unequal weight and spread."""
    draw = generator(0, "facility", rows, dims)
    centres = torch.randn(200, dims, generator=draw)
    weights = 0.1 + torch.rand(200, generator=draw)
    own = torch.multinomial(weights, rows, replacement=True, generator=draw)
    spread = 0.35 + 0.7 * torch.rand(rows, 1, generator=draw)
    features = torch.randn(rows, dims, generator=draw).mul_(spread).add_(centres[own])
    features -= features.mean(dim=0)
    return features / torch.linalg.vector_norm(features, dim=1, keepdim=True)


def measure(args: argparse.Namespace) -> None:
    features = clustered(args.rows, args.dims)
    whole: dict[str, list[float]] = {"ours": [], "apricot": [], "compile": []}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "features.npy", features.numpy())
        with open_peer(args, Path(folder)) as peer:
            select(features, args)
            peer.ask("whole")
            for _ in range(args.repeats):
                start = time.perf_counter()
                picked = select(features, args)
                whole["ours"].append(time.perf_counter() - start)
                whole["apricot"].append(peer.ask("whole"))
                whole["compile"].append(peer.ask("compile"))
            ranking = torch.from_numpy(np.load(Path(folder) / "ranking.npy")).long()
    values = {"ours": value(features, picked.rows), "apricot": value(features, ranking)}
    print_table(whole, values, args)


def select(features: Tensor, args: argparse.Namespace) -> Picked:
    """Similarities and lazy greedy, as a selector runs them."""
    return facility_location(similarity_of(features.clone(), "cosine"), args.picks)


def value(features: Tensor, rows: Tensor) -> float:
    """f of the picks in float64."""
    exact = features.double()
    return float((exact @ exact[rows].T).clamp_(min=0).amax(dim=1).sum())


def open_peer(args: argparse.Namespace, folder: Path) -> Peer:
    """The peer, which keeps freed memory as every run of distill does: page faults are nobody's merit."""
    return Peer(
        args.peer_python,
        "facility_peer.py",
        [folder, args.picks, args.threads],
        package="apricot-select",
        environment={"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)},
    )


def print_table(whole: dict[str, list[float]], values: dict[str, float], args: argparse.Namespace) -> None:
    ours, apricot, compiling = (statistics.median(whole[name]) for name in ("ours", "apricot", "compile"))
    with_compile = [a / b for a, b in zip(whole["apricot"], whole["ours"], strict=True)]
    without = [(a - c) / b for a, b, c in zip(whole["apricot"], whole["ours"], whole["compile"], strict=True)]
    print(f"n = {args.rows:,}, D = {args.dims}, k = {args.picks}, {args.threads} threads each,", end=" ")
    print(f"medians of {args.repeats}")
    print("                           seconds   value       ratio")
    print(f"apricot-select, lazy       {apricot:7.2f}   {values['apricot']:9.3f}")
    print(f"  less compiling           {apricot - compiling:7.2f}")
    print(
        f"ours                       {ours:7.2f}   {values['ours']:9.3f}   {statistics.median(with_compile):5.2f}"
    )
    print(f"  to less compiling                              {statistics.median(without):5.2f}")
    if values["ours"] < values["apricot"] * (1 - 1e-5):
        raise SystemExit("our value is below the peer's")
    report(
        ratio=round(statistics.median(with_compile), 2),
        ratio_without_compile=round(statistics.median(without), 2),
        seconds=round(ours, 3),
        seconds_peer=round(apricot, 3),
        value_ratio=values["ours"] / values["apricot"],
        threads=args.threads,
    )


def measure_large(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    features = clustered(args.rows, args.dims).to(device)
    reset_peak(device)
    start = time.perf_counter()
    few = None
    if args.references is not None:
        order = torch.randperm(args.rows, generator=generator(0, "references"))
        few = order[: args.references].sort().values.to(device)
    similarity = similarity_of(features, "cosine", references=few)
    objective = FacilityLocation(similarity)
    if args.optimizer == "lazy":
        picked = facility_location(similarity, args.picks)
    else:
        draw = generator(0, "candidates")
        picked = stochastic_greedy(
            objective, args.picks, size=args.rows, epsilon=EPSILON, generator=draw, device=device
        )
    seconds = time.perf_counter() - start
    peak = peak_bytes(device)
    print(f"n = {args.rows:,}, D = {args.dims}, k = {args.picks:,}, {args.optimizer}, references", end=" ")
    print(
        f"{'all' if few is None else f'{len(few):,}'}: {seconds:.1f} s, peak {peak / 2**30:.2f} GiB,", end=" "
    )
    print(f"of which features {features.nbytes / 2**30:.2f} GiB; value {float(picked.gains.sum()):.3f}")
    report(rows=args.rows, picks=args.picks, seconds=round(seconds, 1), peak_bytes=peak, threads=args.threads)


def report(**facts: Any) -> None:
    print(json.dumps({"bench": "facility", **facts}))


if __name__ == "__main__":
    main()
