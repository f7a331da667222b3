"""Tar shards of KEY.jpg + KEY.cls, as the WebDataset library writes them; streamed, never extracted.

The shards are read twice: first their labels alone, so that class subsets, caps, cuts and every fault of the
archive are settled before an image is decoded and the images go into one tensor of known size; then the
images wanted."""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from glob import glob
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from distill.contracts import Progress
from distill.data.base import Data, DataConfig, Fraction, Plan, existing
from distill.data.build import EncodedRows, Found
from distill.data.decode import Item, PixelFormat, image_shape
from distill.data.shards import Sample, read_samples
from distill.errors import InputError
from distill.machine_paths import MachinePath
from distill.progress import NullProgress

# Shards up to this size together are counted for a dry run; reading takes about a second per 50 MB.
_COUNTED_BYTES = 200_000_000
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_WILD = re.compile(r"[*?[]")

Paths = Annotated[list[Annotated[str, MachinePath()]], Field(min_length=1)]


class WebDatasetConfig(DataConfig):
    """Options of `webdataset`: a folder with train*.tar and test*.tar (or val*.tar), or lists of shards.

    Args:
        folder: holds the shards, .tar, .tar.gz or .tgz, and may hold classes.txt with a class name a line.
        train: paths or patterns with * and ?, relative to `folder` where that is given.
        test: likewise; or the share of each class of the training shards to cut as the test split.
        class_names: in place of classes.txt; without either, classes are named by their numbers.
    """

    name: Literal["webdataset"] = "webdataset"
    folder: Annotated[str, MachinePath()] | None = None
    train: Paths | None = None
    test: Paths | Fraction | None = None
    class_names: Annotated[list[str], Field(min_length=1)] | None = None


class WebDataset(Data):
    """Tar shards of jpg/png + cls, streamed."""

    name = "webdataset"
    Config = WebDatasetConfig
    originals = "members"

    def find(self, progress: Progress) -> Found:
        test = self._test_shards()
        from_val = not isinstance(test, float) and self.config.test is None and test[0].name.startswith("val")
        return Found(
            train=_rows(self._train_shards(), "training", progress, self._base),
            test=test if isinstance(test, float) else _rows(test, "test", progress, self._base),
            classes=self._class_names(),
            notes=("the shards val* are the test split: there are none named test*",) if from_val else (),
        )

    def peek(self) -> Plan:
        names = self._class_names()
        train, test = self._train_shards(), self._test_shards()
        sample = next(read_samples(train[0], want=lambda position: position == 0), None)
        shape = None if sample is None else image_shape(_item(sample, train[0]), PixelFormat())
        plan = Plan(classes=len(names) if names else None, image_shape=shape)
        parts = [train] if isinstance(test, float) else [train, test]
        if sum(shard.stat().st_size for part in parts for shard in part) > _COUNTED_BYTES:
            return plan
        rows = [_rows(part, "", NullProgress()).labels for part in parts]
        counts = [len(labels) for labels in rows]
        if isinstance(test, float):
            cut = round(counts[0] * test)
            counts = [counts[0] - cut, cut]
        return replace(plan, classes=plan.classes or int(rows[0].max()) + 1, train=counts[0], test=counts[1])

    def folders(self) -> list[Path]:
        """The folder of the shards, and those whose files or folders are matched with patterns."""
        config: WebDatasetConfig = self.config
        base = Path() if config.folder is None else Path(config.folder).expanduser()
        lists = [each for each in (config.train, config.test) if isinstance(each, list)]
        patterns = [base / Path(pattern).expanduser() for each in lists for pattern in each]
        matched = [_unmatched(pattern) for pattern in patterns if _WILD.search(str(pattern))]
        return [*([] if config.folder is None else [base]), *matched]

    def _train_shards(self) -> list[Path]:
        config: WebDatasetConfig = self.config
        if config.train is not None:
            return self._matching(config.train, "train")
        shards = self._named("train")
        if not shards:
            raise InputError(
                "there are no training shards",
                where=str(self._folder()),
                allowed=", ".join(f"train*{suffix}" for suffix in SUFFIXES),
                fix="rename them, or list them in data.train",
            )
        return shards

    def _test_shards(self) -> list[Path] | float:
        config: WebDatasetConfig = self.config
        if isinstance(config.test, float):
            return config.test
        if config.test is not None:
            return self._matching(config.test, "test")
        shards = (self._named("test") or self._named("val")) if config.folder is not None else []
        if not shards:
            raise InputError(
                "there are no test shards",
                where=str(self._folder()),
                allowed=", ".join(f"{stem}*{suffix}" for stem in ("test", "val") for suffix in SUFFIXES),
                fix="list them in data.test, or set data.test to the share of the training images to cut off",
            )
        return shards

    @property
    def _base(self) -> Path | None:
        return None if self.config.folder is None else self._folder()

    def _folder(self) -> Path:
        if self.config.folder is None:
            raise InputError(
                "nothing says where the shards are",
                where="data.folder",
                fix="set data.folder, or data.train and data.test",
            )
        return existing(self.config.folder, option="folder", folder=True)

    def _named(self, stem: str) -> list[Path]:
        """The folder's shards whose names begin with `stem`, sorted."""
        return sorted(path for path in self._folder().glob(f"{stem}*") if path.name.endswith(SUFFIXES))

    def _matching(self, patterns: Sequence[str], option: str) -> list[Path]:
        """The files that the patterns name: in the order of the list, sorted within a pattern."""
        base = self._folder() if self.config.folder is not None else Path()
        shards: list[Path] = []
        for pattern in patterns:
            full = str(base / Path(pattern).expanduser())
            found = [full] if Path(full).is_file() else sorted(glob(full))  # noqa: PTH207 absolute patterns
            if not found:
                raise InputError("no shard matches", where=f"data.{option}", found=full)
            shards += map(Path, found)
        return shards

    def _class_names(self) -> tuple[str, ...] | None:
        if self.config.class_names is not None:
            return tuple(self.config.class_names)
        if self.config.folder is None or not (self._folder() / "classes.txt").is_file():
            return None
        lines = (self._folder() / "classes.txt").read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip()) or None


def _unmatched(pattern: Path) -> Path:
    """The last folder of a pattern that is named without wildcards."""
    return next(folder for folder in pattern.parents if not _WILD.search(str(folder)))


def _rows(shards: Sequence[Path], split: str, progress: Progress, folder: Path | None = None) -> EncodedRows:
    """Read the labels; the images follow when they are asked for."""
    labels = array("q")
    counts = []  # samples a shard
    with progress.task(f"read {split} labels", total=len(shards), unit="shard") as task:
        for shard in shards:
            before = len(labels)
            labels.extend(_label_of(sample) for sample in read_samples(shard, want=lambda _: False))
            counts.append(len(labels) - before)
            task.advance()
    where = str(shards[0]) if len(shards) == 1 else f"{shards[0]} and {len(shards) - 1} more shards"
    return EncodedRows(
        _tensor(labels), where, lambda rows: _items(shards, counts, rows), streamed=True, folder=folder
    )


def _items(shards: Sequence[Path], counts: Sequence[int], rows: Tensor) -> Iterator[Item]:
    """The images of these rows, int64 (n,) ascending over all shards; shards without any are not opened."""
    first = 0
    for shard, count in zip(shards, counts, strict=True):
        wanted = np.zeros(count, dtype=bool)
        wanted[rows[(rows >= first) & (rows < first + count)].numpy() - first] = True
        first += count
        remaining = int(wanted.sum())
        if not remaining:
            continue
        for sample in read_samples(shard, want=partial(_marked, wanted)):
            if sample.image is not None:
                yield _item(sample, shard)
                remaining -= 1
            if not remaining:  # the rest of the shard was checked when its labels were read
                break


def _marked(rows: np.ndarray, position: int) -> bool:
    return position < len(rows) and bool(rows[position])


def _label_of(sample: Sample) -> int:
    assert sample.label is not None, "read_samples completes its samples"
    return sample.label


def _item(sample: Sample, shard: Path) -> Item:
    member = sample.image_name or ""
    return Item(f"{shard}:{member}", sample.image or b"", member.rpartition("/")[2])


def _tensor(labels: array[int]) -> Tensor:
    return (
        torch.frombuffer(labels, dtype=torch.int64).clone() if labels else torch.empty(0, dtype=torch.int64)
    )
