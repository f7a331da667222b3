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
        own_kind, own_summary: kind and summary, None where the class must be asked for them.
        package: the installed package that registers it, None for our own.
    """

    name: str
    target: str
    own_kind: str | None = None
    own_summary: str | None = None
    package: str | None = None

    @property
    def kind(self) -> str:
        """`selector`, `distiller`, `data` or `model`."""
        return self.load().kind if self.own_kind is None else self.own_kind

    @property
    def summary(self) -> str:
        """One line for listings."""
        if self.own_summary is not None:
            return self.own_summary
        return next(iter((self.load().__doc__ or "").strip().splitlines()), "")

    def load(self) -> Any:
        """Import what is registered; InputError where another package's cannot be imported."""
        module, _, attribute = self.target.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except Exception as error:
            if self.package is None:
                raise
            raise InputError(
                f"{self.name!r} of the installed package {self.package} cannot be imported",
                where=self.target,
                found=f"{type(error).__name__}: {error}",
                fix=f"update {self.package}, or uninstall it",
            ) from error


def _table(kind: str, rows: Iterable[tuple[str, str, str]]) -> dict[str, Entry]:
    return {name: Entry(name, target, kind, summary) for name, target, summary in rows}


METHODS: dict[str, Entry] = {
    **_table(
        "selector",
        [
            ("random", "dataselect.random_choice:RandomChoice", "uniform random subset, balanced by class"),
            ("kcenter", "dataselect.kcenter:KCenter", "greedy k-center: covers the features"),
            ("herding", "dataselect.herding:Herding", "herding: keeps the mean of the features"),
            (
                "facility_location",
                "dataselect.submodular:FacilityLocationSelector",
                "facility location: a similar pick for every sample",
            ),
            (
                "graph_cut",
                "dataselect.submodular:GraphCutSelector",
                "graph cut: like all samples, unlike each other",
            ),
            ("craig", "dataselect.craig:Craig", "CRAIG: covers the gradients, weighted by cluster sizes"),
            ("gradmatch", "dataselect.gradmatch:GradMatch", "GradMatch: weighted, adds up to all gradients"),
            ("glister", "dataselect.glister:Glister", "GLISTER: lowers the validation loss in one step"),
            ("kmeans", "dataselect.kmeans:KMeans", "k-means: one sample of each cluster of features"),
            ("semdedup", "dataselect.semdedup:SemDeDup", "semantic de-duplication: drops near twins"),
            ("simcore", "dataselect.simcore:SimCore", "SimCore: what is most like the target's centroids"),
            ("tarot", "dataselect.tarot:Tarot", "TAROT: short optimal transport to the target, whitened"),
            (
                "importance",
                "dataselect.importance_choice:Importance",
                "importance resampling: drawn as the target is distributed",
            ),
            ("trak", "dataselect.influence:Trak", "TRAK: what raises the margins of the target most"),
            ("less", "dataselect.influence:Less", "LESS: gradients most like a class of the target"),
            ("score", "dataselect.scores:ScoreChoice", "the hardest, the easiest or the middle by a score"),
            ("ccs", "dataselect.ccs:CoverageCentric", "strata of hardness, without the very hardest"),
            ("d2", "dataselect.d2:MessagePassing", "hard and unlike each other, by messages on a graph"),
            ("dsir", "dataselect.dsir:DSIR", "DSIR: documents whose n-grams are those of the target"),
        ],
    ),
    **_table(
        "distiller",
        [
            (
                "soft_label",
                "distill.distillers.soft_label:SoftLabel",
                "real images, soft labels from a teacher",
            ),
            (
                "trajectory",
                "distill.distillers.trajectory:TrajectoryMatching",
                "images learned by matching the trajectories of experts",
            ),
            (
                "committee",
                "distill.distillers.committee:Committee",
                "images recovered from, and labelled by, several teachers that vote",
            ),
            (
                "nrr",
                "distill.distillers.nrr:NonCriticalRefinement",
                "images whose critical pixels stay and whose others are recovered",
            ),
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
        (
            "text",
            "distill.text.data:Text",
            "files of text: JSON lines, parquet, plain; for selectors of documents",
        ),
    ],
)

# What a recipe's target may be.
TARGETS: dict[str, Entry] = {
    **DATA,
    **_table(
        "data",
        [
            ("valid", "distill.data.valid:ValidTarget", "the validation split of the data"),
            ("text", "distill.text.data:TextTarget", "files of text that documents are to resemble"),
        ],
    ),
}

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
    """Built-in methods and those of installed packages, by name; none is imported by this.

    Raises:
        InputError: an installed package registers a name that is taken.
    """
    found = dict(METHODS)
    for point in entry_points(group="distill.methods"):
        package = point.dist.name if point.dist else "?"
        taken = found.get(point.name)
        if taken is not None and taken.target != point.value:
            owner = "distill's own" if taken.package is None else f"also that of {taken.package}"
            raise InputError(
                f"the installed package {package} registers a method under the name {point.name!r}, which is {owner}",
                fix=f"uninstall {package}, or ask its authors for another name",
            )
        found.setdefault(point.name, Entry(point.name, point.value, package=package))
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
