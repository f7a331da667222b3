"""Seconds per recovered image, against a plain form of the released loop, in one run.

    python tools/bench/recover.py [--ipc 10] [--iterations 20] [--repeats 3] [--device cpu]

CIFAR-10-sized images of 10 classes, recovered from two teachers that both judge every step: a ResNet-18 and a ConvNet
(width 128) with batch norm, whose running statistics are those of random images. Plain: one image of each class at a
time, NCHW, hooks that permute and copy the input of every batch norm and take its variance, a fresh Adam for each.
Ours: `recover`, all images as groups of one batch. The same number of steps, objective and optimiser; views are
left out, as they are drawn in another way. The objective that both reach is compared. The two alternate within each
repeat, and both have an allocator that keeps freed memory.

Floors: of a step and an image, a forward pass and a backward pass to the pixels through both networks (2 F each), and
the statistics, which read every batch norm's input once forward and once back.

`ratio`: median over repeats of plain seconds / our seconds. `objective`: ours / plain, at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.cache import Cache, Network
from distill.contracts import Context, Preprocessing
from distill.costs import Costs
from distill.models import build, model_config
from distill.progress import NullProgress
from distill.recovery.initial import Initial
from distill.recovery.objective import Judge
from distill.recovery.recover import Recovery, groups_of, recover
from distill.recovery.statistics import FIRST_LAYER
from distill.training.config import TrainConfig
from distill.training.engine import Engine
from distill.training.memory import keep_freed_memory, peak_bytes, reset_peak

SHAPE, CLASSES = (3, 32, 32), 10
PLAIN = Preprocessing((0.5,) * 3, (0.25,) * 3)
WEIGHTS, STATISTICS, LR = (0.6, 0.4), 0.01, 0.25
MODELS = ("resnet18", {"name": "convnet", "width": 128, "norm": "batch"})


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    keep_freed_memory()
    networks = [teacher(model, seed) for seed, model in enumerate(MODELS)]
    labels = torch.arange(CLASSES).repeat_interleave(args.ipc)
    generator = torch.Generator().manual_seed(0)
    initial = torch.randn(len(labels), *SHAPE, generator=generator).clamp(-2, 2).to(device)
    plain_seconds(networks, initial[:: args.ipc], labels[:: args.ipc], 2, device)  # kernels are chosen
    rows = []
    for repeat in range(args.repeats):
        reset_peak(device)
        theirs, plain = plain_seconds(networks, initial, labels, args.iterations, device)
        ours, learned = our_seconds(networks, initial, labels, args.iterations, device)
        share = objective(networks, learned, labels, device) / objective(networks, plain, labels, device)
        rows.append((theirs, ours, share))
        print(
            f"repeat {repeat}: seconds an image: plain {theirs / len(labels):.3f}, ours {ours / len(labels):.3f}   "
            f"ratio {theirs / ours:.2f}   objective {share:.4f}",
            flush=True,
        )
    result = {
        "benchmark": "recover",
        "images": len(labels),
        "iterations": args.iterations,
        "device": str(device),
        "ratio": round(statistics.median(theirs / ours for theirs, ours, _ in rows), 3),
        "objective": round(rows[-1][2], 4),
        "seconds_an_image": round(min(ours for _, ours, _ in rows) / len(labels), 4),
        "peak_bytes": peak_bytes(device),
    }
    print(json.dumps(result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ipc", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def teacher(model: object, seed: int) -> Network:
    """A network whose running statistics are those of random images."""
    config = model_config(model)  # type: ignore[arg-type]
    module = build(config, image_shape=SHAPE, classes=CLASSES, seed=seed).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(20):
            module(torch.randn(64, *SHAPE, generator=generator) * 0.8 + 0.1)
    return Network(config, SHAPE, CLASSES, PLAIN, module.state_dict(), facts={})


class Hook:
    """What the released loop keeps of a batch norm's input."""

    def __init__(self, part: nn.BatchNorm2d) -> None:
        self.part, self.term = part, torch.zeros(())
        part.register_forward_hook(self)

    def __call__(self, part: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0]
        mean = x.mean([0, 2, 3])
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(1, unbiased=False)
        assert self.part.running_mean is not None and self.part.running_var is not None
        self.term = (self.part.running_mean - mean).norm() + (self.part.running_var - var).norm()


def plain_module(network: Network, device: torch.device) -> tuple[nn.Module, list[Hook]]:
    module = network.module(device).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return module, [Hook(part) for part in module.modules() if isinstance(part, nn.BatchNorm2d)]


def plain_loss(module: nn.Module, hooks: list[Hook], x: Tensor, y: Tensor) -> Tensor:
    entropy = F.cross_entropy(module(x), y)
    terms = [hook.term * (FIRST_LAYER if place == 0 else 1.0) for place, hook in enumerate(hooks)]
    return entropy + STATISTICS * torch.stack(terms).sum()


def plain_seconds(
    networks: list[Network], initial: Tensor, labels: Tensor, iterations: int, device: torch.device
) -> tuple[float, Tensor]:
    """One image of each class at a time; and what came of it."""
    ipc = len(labels) // CLASSES
    learned = torch.empty_like(initial)
    start = time.perf_counter()
    for number in range(ipc):
        modules = [plain_module(network, device) for network in networks]
        rows = torch.arange(CLASSES) * ipc + number
        x = initial[rows].contiguous().requires_grad_()
        y = labels[rows].to(device)
        adam = torch.optim.Adam([x], lr=LR, betas=(0.5, 0.9), eps=1e-8)
        for step in range(iterations):
            adam.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / iterations))
            adam.zero_grad()
            loss = sum(w * plain_loss(*each, x, y) for w, each in zip(WEIGHTS, modules, strict=True))
            assert isinstance(loss, Tensor)
            loss.backward()
            adam.step()
            x.data.clamp_(-2, 2)
        learned[rows] = x.detach()
    finish(device)
    return time.perf_counter() - start, learned


def our_seconds(
    networks: list[Network], initial: Tensor, labels: Tensor, iterations: int, device: torch.device
) -> tuple[float, Tensor]:
    config = Recovery(iterations=iterations, lr=LR, statistics=STATISTICS, augment="none", batch=len(labels))
    progress = NullProgress()
    with (
        tempfile.TemporaryDirectory() as folder,
        Engine(device, precision="float32", progress=progress) as engine,
    ):
        ctx = Context(
            seed=0,
            device=device,
            cache=Cache(Path(folder) / "cache", device=device, progress=progress),
            engine=engine,
            costs=Costs(engine),
            progress=progress,
            train=TrainConfig(),
            scratch=Path(folder),
        )
        start = time.perf_counter()
        judges = [
            Judge(network, "teacher", preprocessing=PLAIN, device=device, statistics=STATISTICS)
            for network in networks
        ]
        groups = groups_of(labels.tolist(), lambda _: tuple(enumerate(WEIGHTS)), classwise=False)
        beginning = Initial((3, 32, 32), lambda rows: initial[rows.to(device)])
        images = recover(ctx, beginning, labels, groups, judges, config, preprocessing=PLAIN)
        finish(device)
        seconds = time.perf_counter() - start
    return seconds, ((images.float() / 255 - 0.5) / 0.25).to(device)


@torch.no_grad()
def objective(networks: list[Network], images: Tensor, labels: Tensor, device: torch.device) -> float:
    """The mean over groups of what both minimise, by the plain form."""
    modules = [plain_module(network, device) for network in networks]
    ipc, total = len(labels) // CLASSES, 0.0
    for number in range(ipc):
        rows = torch.arange(CLASSES) * ipc + number
        x, y = images[rows], labels[rows].to(device)
        total += sum(float(w * plain_loss(*each, x, y)) for w, each in zip(WEIGHTS, modules, strict=True))
    return total / ipc


def finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
