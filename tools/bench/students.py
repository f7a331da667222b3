"""Training K students: the engine's own way against a plain loop, in one run.

    python tools/bench/students.py [--students 6] [--width 32] [--epochs 60] [--repeats 3] [--device cpu]

The plain loop is what one writes first: one network after another, all threads, float32, torch's GroupNorm, NCHW.
Both train on the same 100 images (scikit-learn's digits at 32 x 32 x 3, CIFAR-10's size) with the same number of
steps and are tested on the same 360. Times alternate within each repeat, so that a slow spell of the machine hits
both; `ratio` is the median over repeats of plain seconds / engine seconds. Worker processes are started before.

Floors of one step (forward and backward, B = 100, width 32): 3 x 100 x 3.8 M multiply-adds = 1.15 G, 12 ms a core at
100 GFLOP/s; and about 60 MB of activations written and read, 12 ms a core at 10 GB/s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from distill.contracts import Preprocessing
from distill.evaluation.scores import interval95
from distill.models import model_config
from distill.progress import NullProgress
from distill.training.config import TrainConfig
from distill.training.engine import Engine, worker_count
from distill.training.job import Job, Pool

PER_CLASS = 10
TEST = 360


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    pool, test = data()
    config = TrainConfig(epochs=args.epochs, batch_size=len(pool), augment="none", lr=0.02, schedule="cosine")
    model = model_config({"name": "convnet", "width": args.width, "depth": 3})
    jobs = [
        Job(model, 10, config, pool, seed=k, test=test, label=f"student {k}") for k in range(args.students)
    ]
    rows: list[tuple[float, float]] = []
    with Engine(device, precision=args.precision, progress=NullProgress(), way=args.way) as engine:
        warm = [
            Job(model, 10, config.model_copy(update={"epochs": 1}), pool, seed=k)
            for k in range(args.students)
        ]
        engine.train(warm, title="warm up")
        for _ in range(args.repeats):
            start = time.perf_counter()
            plain = [plain_student(pool, test, config, args.width, k, device) for k in range(args.students)]
            middle = time.perf_counter()
            ours = [result.accuracy for result in engine.train(jobs, title="students")]
            rows.append((middle - start, time.perf_counter() - middle))
        way, dtype = engine.choose(jobs), str(engine.dtype)
    report(rows, plain, [value for value in ours if value is not None], args, way, dtype)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--students", type=int, default=6)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32", "bfloat16"])
    parser.add_argument("--way", default="auto", choices=["auto", "serial", "workers", "stack"])
    return parser.parse_args()


def data() -> tuple[Pool, Pool]:
    """100 training and 360 test digits, uint8 (N, 3, 32, 32)."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    pixels, labels = (images * 255).round().to(torch.uint8), torch.from_numpy(digits.target)
    train = torch.cat([(labels[TEST:] == c).nonzero().squeeze(1)[:PER_CLASS] + TEST for c in range(10)])
    pre = Preprocessing(mean=(0.3,) * 3, std=(0.35,) * 3)
    return (
        Pool(pixels[train].contiguous(), labels[train].long(), pre),
        Pool(pixels[:TEST].contiguous(), labels[:TEST].long(), pre),
    )


class PlainConvNet(nn.Sequential):
    """The field's ConvNet as it is usually written."""

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        for channels in (3, width, width):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                nn.GroupNorm(width, width),
                nn.ReLU(inplace=True),
                nn.AvgPool2d(2),
            ]
        super().__init__(*layers, nn.Flatten(), nn.Linear(width * 16, 10))


def plain_student(
    pool: Pool, test: Pool, config: TrainConfig, width: int, seed: int, device: torch.device
) -> float:
    """Train one network the plain way; its test accuracy."""
    torch.manual_seed(seed)
    network = PlainConvNet(width).to(device)
    images, labels = normalised(pool).to(device), pool.targets.to(device)
    optimizer = torch.optim.SGD(
        network.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs)
    for _ in range(config.epochs):
        order = torch.randperm(len(images), device=device)
        for rows in order.split(config.batch_size):
            loss = F.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    with torch.no_grad():
        predicted = network(normalised(test).to(device)).argmax(1).cpu()
    return float((predicted == test.targets).double().mean())


def normalised(pool: Pool) -> Tensor:
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (pool.preprocessing.mean, pool.preprocessing.std)
    )
    return (pool.images.float() / 255 - mean) / std


def report(
    rows: list[tuple[float, float]],
    plain: list[float],
    ours: list[float],
    args: argparse.Namespace,
    way: str,
    dtype: str,
) -> None:
    steps = args.students * args.epochs
    print(
        f"{args.students} students, width {args.width}, {args.epochs} steps each, {args.device}, {way}, {dtype}, "
        f"{torch.get_num_threads()} threads, {worker_count()} workers"
    )
    print("repeat   plain s  ms/step    ours s  ms/step   ratio")
    for number, (a, b) in enumerate(rows):
        print(f"{number:6d} {a:9.2f} {a / steps * 1e3:8.1f} {b:9.2f} {b / steps * 1e3:8.1f} {a / b:7.2f}")
    (mean_a, half_a), (mean_b, half_b) = interval95(plain), interval95(ours)
    print(f"accuracy: plain {mean_a:.3f} +- {half_a:.3f}, ours {mean_b:.3f} +- {half_b:.3f}")
    ratio = statistics.median(a / b for a, b in rows)
    print(
        json.dumps(
            {
                "bench": "students",
                "ratio": round(ratio, 3),
                "ratios": [round(a / b, 3) for a, b in rows],
                "way": way,
                "dtype": dtype,
                "accuracy_plain": round(mean_a, 4),
                "accuracy_ours": round(mean_b, 4),
                "accuracy_within_interval": bool(abs(mean_a - mean_b) <= np.hypot(half_a, half_b)),
            }
        )
    )


if __name__ == "__main__":
    main()
