"""Features through the cache against the bare forward pass, in one run.

    python tools/bench/features.py [--images N] [--model resnet18] [--repeats 3] [--device cpu]

Bare: the network's forward pass over images that are normalised and on the device already, 256 at a time. Ours:
`cache.features` over uint8 images in host memory into an empty folder: normalising, the forward pass, taking the
features out, checking that they are finite, checksums, and shards synced to the disk. The two alternate within each
repeat; `ratio` is the median over repeats of bare seconds / our seconds. Images are random: their content costs
nothing. N is 4,000 on a CPU and 50,000 on a GPU, where 4,000 would be over in a moment.

Floors for 4,000 images of 32 x 32 through ResNet-18: 4,000 x 0.56 G multiply-adds, 32 s on two cores at 70 GFLOP/s
each; 12 MB of pixels read and 8 MB of features written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from distill.cache import Cache, Network
from distill.cache.forward import FORWARD_ROWS
from distill.contracts import Preprocessing, Split
from distill.models import build, model_config
from distill.progress import NullProgress
from distill.training.batches import DeviceImages
from distill.training.job import Pool
from distill.training.memory import keep_freed_memory

SHAPE, CLASSES = (3, 32, 32), 10


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    keep_freed_memory()
    split, network = data(args.images), make_network(args.model)
    images = prepared(split, network, device)
    module = network.module(device)
    warm_up(module, images, device)
    rows = []
    for repeat in range(args.repeats):
        bare = bare_seconds(module, images, device)
        ours = cache_seconds(split, network, device)
        rows.append((bare, ours))
        print(
            f"repeat {repeat}: bare {bare:7.2f} s   cache {ours:7.2f} s   ratio {bare / ours:.3f}", flush=True
        )
    ratio = statistics.median(bare / ours for bare, ours in rows)
    best = min(ours for _, ours in rows)
    print(
        f"{args.model}, {args.images} images, {device}: {args.images / best:.0f} images/s through the cache"
    )
    print(
        json.dumps(
            {"benchmark": "features", "images": args.images, "device": str(device), "ratio": round(ratio, 3)}
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, help="4,000 on a CPU, 50,000 on a GPU")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.images is None:
        args.images = 4_000 if torch.device(args.device).type == "cpu" else 50_000
    return args


def data(images: int) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, *SHAPE), dtype=torch.uint8, generator=generator)
    return Split(pixels, torch.arange(images) % CLASSES, f"{images} random images")


def make_network(model: str) -> Network:
    config = model_config(model)
    state = build(config, image_shape=SHAPE, classes=CLASSES, seed=0).state_dict()
    return Network(config, SHAPE, CLASSES, Preprocessing((0.5,) * 3, (0.25,) * 3), state, facts={})


def prepared(split: Split, network: Network, device: torch.device) -> list[torch.Tensor]:
    """Blocks as the network takes them, on the device."""
    pool = Pool(split.images, split.labels, network.preprocessing)
    return list(DeviceImages(pool, device).blocks(FORWARD_ROWS))


@torch.no_grad()
def warm_up(module: torch.nn.Module, images: list[torch.Tensor], device: torch.device) -> None:
    for _ in range(3):
        module(images[0])
    finish(device)


@torch.no_grad()
def bare_seconds(module: torch.nn.Module, images: list[torch.Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    for block in images:
        module(block)
    finish(device)
    return time.perf_counter() - start


def cache_seconds(split: Split, network: Network, device: torch.device) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = Cache(Path(folder) / "cache", device=device, progress=NullProgress())
        cache.features(split, network)
        return time.perf_counter() - start


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
