"""Per-sample gradients projected to k dimensions: ours against the CPU projector of the PyPI package traker.

    python -m venv trak && trak/bin/pip install traker        # an environment of its own, with its own torch
    python tools/bench/gradients.py --peer-python trak/bin/python [--repeats 5] [--threads 2] [--batch 32] [--dim 512]

Both get one network (P about 200,000), its weights, and the same random 3 x 32 x 32 images and labels; the gradient is
that of TRAK's margin. The whole path of the peer is its FunctionalGradientComputer (vmap of grad) and BasicProjector,
in its own interpreter (gradients_peer.py); ours is GradientPass. `projection` is the projection alone, of flat
gradients (B, P). Times alternate within each repeat, so that a slow spell of the machine hits both, and only one works
at a time; ratios are medians over repeats. Both ask glibc to keep freed memory, as a run of distill does.

The error of an estimate is |<P x, P y> - <x, y>| / (|x| |y|), its mean over all pairs of the batch (a sample with
itself too) and over seeds; exact inner products come from gradients in float64. The peer divides by nothing; it is
scaled by 1 / sqrt(k) here, as its matrix needs.

For every network and kind the table tells how many coordinates of the gradient went through factors, hence were never
formed. Networks of millions of parameters (a ResNet-18, a wide MLP) are timed without the peer, which would draw a
matrix of P x 512 random numbers for each batch; there `ratio` is the time of the sparse kind over that of the kind.

The last line is JSON. `ratio` and `projection_ratio` are those of the convolutional network and the default kind;
`ratio_to_sparse` and `through_factors` (shares of P) are those of the default kind, by network.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import numpy as np
import torch
from peer import Peer
from torch import Tensor, nn

from distill.cache.count_sketch import CountSketch, random_signs
from distill.cache.functional_pass import FunctionalPass
from distill.cache.gradient_request import output_of
from distill.cache.per_sample import GradientPass, GradientRequest
from distill.cache.projections import Projection, Projector
from distill.models import build, model_config
from distill.training.memory import keep_freed_memory

IMAGE_SHAPE = (3, 32, 32)
CLASSES = 10
WORK_BYTES = 1 << 30
SEEDS_MORE = 4  # our errors are averaged over so many times the peer's seeds, which take a second each
Kind = Literal["sparse", "fft", "kronecker"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MODELS: dict[str, dict[str, Any]] = {
    "convnet": {"name": "convnet", "width": 100, "depth": 3},
    "mlp": {"name": "mlp", "width": 64, "depth": 2},
}
LARGE: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18"},
    "wide_mlp": {"name": "mlp", "width": 2048, "depth": 3},
}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(
        f"batch {args.batch}, k = {args.dim}, {torch.get_num_threads()} threads each, medians of {args.repeats}"
    )
    results = {name: measure(name, args) for name in MODELS}
    print_ways(results["convnet"].parameters, args)
    print_floors(results["convnet"], args)
    large = {name: measure_large(name, args) for name in LARGE}
    kind = Projection().kind
    shares = {name: round(each.kinds[kind].factored / each.parameters, 3) for name, each in results.items()}
    shares |= {name: each.share for name, each in large.items()}
    default = results["convnet"].kinds[Projection().kind]
    print(
        json.dumps(
            {
                "bench": "gradients",
                "ratio": default.ratio,
                "projection_ratio": default.projection_ratio,
                "samples_per_second": round(args.batch / default.whole),
                "error": default.error,
                "error_peer": results["convnet"].peer_error,
                "kind": Projection().kind,
                "ratio_mlp": results["mlp"].kinds[Projection().kind].ratio,
                "ratio_to_sparse": {name: each.ratio for name, each in large.items()},
                "through_factors": shares,
                "parameters": results["convnet"].parameters,
                "threads": args.threads,
            }
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="interpreter of an environment with traker")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--repeats-large", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--error-seeds", type=int, default=16)
    return parser.parse_args()


@dataclass(frozen=True)
class KindResult:
    """One kind of projection on one network.

    Args:
        whole, projection: median seconds of a batch.
        ratio, projection_ratio: the peer's seconds over ours, medians over repeats.
        error: mean relative error of inner products.
        factored: coordinates that went through factors in the whole path.
    """

    whole: float
    projection: float
    ratio: float
    projection_ratio: float
    error: float
    factored: int


@dataclass(frozen=True)
class Result:
    """One network."""

    parameters: int
    kinds: dict[Kind, KindResult]
    peer_error: float


def measure(name: str, args: argparse.Namespace) -> Result:
    """Times and errors of all kinds and of the peer on one network."""
    module = build(model_config(MODELS[name]), image_shape=IMAGE_SHAPE, classes=CLASSES, seed=0).eval()
    images, labels = batch_of(args.batch)
    parts = exact_gradients(module, images, labels)
    exact = flattened(parts)
    ours = {kind: Ours(module, images, labels, parts, kind, args.dim) for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        write_problem(Path(folder), name, module, images, labels)
        with GradientPeer(args.peer_python, Path(folder), args) as peer:
            check_same_gradients(peer.gradients(), exact)
            times = [alternate(ours, peer) for _ in range(args.repeats)]
            peer_error = mean_error(peer.projected, exact, seeds=args.error_seeds)
    kinds = {kind: kind_result(kind, ours[kind], times, exact, args) for kind in KINDS}
    print_table(name, exact.shape[1], kinds, times, peer_error, args.batch)
    print(f"error expected of a dense Gaussian matrix: {expected_error(exact, args.dim):.4f}")
    return Result(exact.shape[1], kinds, round(peer_error, 5))


def kind_result(
    kind: Kind, ours: Ours, times: list[dict[str, float]], exact: Tensor, args: argparse.Namespace
) -> KindResult:
    whole, projection = ([each[f"{kind} {part}"] for each in times] for part in ("whole", "projection"))
    peer_whole, peer_projection = (
        [each[f"peer {part}"] for each in times] for part in ("whole", "projection")
    )
    return KindResult(
        whole=statistics.median(whole),
        projection=statistics.median(projection),
        ratio=median_ratio(peer_whole, whole),
        projection_ratio=median_ratio(peer_projection, projection),
        error=round(mean_error(ours.projected, exact, seeds=SEEDS_MORE * args.error_seeds), 5),
        factored=through_factors(ours.whole),
    )


def through_factors(run: Callable[[], object]) -> int:
    """Coordinates of a gradient that went through factors while `run` ran."""
    sizes: dict[str, int] = {}
    add_outer = Projector.add_outer

    def counted(self: Projector, out: Tensor, name: str, left: Tensor, right: Tensor) -> None:
        sizes[name] = left.shape[2] * right.shape[2]
        add_outer(self, out, name, left, right)

    with patch.object(Projector, "add_outer", counted):
        run()
    return sum(sizes.values())


@dataclass(frozen=True)
class LargeResult:
    """The default kind on a network that is timed without the peer.

    Args:
        ratio: seconds of the sparse kind over its seconds, median over repeats.
        share: of the coordinates, through factors.
    """

    ratio: float
    share: float


def measure_large(name: str, args: argparse.Namespace) -> LargeResult:
    """Times of the whole path of all kinds, which alternate within each repeat."""
    module = build(model_config(LARGE[name]), image_shape=IMAGE_SHAPE, classes=CLASSES, seed=0).eval()
    module = module.to(memory_format=torch.channels_last)
    images, labels = batch_of(args.batch)
    images = images.contiguous(memory_format=torch.channels_last)
    runs = {kind: whole_path(module, images, labels, kind, args.dim) for kind in KINDS}
    factored = {kind: through_factors(run) for kind, run in runs.items()}  # warms up too
    times = [{kind: once(run) for kind, run in runs.items()} for _ in range(args.repeats_large)]
    parameters = sum(value.numel() for value in module.parameters())
    print(f"\n{name}, P = {parameters:,}, medians of {args.repeats_large}, without the peer")
    print("              whole ms  samples/s  sparse's time / its   through factors")
    ratios: dict[Kind, float] = {}
    for kind in KINDS:
        whole = statistics.median(each[kind] for each in times)
        ratios[kind] = median_ratio([each["sparse"] for each in times], [each[kind] for each in times])
        print(
            f"{kind:12s} {whole * 1e3:9.1f} {args.batch / whole:10.1f} {ratios[kind]:20.2f}"
            f" {factored[kind]:17,d}"
        )
    default = Projection().kind
    return LargeResult(ratios[default], round(factored[default] / parameters, 3))


def whole_path(
    module: nn.Module, images: Tensor, labels: Tensor, kind: Kind, dim: int
) -> Callable[[], object]:
    request = GradientRequest(of="margin", projection=Projection(kind=kind, dim=dim))
    own = GradientPass(module, [request], image_shape=IMAGE_SHAPE, work_bytes=WORK_BYTES)
    return lambda: own.run(images, labels)


def batch_of(rows: int) -> tuple[Tensor, Tensor]:
    """Random images and labels, always the same."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, *IMAGE_SHAPE, generator=generator)
    return images, torch.randint(0, CLASSES, (rows,), generator=generator)


def once(run: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def median_ratio(peer: list[float], ours: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(peer, ours, strict=True)), 2)


class Ours:
    """Our whole path, and our projection of flat gradients.

    Args:
        module: the network.
        images, labels: the batch.
        parts: exact gradients (B, *shape) by parameter.
        kind, dim: of the projection.
    """

    def __init__(
        self,
        module: nn.Module,
        images: Tensor,
        labels: Tensor,
        parts: dict[str, Tensor],
        kind: Kind,
        dim: int,
    ) -> None:
        self.kind, self.dim, self.labels = kind, dim, labels
        # Images and network as the cache holds them.
        self.images = images.contiguous(memory_format=torch.channels_last)
        module = module.to(memory_format=torch.channels_last)
        self.request = GradientRequest(of="margin", projection=self.projection(0))
        self.own = GradientPass(module, [self.request], image_shape=IMAGE_SHAPE, work_bytes=WORK_BYTES)
        self.parts = {name: values.float() for name, values in parts.items()}
        self.flat = flattened(self.parts)
        self.projector = Projector(self.projection(0))
        self.check()

    def projection(self, seed: int) -> Projection:
        return Projection(kind=self.kind, dim=self.dim, seed=seed)

    def whole(self) -> Tensor:
        """(B, k)."""
        return self.own.run(self.images, self.labels)[1][self.request]

    def project(self) -> None:
        self.projector.add(torch.zeros(len(self.flat), self.dim), "flat", self.flat)

    def projected(self, seed: int) -> Tensor:
        """(B, k): what the whole path gives with another seed, from gradients known before."""
        projector = Projector(self.projection(seed))
        out = torch.zeros(len(self.flat), self.dim)
        for name, values in self.parts.items():
            projector.add(out, name, values)
        return out

    def check(self) -> None:
        """The whole path gives the projection of the exact gradients."""
        exact = self.projected(0)
        if not float((self.whole() - exact).norm() / exact.norm()) < 1e-4:
            raise SystemExit(f"{self.kind}: the whole path does not give the projected gradients")


class GradientPeer(Peer):
    """traker's half of this benchmark."""

    def __init__(self, python: str, folder: Path, args: argparse.Namespace) -> None:
        arguments = [folder, args.dim, args.threads]
        super().__init__(python, "gradients_peer.py", arguments, package="traker and torch")
        self.folder = folder

    def gradients(self) -> Tensor:
        """Flat gradients (B, P) as the peer computes them."""
        self.ask("gradients")
        return torch.from_numpy(np.load(self.folder / "gradients.npy"))

    def projected(self, seed: int) -> Tensor:
        """(B, k)."""
        self.ask(f"projected {seed}")
        return torch.from_numpy(np.load(self.folder / "projected.npy"))


def alternate(ours: dict[Kind, Ours], peer: GradientPeer) -> dict[str, float]:
    """Seconds of everything: the peer's of one run, ours the median of three."""
    times: dict[str, float] = {}
    for part in ("whole", "projection"):
        times[f"peer {part}"] = peer.ask(part)
        for kind, each in ours.items():
            times[f"{kind} {part}"] = seconds(each.whole if part == "whole" else each.project)
    return times


def seconds(run: Callable[[], object]) -> float:
    """Median of three, after one that is not counted."""
    run()
    found = []
    for _ in range(3):
        found.append(once(run))
    return statistics.median(found)


def exact_gradients(module: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the margin by parameter, float64 (B, *shape)."""
    names = [name for name, _ in module.named_parameters()]
    double = FunctionalPass(module.double(), names).run(
        images.double(), labels, lambda logits, label: output_of(logits, label, "margin")
    )
    module.float()
    return {name: double[name] for name in names}


def flattened(parts: dict[str, Tensor]) -> Tensor:
    """(B, P)."""
    return torch.cat([values.flatten(1) for values in parts.values()], dim=1)


def mean_error(projected: Callable[[int], Tensor], exact: Tensor, *, seeds: int) -> float:
    """Mean of |<P x, P y> - <x, y>| / (|x| |y|) over pairs and seeds."""
    gram, lengths = exact @ exact.T, exact.norm(dim=1)
    pairs = torch.triu_indices(len(exact), len(exact))
    errors = []
    for seed in range(seeds):
        found = projected(seed).double()
        relative = (found @ found.T - gram).abs() / (lengths[:, None] * lengths)
        errors.append(float(relative[pairs[0], pairs[1]].mean()))
    return statistics.mean(errors)


def expected_error(exact: Tensor, dim: int) -> float:
    """Mean over pairs of sqrt(2 / pi) sqrt((1 + cos^2) / k): the estimate is about normal, with that variance."""
    unit = exact / exact.norm(dim=1, keepdim=True)
    cosines = unit @ unit.T
    pairs = torch.triu_indices(len(exact), len(exact))
    return float(((1 + cosines[pairs[0], pairs[1]].square()) * 2 / (math.pi * dim)).sqrt().mean())


def check_same_gradients(peer: Tensor, exact: Tensor) -> None:
    difference = float((peer.double() - exact).norm() / exact.norm())
    if difference > 1e-4:
        raise SystemExit(f"the peer differentiates something else: its gradients are {difference:.1e} off")


def write_problem(folder: Path, name: str, module: nn.Module, images: Tensor, labels: Tensor) -> None:
    """The network and data, for the peer: weights in the order of the parameters."""
    arrays = {f"w{n:03d}": value.detach().numpy() for n, value in enumerate(module.parameters())}
    np.savez(folder / "problem.npz", images=images.numpy(), labels=labels.numpy(), **arrays)  # type: ignore[arg-type]
    (folder / "network.json").write_text(json.dumps({"network": name, **MODELS[name], "classes": CLASSES}))


def print_table(
    name: str,
    parameters: int,
    kinds: dict[Kind, KindResult],
    times: list[dict[str, float]],
    peer_error: float,
    batch: int,
) -> None:
    whole, projection = (
        statistics.median(each[f"peer {part}"] for each in times) for part in ("whole", "projection")
    )
    print(f"\n{name}, P = {parameters:,}")
    print("              whole ms  samples/s   ratio   projection ms   ratio   error  through factors")
    print(
        f"{'traker':12s} {whole * 1e3:9.1f} {batch / whole:10.0f} {1:7.1f} {projection * 1e3:15.1f} {1:7.1f}"
        f" {peer_error:7.4f}"
    )
    for kind, found in kinds.items():
        print(
            f"{kind:12s} {found.whole * 1e3:9.1f} {batch / found.whole:10.0f} {found.ratio:7.1f}"
            f" {found.projection * 1e3:15.1f} {found.projection_ratio:7.1f} {found.error:7.4f}"
            f" {found.factored:16,d}"
        )


def print_ways(parameters: int, args: argparse.Namespace) -> None:
    """Milliseconds of the ways to add up one CountSketch of flat gradients, with random tables or without."""
    options: dict[str, Any] = {"seed": 0, "device": torch.device("cpu"), "dtype": torch.float32}
    sketch = CountSketch(parameters, args.dim, **options)
    signs = random_signs(parameters, **options)
    buckets = torch.randint(0, args.dim, (parameters,))
    whole = parameters // args.dim * args.dim
    order = torch.randperm(whole)
    places = torch.stack([buckets, torch.arange(parameters)])
    warnings.filterwarnings("ignore", "Sparse", UserWarning)  # torch calls its CSR support a beta
    table = torch.sparse_coo_tensor(
        places, signs, (args.dim, parameters), check_invariants=False
    ).to_sparse_csr()
    values = torch.randn(args.batch, parameters)
    empty = torch.zeros(args.batch, args.dim)
    ways: dict[str, Callable[[], object]] = {
        "rotated runs, by slices (ours)": lambda: sketch.by_slices(values),
        "rotated runs, by gathering": lambda: sketch.by_gathering(values),
        "index_select and a sum": lambda: (
            (values * signs).index_select(1, order).view(len(values), -1, args.dim).sum(1)
        ),
        "index_add_": lambda: empty.clone().index_add_(1, buckets, values * signs),
        "sparse CSR product": lambda: table @ values.T,
        "reading the values": lambda: values.sum(),
    }
    print(f"\none CountSketch of ({args.batch}, {parameters:,}), ms")
    for label, run in ways.items():
        print(f"{label:32s} {seconds(run) * 1e3:8.1f}")


def print_floors(result: Result, args: argparse.Namespace) -> None:
    """Operations and bytes that cannot be avoided, and how long this machine takes for them."""
    batch, parameters, dim = args.batch, result.parameters, args.dim
    # Multiply-adds of a forward pass of the network above; its backward by inputs (but the first layer's) and each
    # sample's gradient by weights are as many again.
    first, second, third = (width * 9 * 100 * side * side for width, side in ((3, 32), (100, 16), (100, 8)))
    passes = batch * (3 * (first + second + third + 16_000) - first)
    rows = [
        ("forward, backward, gradients", 2 * passes, 4 * batch * parameters),
        ("our projection", 2 * batch * parameters, 4 * parameters * (batch + 1)),
        ("traker's projection", 2 * batch * parameters * dim, 4 * parameters * (batch + 2 * dim)),
    ]
    per_second, bytes_per_second = machine()
    print(
        f"\nfloors of a convnet batch ({per_second / 1e9:.0f} GFLOP/s, {bytes_per_second / 1e9:.0f} GB/s here)"
    )
    for label, operations, moved in rows:
        least = max(operations / per_second, moved / bytes_per_second) * 1e3
        print(f"{label:30s} {operations / 1e9:7.2f} GFLOP {moved / 1e6:8.0f} MB {least:8.1f} ms")


def machine() -> tuple[float, float]:
    """Operations a second of a matrix product, and bytes a second of reading memory."""
    square, long = torch.randn(1024, 1024), torch.randn(50_000_000)
    return 2 * 1024**3 / seconds(lambda: square @ square), long.nbytes / seconds(lambda: long.sum())


if __name__ == "__main__":
    main()
