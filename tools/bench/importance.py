"""Importance resampling of documents, end to end: ours against the PyPI package data-selection.

    python -m venv dsir && dsir/bin/pip install data-selection==1.0.3
    python tools/bench/importance.py --peer-python dsir/bin/python [--hash fast|sha256] [--corpus FOLDER]
    python tools/bench/importance.py --memory [--hash fast|sha256] [--corpus FOLDER]

The corpus is text of this machine (importance_corpus.py), 800 MB without --megabytes; FOLDER keeps it for the next
time. Ours works on all of it, the peer on a sample of its documents, with as many processes; compared are MB of JSON
lines a second, and `ratio` is the median over repeats, in which one works after the other. Both count unigrams and
bigrams of all documents and of the target in 10,000 buckets, weigh every document and draw 1% of those with 100 tokens
or more. Ours is the step `dsir` as the pipeline runs it, in a process of its own, with the start of its workers, and
with the third pass that compares the choice with as many random documents, which the peer does not make; the peer's
workers start once and are kept, and its resampling also writes what it drew, which takes it a hundredth of its time.

`--memory` is ours alone: greatest resident memory of the main process and of each worker on a quarter of the corpus
and on all of it, and by how many bytes a document of the difference their sum grew; medians over repeats. Where memory
does not grow, that is noise of either sign.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from importance_corpus import Made, make_corpus
from peer import Peer

from dataselect.dsir import DSIR
from distill.cache.pass_costs import kept
from distill.cache.text_passes import FOLDER, TextPasses
from distill.contracts import DocumentContext
from distill.costs import Costs, PoolWorkers
from distill.parallel.local import LocalPool
from distill.progress import NullProgress
from distill.text import CorpusConfig, find_files

DRAWN = 0.01  # of the documents
STAGES = ("count", "score", "choose and compare")
PEER_STAGES = ("fit", "weigh", "resample")


def main() -> None:
    args = arguments()
    if args.alone is not None:
        print(json.dumps(run_ours(args)))
        return
    with corpus_folder(args) as folder:
        made = make_corpus(
            folder, megabytes=args.megabytes, sample_megabytes=args.sample_megabytes, workers=args.workers
        )
        print_corpus(made)
        if args.memory:
            measure_memory(made, args)
        else:
            measure(made, args)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--peer-python", help="interpreter of an environment with data-selection")
    what.add_argument("--memory", action="store_true", help="memory of ours alone, on a quarter and on all")
    what.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)  # one run: TARGET FILE...
    parser.add_argument("--hash", choices=("fast", "sha256"), default="fast")
    parser.add_argument(
        "--corpus", type=Path, help="folder that keeps the corpus; made where it is not there"
    )
    parser.add_argument("--megabytes", type=float, default=800, help="of the corpus, 200 or more")
    parser.add_argument("--sample-megabytes", type=float, default=10, help="what the peer works on")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--drawn", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.megabytes < 200:
        parser.error("a corpus has 200 MB or more")
    return args


@contextmanager
def corpus_folder(args: argparse.Namespace) -> Iterator[Path]:
    if args.corpus is not None:
        yield args.corpus.absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def print_corpus(made: Made) -> None:
    print(f"corpus: {made.bytes / 1e6:.0f} MB, {made.documents:,} documents,", end=" ")
    print(f"{made.bytes / made.documents:.0f} bytes each", end="")
    if made.copies > 1:
        print(f"; this machine has less text: it came {made.copies} times, marked", end="")
    print(f"; sample of the peer: {made.sample_bytes / 1e6:.1f} MB, {made.sample_documents:,} documents")


def measure(made: Made, args: argparse.Namespace) -> None:
    ours: list[dict[str, Any]] = []
    peers: list[dict[str, float]] = []
    load = [os.getloadavg()[0]]
    files = sorted(made.corpus.iterdir())
    ours_alone(made, files[:1], made.documents, args)  # compiles, where that was never done
    with tempfile.TemporaryDirectory() as work, open_peer(made, args, work) as peer:
        for _ in range(args.repeats):
            ours.append(ours_alone(made, files, made.documents, args))
            peers.append({stage: peer.ask(stage) for stage in PEER_STAGES})
            load.append(os.getloadavg()[0])
    print_table(made, ours, peers, load, args)


def open_peer(made: Made, args: argparse.Namespace, work: str) -> Peer:
    count = round(DRAWN * made.sample_documents)
    return Peer(
        args.peer_python,
        "importance_peer.py",
        [made.sample, made.target, args.workers, count, work],
        package="data-selection",
        environment={"TQDM_DISABLE": "1"},
    )


def ours_alone(made: Made, files: Sequence[Path], documents: int, args: argparse.Namespace) -> dict[str, Any]:
    """`run_ours` in a fresh process."""
    command = [sys.executable, __file__, "--hash", args.hash, "--workers", str(args.workers)]
    command += ["--drawn", str(round(DRAWN * documents)), "--alone", str(made.target), *map(str, files)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def run_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each stage, documents, and greatest memory of the processes: the step, as the pipeline runs it."""
    target_file, *files = args.alone
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as name, LocalPool(args.workers) as pool:
        folder = Path(name)
        corpus = find_files(CorpusConfig(files=files), where="data.files")
        target = find_files(CorpusConfig(files=[target_file]), where="target.files")
        step = DSIR(DSIR.Config(count=args.drawn, hash=args.hash))
        (folder / "scratch").mkdir()
        passes = TextPasses(folder / "cache", costs=Costs(PoolWorkers(pool)))
        ctx = DocumentContext(0, corpus, {"target": target}, pool, passes, NullProgress(), folder / "scratch")
        choice = step.run(ctx)
        whole = time.perf_counter() - begun
        counting, scoring = (
            sum(
                cost.seconds
                for place in sorted((folder / "cache" / FOLDER).iterdir())
                for cost in kept(place)
                if any(place.glob(f"{kind}-*.npz"))
            )
            for kind in ("counts", "scores")
        )
        peaks = [peak_of(process) for process in [os.getpid(), *children()]]
    assert len(choice.documents) == args.drawn
    return {
        "seconds": dict(zip(STAGES, (counting, scoring, whole - counting - scoring), strict=True)),
        "documents": choice.corpus.documents,
        "bytes": sum(file.size for file in corpus.files),
        "peaks": peaks,
        "kl": {kind: getattr(choice.targets[0], f"kl_{kind}") for kind in ("corpus", "random", "chosen")},
    }


def children() -> list[int]:
    """Processes of this one."""
    lists = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(process) for each in lists for process in each.read_text().split()]


def peak_of(process: int) -> int:
    """Greatest resident memory of a process so far, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def print_table(
    made: Made,
    ours: list[dict[str, Any]],
    peers: list[dict[str, float]],
    load: list[float],
    args: argparse.Namespace,
) -> None:
    rates = [run["bytes"] / 1e6 / sum(run["seconds"].values()) for run in ours]
    peer_rates = [made.sample_bytes / 1e6 / sum(run.values()) for run in peers]
    ratio = statistics.median(a / b for a, b in zip(rates, peer_rates, strict=True))
    own = {stage: statistics.median(run["seconds"][stage] for run in ours) for stage in STAGES}
    other = {stage: statistics.median(run[stage] for run in peers) for stage in PEER_STAGES}
    rate, peer_rate = statistics.median(rates), statistics.median(peer_rates)
    documents = ours[0]["documents"]
    print(f"hash: {args.hash}, {args.workers} processes each, medians of {args.repeats},", end=" ")
    print(f"load of the machine {min(load):.1f} to {max(load):.1f} on {os.cpu_count()} cores")
    print("                      MB  documents    count    score   choose   total s    MB/s   ratio")
    print(row("data-selection", made.sample_bytes, made.sample_documents, other, peer_rate))
    print(row("ours", ours[0]["bytes"], documents, own, rate) + f" {ratio:7.1f}")
    told = ", ".join(f"{kind} {value:.3f}" for kind, value in ours[0]["kl"].items())
    print(f"KL divergence of the target's n-grams, in nats: {told}")
    report(
        hash=args.hash,
        ratio=round(ratio, 2),
        ratios=[round(a / b, 2) for a, b in zip(rates, peer_rates, strict=True)],
        megabytes_a_second=round(rate, 2),
        megabytes_a_second_peer=round(peer_rate, 3),
        seconds={stage: round(value, 2) for stage, value in own.items()},
        seconds_peer={stage: round(value, 2) for stage, value in other.items()},
        documents=documents,
        documents_peer=made.sample_documents,
        workers=args.workers,
        load=max(load),
        kl=ours[0]["kl"],
    )


def row(name: str, size: int, documents: int, seconds: dict[str, float], rate: float) -> str:
    stages = " ".join(f"{value:8.2f}" for value in seconds.values())
    return f"{name:16s} {size / 1e6:7.1f} {documents:10,} {stages} {sum(seconds.values()):9.2f} {rate:7.2f}"


def measure_memory(made: Made, args: argparse.Namespace) -> None:
    files = sorted(made.corpus.iterdir())
    runs: dict[int, list[dict[str, Any]]] = {1: [], 4: []}
    ours_alone(
        made, files[:1], made.documents // len(files) // 2, args
    )  # compiles, where that was never done
    for _ in range(args.repeats):
        for times, own in ((1, files[: len(files) // 4]), (4, files)):
            runs[times].append(ours_alone(made, own, made.documents * times // 4, args))
    print(f"hash: {args.hash}, {args.workers} workers, medians of {args.repeats}; greatest memory in MiB")
    print("corpus       MB  documents     main  workers            sum")
    totals = {}
    for times, each in runs.items():
        totals[times] = statistics.median(sum(run["peaks"]) for run in each)
        main_peak = statistics.median(run["peaks"][0] for run in each)
        sorted_peaks = [sorted(run["peaks"][1:]) for run in each]
        workers = [statistics.median(peaks) for peaks in zip(*sorted_peaks, strict=True)]
        told = " ".join(f"{peak / 2**20:8.1f}" for peak in workers)
        print(f"{times}x     {each[0]['bytes'] / 1e6:9.1f} {each[0]['documents']:10,}", end=" ")
        print(f"{main_peak / 2**20:8.1f} {told} {totals[times] / 2**20:8.1f}")
    more = runs[4][0]["documents"] - runs[1][0]["documents"]
    growth = (totals[4] - totals[1]) / more
    print(f"{growth:.2f} bytes for each of {more:,} documents more")
    report(
        hash=args.hash,
        bytes_a_document=round(growth, 2),
        peak_1x=int(totals[1]),
        peak_4x=int(totals[4]),
        documents_more=more,
        workers=args.workers,
    )


def report(**facts: Any) -> None:
    print(json.dumps({"bench": "importance", **facts}))


if __name__ == "__main__":
    main()
