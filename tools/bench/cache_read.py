"""Reading the cache from disk against numpy's memmap over the same bytes, and the memory that a pass takes.

    python tools/bench/cache_read.py [--rows 131072] [--repeats 5]

A first process fills a cache with features of 2,048 numbers an image. A second one finds everything there: it opens
the cache, asks for the rows and sums every block of 2,048. The plain form opens one .npy of the same bytes with
`numpy.load(mmap_mode="r")` and sums the same blocks. The two alternate within each repeat, all pages are in memory for
both; `ratio` is the median over repeats of plain seconds / our seconds, opening included.

Then the pass over N rows, and reading all of them back, runs in a process of its own at N and at 4 N, with a host tier
of 64 MB: the peaks of resident memory are printed.

Floor: 1.07 GB at 131,072 rows, 0.1 s at 10 GB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from distill.cache import Cache, Features, Network, Rows
from distill.contracts import Preprocessing, Split
from distill.models import build, model_config
from distill.progress import NullProgress
from distill.training.memory import peak_bytes

LAYER, WIDTH, BLOCK = "body.0", 2048, 2048
HOST_BYTES = 64_000_000
CPU = torch.device("cpu")


def main() -> None:
    args = arguments()
    if args.fill is not None:
        fill(Path(args.fill), args.rows)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        start_process(folder / "cache", args.rows)
        write_plain(folder)
        ratios = [compare(folder, args.rows) for _ in range(args.repeats)]
    peaks = {}
    for rows in (args.rows // 4, args.rows):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            peaks[rows] = start_process(Path(name) / "cache", rows)
            print(f"peak of a pass over {rows} rows, and reading them: {peaks[rows] / 1e6:.0f} MB")
    few, many = peaks.values()
    result = {
        "benchmark": "cache_read",
        "rows": args.rows,
        "ratio": round(statistics.median(ratios), 3),
        "peak_bytes_n": few,
        "peak_bytes_4n": many,
    }
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the files are put; default: the system's temporary folder")
    parser.add_argument("--fill", help=argparse.SUPPRESS)
    return parser.parse_args()


def start_process(cache: Path, rows: int) -> int:
    """Fill the cache in a process of its own; its peak memory, bytes."""
    command = [sys.executable, __file__, "--fill", str(cache), "--rows", str(rows)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def fill(folder: Path, rows: int) -> None:
    """One pass, and reading everything back; prints the peak of resident memory."""
    for _, block in request(folder, rows).blocks(BLOCK):
        block.sum()
    print(peak_bytes(CPU))


def request(folder: Path, rows: int) -> Rows:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (rows, 1, 8, 8), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.zeros(rows, dtype=torch.int64), f"{rows} random images")
    cache = Cache(folder, device=CPU, progress=NullProgress(), host_bytes=HOST_BYTES)
    return cache.request(split, network(), [Features(LAYER)])[Features(LAYER)]


def network() -> Network:
    config = model_config({"name": "convnet", "width": 32, "depth": 2})
    state = build(config, image_shape=(1, 8, 8), classes=10, seed=0).state_dict()
    return Network(config, (1, 8, 8), 10, Preprocessing((0.5,), (0.25,)), state, facts={})


def write_plain(folder: Path) -> None:
    """The same bytes as one array."""
    shards = sorted((folder / "cache").rglob("rows-*.npy"))
    wide = [path for path in shards if np.load(path, mmap_mode="r").shape[1] == WIDTH]
    np.save(folder / "plain.npy", np.concatenate([np.load(path) for path in wide]))


def compare(folder: Path, rows: int) -> float:
    """Plain seconds / our seconds, each with its opening."""
    images = torch.zeros(rows, 1, 8, 8, dtype=torch.uint8)
    split = Split(images, torch.zeros(rows, dtype=torch.int64), f"{rows} random images")
    ours_network = network()
    start = time.perf_counter()
    plain = np.load(folder / "plain.npy", mmap_mode="r")
    total = sum(float(plain[at : at + BLOCK].sum()) for at in range(0, rows, BLOCK))
    middle = time.perf_counter()
    cache = Cache(folder / "cache", device=CPU, progress=NullProgress(), host_bytes=HOST_BYTES)
    features = cache.request(split, ours_network, [Features(LAYER)])[Features(LAYER)]
    assert cache.images_forwarded == 0, "everything is on disk"
    ours_total = sum(float(block.numpy().sum()) for _, block in features.blocks(BLOCK))
    end = time.perf_counter()
    assert total == ours_total
    size = plain.nbytes / 1e9
    rates = size / (middle - start), size / (end - middle)
    print(
        f"memmap {rates[0]:6.2f} GB/s   cache {rates[1]:6.2f} GB/s   ratio {rates[1] / rates[0]:.3f}",
        flush=True,
    )
    return rates[1] / rates[0]


if __name__ == "__main__":
    main()
