"""Reading stored labels of views in any order, against a plain memory map.

    python tools/bench/labels.py [--classes 1000] [--images 1000] [--passes 50] [--batch 64] [--batches 2000]

A set with labels of codec `full` is written and read back as any set is. Ours: `StoredLabels.batch` of random batches
of random passes, as students ask for them. Memory map: the same rows of a float16 .npy file, as a float32 tensor. The
two alternate within each repeat.

Floor: 2 bytes a logit read and 4 written.

`ratio`: median over repeats of the memory map's seconds / our seconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distill.contracts import DistilledSet, Preprocessing
from distill.labels.codecs import VIEWS, encode
from distill.labels.view_labels import StoredLabels
from distill.store.reader import read_set
from distill.store.writer import write_set
from distill.training.config import TrainConfig
from distill.training.job import ViewPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("classes", 1000),
        ("images", 1000),
        ("passes", 50),
        ("batch", 64),
        ("batches", 2000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        labels, mapped = write(args, Path(folder))
        generator = torch.Generator().manual_seed(0)
        epochs = torch.randint(args.passes, (args.batches,), generator=generator).tolist()
        starts = (
            torch.randint(args.images // args.batch, (args.batches,), generator=generator) * args.batch
        ).tolist()
        places = list(zip(epochs, starts, strict=True))
        images, index = torch.empty(args.batch, 0), torch.empty(0)

        def ours(epoch: int, start: int) -> Tensor:
            return labels.batch(epoch, start, images, index)[0]

        def plain(epoch: int, start: int) -> Tensor:
            return torch.from_numpy(mapped[epoch, start : start + args.batch].astype(np.float32))

        assert all(torch.equal(ours(*place), plain(*place)) for place in places[:20])
        ratios = []
        for repeat in range(args.repeats):
            theirs, own = seconds(plain, places), seconds(ours, places)
            ratios.append(theirs / own)
            print(
                f"repeat {repeat}: memory map {1e6 * theirs / len(places):7.1f} us a batch   ours "
                f"{1e6 * own / len(places):7.1f} us a batch   ratio {theirs / own:.3f}"
            )
    print(json.dumps({"benchmark": "labels", **vars(args), "ratio": round(statistics.median(ratios), 3)}))


def write(args: argparse.Namespace, folder: Path) -> tuple[StoredLabels, np.ndarray]:
    """The labels of a set as it is read, and the same as a memory map."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(args.passes, args.images, args.classes, generator=generator)
    plan = ViewPlan(0, args.passes, args.batch, "resized_crop", 0.08, "cutmix", 1.0)
    soft = encode(logits, codec="full", temperature=20.0, teacher="none", **{VIEWS: asdict(plan)})
    made = DistilledSet(
        images=torch.zeros(args.images, 1, 8, 8, dtype=torch.uint8),
        labels=torch.arange(args.images) % args.classes,
        classes=tuple(map(str, range(args.classes))),
        preprocessing=Preprocessing((0.5,), (0.5,)),
        train=TrainConfig(),
        soft=soft,
    )
    write_set(made, folder / "set.h5")
    np.save(folder / "logits.npy", soft.arrays["logits"])
    again = read_set(folder / "set.h5").soft
    assert again is not None
    return StoredLabels(again, torch.zeros(args.images, dtype=torch.int64)), np.load(
        folder / "logits.npy", mmap_mode="r"
    )


def seconds(read: Callable[[int, int], Tensor], places: list[tuple[int, int]]) -> float:
    start = time.perf_counter()
    for place in places:
        read(*place)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
