"""What crosses the boundaries between rooms: source, context, method, selection, set.

Small frozen dataclasses; nothing here computes. Shape letters: N images, C classes, Ch channels, H height,
W width, P parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.randomness import derive_seed
from distill.training.config import Strict, TrainConfig

if TYPE_CHECKING:
    from distill.cache import Cache
    from distill.cache.text_passes import TextPasses
    from distill.costs import Costs
    from distill.parallel import Pool
    from distill.text import Corpus
    from distill.training.engine import Engine


@dataclass(frozen=True)
class Split:
    """N labelled images in host memory, in a fixed order.

    Args:
        images: uint8 (N, Ch, H, W), pixel values 0..255. May be a view of a memory-mapped file.
        labels: int64 (N,), class numbers.
        fingerprint: sha256 (hex) over shape, images and labels in order.
        rows: int64 (N,), the images' numbers in the data as they were found, before anything was left out; None where
            they have none.
    """

    images: Tensor
    labels: Tensor
    fingerprint: str
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def blocks(self, size: int) -> Iterator[slice]:
        """Consecutive row ranges of at most `size` images that cover the split."""
        for start in range(0, len(self), size):
            yield slice(start, min(start + size, len(self)))


@dataclass(frozen=True)
class Source:
    """The real dataset.

    `valid` is cut from the training data by the recipe's seed, never from `test`. The test split is read by
    evaluation alone: methods are given `source.without_test()`.

    Args:
        name: the data name of the recipe.
        classes: class names, their position is the class number.
        train, valid: what methods may read. `valid` may be empty.
        mean, std: per channel of `train`, in units of pixel value / 255.
        notes: what a reader must know about the data, such as "1000 of 60000 training images used".
        held_out: the test split, None once `without_test` took it away.
        target: the data that a selector wants to resemble, with classes of their own; None where the recipe names none.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    valid: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    notes: tuple[str, ...] = ()
    held_out: Split | None = None
    target: Source | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(Ch, H, W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def test(self) -> Split:
        if self.held_out is None:
            raise AssertionError("the test split is read by evaluation alone")
        return self.held_out

    def without_test(self) -> Source:
        target = None if self.target is None else self.target.without_test()
        return replace(self, held_out=None, target=target)


@dataclass(frozen=True)
class Selection:
    """Which samples of the source's train split to keep.

    Args:
        indices: int64 (n,), distinct, inside the train split, in the order they were picked.
        weights: float32 (n,), mean 1.
        scores: float32 (n,), gain or score of each pick; its meaning is in `meta["score"]`.
        meta: JSON-able facts about how it was made.
        rows: int64 (n,), the same samples' numbers in the data as they were found (`Split.rows`), so that the
            originals can be fetched; a set's selection has them, a method's need not.
    """

    indices: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    meta: Mapping[str, Any] = field(default_factory=dict)
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Preprocessing:
    """What to do to an image of the set, and of the test split, before a network sees it.

    x = (pixel / 255 - mean) / std per channel; then, with ZCA, z = (flatten(x) - zca_mean) @ zca.

    Args:
        mean, std: per channel, in units of pixel value / 255.
        zca, zca_inverse: float32 (Ch*H*W, Ch*H*W) or None; zca_mean: float32 (Ch*H*W,).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    zca: np.ndarray | None = None
    zca_inverse: np.ndarray | None = None
    zca_mean: np.ndarray | None = None


@dataclass(frozen=True)
class SoftLabels:
    """Soft labels as a codec stores them; `distill.labels.codecs` turns them into logits and back.

    Args:
        codec: name in `distill.labels.codecs`.
        arrays: what the codec stores, by name (small letters, digits and _).
        attributes: JSON-able; holds at least `teacher` and `temperature`.
    """

    codec: str
    arrays: Mapping[str, np.ndarray]
    attributes: Mapping[str, Any]


@dataclass(frozen=True)
class DistilledSet:
    """The artefact: everything that a reader needs to train on it.

    Args:
        images: uint8 (N, Ch, H, W) in 0..255, or float16 in units of pixel value / 255.
        labels: int64 (N,).
        classes: class names.
        preprocessing: how images reach a network.
        train: the training that the set is meant for.
        soft: soft labels, or None.
        selection: where the images come from in the source, when they are real.
        provenance: JSON-able: recipe, versions, seed, source fingerprint, code revision; a method leaves its own
            facts here, which the finished set holds under `method`.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: TrainConfig
    soft: SoftLabels | None = None
    selection: Selection | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DocumentSet:
    """The artefact of a selection of documents: where each of them lies. The texts stay in the files of the corpus.

    Args:
        selection: n documents; `indices` are their numbers among all rows of the corpus, counted through its files in
            the order of their names.
        files: names of the files that hold a document of the set, in order.
        file: int32 (n,), numbers in `files`.
        row: int64 (n,), rows in these files, from 0, those without a document counted.
        digest: uint64 (n,), of the texts (distill/text/digests.py), so that who writes them out knows them again.
        provenance: as that of a `DistilledSet`.
    """

    selection: Selection
    files: tuple[str, ...]
    file: np.ndarray
    row: np.ndarray
    digest: np.ndarray
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.row)


class Task(Protocol):
    """One counted piece of work inside a stage."""

    def advance(self, count: int = 1) -> None: ...


class Progress(Protocol):
    """How a run tells what it does: bars on a terminal, lines elsewhere, and always log.jsonl."""

    def task(self, title: str, *, total: int | None = None, unit: str = "") -> AbstractContextManager[Task]:
        """A counted piece of work: `with progress.task("features", total=n, unit="image") as t: t.advance(b)`."""
        ...

    def note(self, text: str, **facts: Any) -> None:
        """A line a user should read, such as "1000 of 60000 images used"; `facts` go to log.jsonl."""
        ...

    def warn(self, text: str, **facts: Any) -> None:
        """Like `note`, marked as a warning."""
        ...

    def record(self, event: str, **facts: Any) -> None:
        """To log.jsonl only."""
        ...


@dataclass(frozen=True)
class Context:
    """What a method may use of the run around it.

    Args:
        seed: the recipe's seed; derive from it by name, never draw from a global generator.
        device: where tensors live.
        cache: features, logits, gradients and trained networks.
        engine: trains K networks at once.
        costs: where the time of earlier runs is charged when their results are read from the cache.
        progress: where to tell what happens.
        train: how students of this set are to be trained (the recipe's `train`).
        scratch: a folder of this step for its own checkpoints; survives an interrupted run.
    """

    seed: int
    device: torch.device
    cache: Cache
    engine: Engine
    costs: Costs
    progress: Progress
    train: TrainConfig
    scratch: Path

    def derive(self, *names: str | int) -> int:
        """The seed that belongs to these names in this run."""
        return derive_seed(self.seed, *names)


StepKind = Literal["selector", "distiller"]


class MethodConfig(Strict):
    """Base of a method's configuration: limits are declared here, messages and tests follow from them."""


@dataclass(frozen=True)
class Training:
    """A network that a step will train, for a dry run.

    Args:
        model: its configuration.
        train: its training.
        samples: images it trains on.
        checkpoints: how often its weights are kept.
    """

    model: Any
    train: TrainConfig
    samples: int
    checkpoints: int = 1


@dataclass(frozen=True)
class Passes:
    """What a step computes with a network besides training it, for a dry run.

    Args:
        model: its configuration.
        batch: images at once.
        count: batches, in forward passes: a backward pass counts as two.
        kept: batches whose activations are in memory at the same time.
        copies: of its parameters that are in memory at the same time.
        stacked: networks that a GPU computes at once; a CPU computes one after another.
    """

    model: Any
    batch: int
    count: int
    kept: int
    copies: int = 3
    stacked: int = 1


@dataclass(frozen=True)
class Labelling:
    """The views that a step will label, for a dry run.

    Args:
        models: the teachers.
        passes: over the images; None is the students' epochs.
        view_bytes: of a view's stored label; 0 where teachers label as students train.
    """

    models: tuple[Any, ...]
    passes: int | None
    view_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a step will do, as far as its configuration tells.

    Args:
        images: size of its result; the most that it may be where `at_most`.
        trainings: networks it trains.
        passes: what else it computes with networks.
        features: rows of features and logits it caches.
        pixel_bytes: of a number of an image of its result.
        whitening: whether its result holds the matrices of ZCA.
        labelling: the views it labels; None where it labels images as they are, or not at all.
    """

    images: int
    trainings: tuple[Training, ...] = ()
    passes: tuple[Passes, ...] = ()
    features: int = 0
    pixel_bytes: int = 1
    whitening: bool = False
    labelling: Labelling | None = None
    at_most: bool = False


class Method(ABC):
    """A selector or distiller. A subclass sets the class attributes, its `Config`, and `run`.

    `check_place`, `check_files` and `check` refuse what cannot be done, the first from the configuration alone. They
    are called for every step before the first one runs.
    """

    name: ClassVar[str]
    kind: ClassVar[StepKind]
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def asks_teachers(self) -> bool:
        """Whether teachers label the result who could label other images alike (the control `random_soft`)."""
        return False

    @property
    def uses_target(self) -> bool:
        """Whether the step reads the recipe's `target`, and so needs one."""
        return False

    def check_place(self, follows: StepKind | None) -> None:  # noqa: B027
        """Raise InputError where the step cannot stand behind one of this kind (None: cannot be the first)."""

    def check_files(self) -> None:  # noqa: B027
        """Raise InputError where a file that the step needs is not there; called before data are read."""

    def check(self, source: Source, follows: StepKind | None) -> None:
        """Raise InputError where this source, or the kind of the step before (None for the first), cannot serve.

        An override begins with the base's check.
        """
        self.check_place(follows)

    def check_training(self, train: TrainConfig, *, classes: int) -> None:  # noqa: B027
        """Raise InputError where students of `train` cannot learn from the result, of C classes."""

    def estimate(self, *, train: int, classes: int, before: int | None) -> Estimate:
        """What the step will do, for a dry run.

        Args:
            train: images of the train split.
            classes: C.
            before: images of the step before, None for the first.
        """
        return Estimate(images=train if before is None else before)

    @abstractmethod
    def run(
        self, ctx: Context, source: Source, previous: DistilledSet | Selection | None
    ) -> DistilledSet | Selection:
        """Do the step. `previous` is the result of the step before, None for the first."""


@dataclass(frozen=True)
class DocumentContext:
    """What a selector of documents may use of the run around it.

    Args:
        seed: the recipe's seed.
        corpus: the documents to choose from.
        targets: what they are to resemble, by name; at least one.
        pool: processes side by side.
        passes: where passes over the corpora leave their results, for this run and for others.
        progress: where to tell what happens.
        scratch: a folder of this step for its own results; survives an interrupted run.
    """

    seed: int
    corpus: Corpus
    targets: Mapping[str, Corpus]
    pool: Pool
    passes: TextPasses
    progress: Progress
    scratch: Path


@dataclass(frozen=True)
class CorpusFacts:
    """What was found in a corpus.

    Args:
        files: how many.
        rows: of them, also those without a document.
        documents: rows with one.
        unreadable: rows that could not be read, and were left out.
        ngrams: of all documents.
        counts_sha256: sha256 (hex) of the counts of the hashed n-grams: what the corpus says, wherever it lies.
    """

    files: int
    rows: int
    documents: int
    unreadable: int
    ngrams: int
    counts_sha256: str


@dataclass(frozen=True)
class TargetFacts:
    """A target, and what was chosen for it. KL is the divergence KL(target || ...) of n-grams, in nats.

    Args:
        name: of the target.
        corpus: what was found in it.
        chosen: documents taken for it.
        effective: effective sample size of the weights towards it, among the documents that pass the filter.
        kl_corpus: from the whole corpus.
        kl_chosen: from the documents taken for it; None where these have no n-gram.
        kl_random: from as many random documents that pass the filter; None likewise.
    """

    name: str
    corpus: CorpusFacts
    chosen: int
    effective: float
    kl_corpus: float
    kl_chosen: float | None
    kl_random: float | None = None

    @property
    def kl_reduction(self) -> float | None:
        return None if self.kl_chosen is None else self.kl_corpus - self.kl_chosen


@dataclass(frozen=True)
class DocumentChoice:
    """What a selector of documents found.

    Args:
        documents: the set, without provenance.
        corpus: what was found in the corpus.
        passed: documents that passed the selector's filter.
        targets: in the order in which they took.
    """

    documents: DocumentSet
    corpus: CorpusFacts
    passed: int
    targets: tuple[TargetFacts, ...]


class DocumentSelector(ABC):
    """A selector of documents of text. A subclass sets the class attributes, its `Config`, and `run`."""

    name: ClassVar[str]
    kind: ClassVar[StepKind] = "selector"
    Config: ClassVar[type[MethodConfig]]

    def __init__(self, config: Any) -> None:
        self.config = config

    def check(self, targets: Sequence[str]) -> None:  # noqa: B027
        """Raise InputError where targets of these names cannot serve; called before anything is read."""

    @abstractmethod
    def run(self, ctx: DocumentContext) -> DocumentChoice:
        """Choose documents."""
