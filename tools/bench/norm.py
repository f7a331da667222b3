"""Instance norm in channels_last on one CPU thread: torch's GroupNorm against distill.models.norm.

    python tools/bench/norm.py [--batch 100] [--width 32] [--side 32] [--dtype float32] [--repeats 20]

Prints milliseconds, the least of the repeats, of forward and backward of the norm alone, of the ConvNet's block (norm,
ReLU, 2x2 average pooling), and of a whole step of a three-block ConvNet. Variants alternate within each repeat, so
that a slow spell of the machine hits all. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.models import build, model_config
from distill.models.norm import InstanceNorm, NormReluPool
from distill.training.memory import keep_freed_memory


class PlainBlock(nn.GroupNorm):
    """torch's own operations: (B, D, H, W) -> (B, D, H / 2, W / 2)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.relu(super().forward(x)), 2)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    keep_freed_memory()
    dtype = getattr(torch, args.dtype)
    shape = (args.batch, args.width, args.side, args.side)
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    images = torch.randn(args.batch, 3, args.side, args.side)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "norm, torch": (nn.GroupNorm(args.width, args.width), x),
        "norm, ours": (InstanceNorm(args.width), x),
        "block, torch": (PlainBlock(args.width, args.width), x),
        "block, ours": (NormReluPool(args.width), x),
        "step, torch": (with_torch_norm(convnet(args)), images),
        "step, ours": (convnet(args), images),
    }
    best = {name: [float("inf"), float("inf")] for name in cases}
    for _ in range(args.repeats):
        for name, (module, inputs) in cases.items():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                times = once(module, inputs)
            best[name] = [min(pair) for pair in zip(best[name], times, strict=True)]
    print(f"{'ms':14}{'forward':>10}{'backward':>10}")
    for name, (forward, backward) in best.items():
        print(f"{name:14}{forward:10.1f}{backward:10.1f}")
    print(json.dumps({"shape": shape, "dtype": args.dtype, "milliseconds": best}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, value in (("batch", 100), ("width", 32), ("side", 32), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args()


def convnet(args: argparse.Namespace) -> nn.Module:
    config = model_config({"name": "convnet", "width": args.width, "depth": 3})
    module = build(config, image_shape=(3, args.side, args.side), classes=10, seed=0)
    return module.to(memory_format=torch.channels_last)


def with_torch_norm(module: nn.Module) -> nn.Module:
    """The network with torch's block in place of ours."""
    for name, part in list(module.named_modules()):
        if isinstance(part, NormReluPool):
            module.set_submodule(name, PlainBlock(part.num_channels, part.num_channels))
    return module


def once(module: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[float, float]:
    """Milliseconds of one forward and one backward pass."""
    inputs.grad = None  # or adding to it would be timed too
    start = time.perf_counter()
    y = module(inputs)
    between = time.perf_counter()
    grad = torch.ones_like(y)
    middle = time.perf_counter()
    y.backward(grad)
    return (between - start) * 1e3, (time.perf_counter() - middle) * 1e3


if __name__ == "__main__":
    main()
