"""Names of methods, data and models, and where each lives; nothing is imported before it is asked for.

Other packages add methods through the entry point group `distill.methods` (`name = "package.module:Class"`); the
class's docstring begins with the one-line summary that `distill methods` prints.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from distill.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Args:
        target: `module:attribute`.
        kind: `selector`, `distiller`, `data` or `model`.
        summary: one line for listings.
    """

    name: str
    target: str
    kind: str
    summary: str

    def load(self) -> Any:
        module, attribute = self.target.split(":")
        return getattr(import_module(module), attribute)


def _table(kind: str, rows: Iterable[tuple[str, str, str]]) -> dict[str, Entry]:
    return {name: Entry(name, target, kind, summary) for name, target, summary in rows}


METHODS: dict[str, Entry] = {
    **_table(
        "selector",
        [
            ("random", "dataselect.random_choice:RandomChoice", "uniform random subset, balanced by class"),
            ("kcenter", "dataselect.kcenter:KCenter", "greedy k-center: covers the features"),
            ("herding", "dataselect.herding:Herding", "herding: keeps the mean of the features"),
        ],
    ),
    **_table(
        "distiller",
        [
            (
                "soft_label",
                "distill.distillers.soft_label:SoftLabel",
                "real images, soft labels from a teacher",
            )
        ],
    ),
}

DATA: dict[str, Entry] = _table(
    "data",
    [
        ("digits", "distill.data.digits:Digits", "scikit-learn's 1,797 real 8x8 digits; needs no download"),
        ("cifar10", "distill.data.torchvision_sets:CIFAR10", "CIFAR-10 through torchvision"),
        ("cifar100", "distill.data.torchvision_sets:CIFAR100", "CIFAR-100 through torchvision"),
        ("mnist", "distill.data.torchvision_sets:MNIST", "MNIST through torchvision"),
        ("fashion_mnist", "distill.data.torchvision_sets:FashionMNIST", "Fashion-MNIST through torchvision"),
        ("svhn", "distill.data.torchvision_sets:SVHN", "Street View House Numbers through torchvision"),
        ("folder", "distill.data.folder:Folder", "your images, one folder a class"),
        ("webdataset", "distill.data.webdataset:WebDataset", "tar shards of jpg/png + cls, streamed"),
        ("idx", "distill.data.idx:Idx", "MNIST's file format, gzipped or not"),
        ("arrays", "distill.data.arrays:Arrays", "npz, npy pairs or HDF5 arrays"),
    ],
)

MODELS: dict[str, Entry] = _table(
    "model",
    [
        ("convnet", "distill.models.convnet:ConvNetConfig", "the field's ConvNet: width, depth, norm"),
        ("mlp", "distill.models.mlp:MLPConfig", "multi-layer perceptron"),
        ("resnet18", "distill.models.resnet:ResNet18Config", "ResNet-18 with the small-image stem"),
        ("alexnet", "distill.models.alexnet:AlexNetConfig", "AlexNet for small images"),
        ("vgg11", "distill.models.vgg:VGG11Config", "VGG-11 for small images"),
        (
            "torchvision",
            "distill.models.torchvision_models:TorchvisionConfig",
            "any classifier: torchvision/NAME",
        ),
    ],
)


def methods() -> dict[str, Entry]:
    """Built-in methods and those of installed packages, by name."""
    found = dict(METHODS)
    for point in entry_points(group="distill.methods"):
        if point.name in METHODS and METHODS[point.name].target != point.value:
            raise InputError(
                f"the installed package {point.dist.name if point.dist else '?'} registers a method "
                f"under the built-in name {point.name!r}",
                fix="uninstall it, or ask its authors for another name",
            )
        if point.name not in found:
            cls = point.load()
            summary = (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else ""
            found[point.name] = Entry(point.name, point.value, cls.kind, summary)
    return found


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, None where nothing resembles it."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def lookup(name: str, table: dict[str, Entry], *, what: str) -> Entry:
    """The entry of `name`, or an InputError with what is known and the nearest name."""
    if name in table:
        return table[name]
    close = nearest(name, table)
    raise InputError(
        f"unknown {what} {name!r}",
        found=name,
        allowed=", ".join(sorted(table)),
        fix=f"did you mean {close!r}?" if close else None,
    )
