"""Images that lie as arrays: an .npz file, a folder of .npy files, or an HDF5 file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from distill.contracts import Progress
from distill.data.array_pixels import Layout, read_labels, read_pixels, shape_of
from distill.data.base import DEFAULT_TEST, Data, DataConfig, Fraction, Plan, existing
from distill.data.build import Found, PixelRows
from distill.data.rows import MAX_CLASSES, check_labels, share_per_class
from distill.data.stored import has_array, open_array
from distill.errors import InputError
from distill.machine_paths import MachinePath

Name = Annotated[str, Field(min_length=1)]


class ArraysConfig(DataConfig):
    """Options of `arrays`.

    Args:
        path: an .npz or HDF5 file, or a folder of .npy files.
        x_train, y_train, x_test, y_test: names of the arrays (keys, datasets such as `train/images`, or files
            without .npy). Images are uint8 or floats in [0, 1], labels integers.
        layout: order of the images' dimensions; null tells it by which of them is 1 or 3.
        test: the share of each class cut as the test split, where there are no test arrays; null is 0.2 then.
        class_names: null numbers them.
    """

    name: Literal["arrays"] = "arrays"
    path: Annotated[str, MachinePath()]
    x_train: Name = "x_train"
    y_train: Name = "y_train"
    x_test: Name = "x_test"
    y_test: Name = "y_test"
    layout: Layout | None = None
    test: Fraction | None = None
    class_names: Annotated[list[str], Field(min_length=1)] | None = None


class Arrays(Data):
    """Arrays: npz, npy pairs or HDF5."""

    name = "arrays"
    Config = ArraysConfig

    def find(self, progress: Progress) -> Found:
        path = existing(self.config.path, option="path")
        names = self.config.class_names
        return Found(
            train=self._rows(path, self.config.x_train, self.config.y_train),
            test=self._rows(path, self.config.x_test, self.config.y_test)
            if self._brings_test(path)
            else self._share,
            classes=tuple(names) if names else None,
        )

    def peek(self) -> Plan:
        config: ArraysConfig = self.config
        path = existing(config.path, option="path")
        with open_array(path, config.x_train) as images:
            shape, count = shape_of(images, config.layout), images.shape[0]
        classes = len(config.class_names) if config.class_names else None
        if self._brings_test(path):
            with open_array(path, config.x_test) as images:
                return Plan(classes, shape, count, images.shape[0])
        with open_array(path, config.y_train) as stored:
            labels = read_labels(stored, count=count)
        check_labels(labels, classes=classes or MAX_CLASSES, where=f"{path}, {config.y_train}")
        cut = int(share_per_class(labels, self._share, classes=classes or 0).sum())
        return Plan(classes, shape, count - cut, cut)

    @property
    def _share(self) -> float:
        return DEFAULT_TEST if self.config.test is None else self.config.test

    def _brings_test(self, path: Path) -> bool:
        """Whether there are test arrays: both, or none of them."""
        config: ArraysConfig = self.config
        there = [name for name in (config.x_test, config.y_test) if has_array(path, name)]
        if len(there) == 1:
            raise InputError(
                "one of the two test arrays is missing",
                where=str(path),
                found=there[0],
                allowed=f"both {config.x_test} and {config.y_test}, or neither",
            )
        asked = {"x_test", "y_test"} & config.model_fields_set
        if asked and not there:
            raise InputError(
                "there are no arrays of these names", where=f"data.{min(asked)}", found=str(path)
            )
        if there and config.test is not None:
            raise InputError(
                "the data bring their own test split",
                where="data.test",
                found=f"{config.test}, and {' and '.join(there)} in {path}",
                fix="remove data.test",
            )
        return bool(there)

    def _rows(self, path: Path, x: str, y: str) -> PixelRows:
        with open_array(path, x) as stored:
            images = read_pixels(stored, layout=self.config.layout)
        with open_array(path, y) as stored:
            labels = read_labels(stored, count=len(images))
        return PixelRows(labels, f"{path}, {x}", images)
