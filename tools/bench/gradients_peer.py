"""The peer's half of gradients.py: runs in an environment that has traker and torch, and not distill.

    python gradients_peer.py FOLDER DIM THREADS

Reads FOLDER/problem.npz and network.json, then one request a line from stdin, and answers each with the seconds it
took: `whole` (gradients and projection), `projection` (of gradients computed before), `gradients` and `projected SEED`
(which write gradients.npy and projected.npy to FOLDER).
"""

import ctypes
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector, ProjectionType
from trak.utils import vectorize


def network(spec: dict) -> nn.Module:
    """The same network as distill's, of torch's own layers."""
    width, depth, classes = spec["width"], spec["depth"], spec["classes"]
    layers: list[nn.Module] = []
    if spec["network"] == "mlp":
        layers.append(nn.Flatten())
        for number in range(depth):
            layers += [nn.Linear(3072 if number == 0 else width, width), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(width, classes))
    for number in range(depth):
        inputs = 3 if number == 0 else width
        layers += [
            nn.Conv2d(inputs, width, 3, padding=1),
            nn.GroupNorm(width, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    side = 32 >> depth
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * side * side, classes))


class Work:
    """Gradients and projections as traker does them on a CPU: vmap of grad, then BasicProjector with its defaults."""

    def __init__(self, folder: Path, dim: int) -> None:
        self.folder, self.dim = folder, dim
        problem = np.load(folder / "problem.npz")
        module = network(json.loads((folder / "network.json").read_text())).eval()
        names = sorted(name for name in problem.files if name.startswith("w"))
        with torch.no_grad():
            for name, value in zip(names, module.parameters(), strict=True):
                value.copy_(torch.from_numpy(problem[name]))
        self.count = sum(value.numel() for value in module.parameters())
        self.batch = (torch.from_numpy(problem["images"]), torch.from_numpy(problem["labels"]))
        self.computer = FunctionalGradientComputer(
            module, ImageClassificationModelOutput(), self.count, torch.float32, torch.device("cpu")
        )
        self.projector = self.make_projector(0)
        self.flat = vectorize(self.gradients(), device="cpu")
        self.whole()

    def make_projector(self, seed: int) -> BasicProjector:
        return BasicProjector(
            grad_dim=self.count,
            proj_dim=self.dim,
            seed=seed * 1000_003,
            proj_type=ProjectionType.normal,
            device=torch.device("cpu"),
        )

    def gradients(self) -> dict:
        return self.computer.compute_per_sample_grad(self.batch)

    def whole(self) -> None:
        self.projector.project(self.gradients(), model_id=0)

    def projection(self) -> None:
        self.projector.project(self.flat, model_id=0)

    def save_gradients(self) -> None:
        np.save(self.folder / "gradients.npy", self.flat.numpy())

    def save_projected(self, seed: int) -> None:
        projected = self.make_projector(seed).project(self.flat, model_id=0) / math.sqrt(self.dim)
        np.save(self.folder / "projected.npy", projected.numpy())

    def do(self, what: str) -> None:
        if what == "whole":
            self.whole()
        elif what == "projection":
            self.projection()
        elif what == "gradients":
            self.save_gradients()
        else:
            self.save_projected(int(what.removeprefix("projected ")))


def main() -> None:
    folder, dim, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    if sys.platform.startswith("linux"):  # as distill.training.memory.keep_freed_memory
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)
        libc.mallopt(-1, (1 << 31) - 1)
    torch.set_num_threads(threads)
    work = Work(folder, dim)
    for line in sys.stdin:
        start = time.perf_counter()
        work.do(line.strip())
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
