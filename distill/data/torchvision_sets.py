"""The small public data sets, downloaded and checked by torchvision.

They lie in `data.folder`, by default $XDG_CACHE_HOME/distill/data (~/.cache/distill/data). Where the network
is out of reach the error says which file to put there; torchvision then unpacks it without the network."""

from __future__ import annotations

import os
import tarfile
import zlib
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from distill.contracts import Progress
from distill.data.base import Data, DataConfig, Plan
from distill.data.build import Found, PixelRows
from distill.errors import InputError
from distill.machine_paths import MachinePath


class TorchvisionConfig(DataConfig):
    """Options of every data set here.

    Args:
        folder: where the files lie or go; null is $XDG_CACHE_HOME/distill/data.
        download: fetch what is missing.
    """

    folder: Annotated[str, MachinePath()] | None = None
    download: bool = True

    @property
    def root(self) -> Path:
        if self.folder is not None:
            return Path(self.folder).expanduser()
        cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return Path(cache).expanduser() / "distill" / "data"


class TorchvisionData(Data):
    """Base of the data sets here: a subclass says which torchvision class it is, and which files that reads.

    Args:
        files: where each file comes from and its place below the folder.
    """

    dataset: ClassVar[type]
    files: ClassVar[tuple[tuple[str, str], ...]]
    shape: ClassVar[Plan]

    def split_arguments(self, *, train: bool) -> dict[str, Any]:
        return {"train": train}

    def class_names(self, dataset: Any) -> tuple[str, ...]:
        return tuple(dataset.classes)

    def find(self, progress: Progress) -> Found:
        train = self._load(train=True)
        return Found(
            train=self._rows(train, "training"),
            test=self._rows(self._load(train=False), "test"),
            classes=self.class_names(train),
        )

    def peek(self) -> Plan:
        return self.shape

    def _rows(self, dataset: Any, split: str) -> PixelRows:
        images, labels = image_tensors(dataset)
        return PixelRows(labels, f"{self.name} {split} data", images)

    def _load(self, *, train: bool) -> Any:
        root = self.config.root
        try:
            root.mkdir(parents=True, exist_ok=True)
            return self.dataset(str(root), download=self.config.download, **self.split_arguments(train=train))
        except (
            OSError,
            RuntimeError,
            ValueError,
            EOFError,
            HTTPException,
            tarfile.TarError,
            zlib.error,
        ) as error:
            raise self._unavailable(root, error) from error

    def _unavailable(self, root: Path, error: Exception) -> InputError:
        wanted = "; ".join(f"{url} as {root / place}" for url, place in self.files)
        return InputError(
            f"{self.name} could not be {'downloaded' if self.config.download else 'found'}",
            where=f"data.folder ({root})",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            fix=f"put {wanted}, and keep data.download true: it unpacks them without the network",
        )


def image_tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    """The pixels and labels that a torchvision data set holds.

    Args:
        dataset: has `data`, uint8 (N, H, W), (N, H, W, 3) or SVHN's (N, 3, H, W), and `targets` or `labels`.

    Returns:
        uint8 (N, Ch, H, W) and int64 (N,).
    """
    images = torch.as_tensor(np.asarray(dataset.data))
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] == 3 and images.shape[1] != 3:
        images = images.permute(0, 3, 1, 2)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    return images.contiguous(), torch.as_tensor(labels).to(torch.int64)


class CIFAR10Config(TorchvisionConfig):
    name: Literal["cifar10"] = "cifar10"


class CIFAR10(TorchvisionData):
    """CIFAR-10 through torchvision: 50,000 and 10,000 colour images of 32 x 32."""

    name = "cifar10"
    Config = CIFAR10Config
    dataset = datasets.CIFAR10
    files = ((datasets.CIFAR10.url, datasets.CIFAR10.filename),)
    shape = Plan(10, (3, 32, 32), 50_000, 10_000)


class CIFAR100Config(TorchvisionConfig):
    name: Literal["cifar100"] = "cifar100"


class CIFAR100(TorchvisionData):
    """CIFAR-100 through torchvision: 50,000 and 10,000 colour images of 32 x 32."""

    name = "cifar100"
    Config = CIFAR100Config
    dataset = datasets.CIFAR100
    files = ((datasets.CIFAR100.url, datasets.CIFAR100.filename),)
    shape = Plan(100, (3, 32, 32), 50_000, 10_000)


def _mnist_files(dataset: type[datasets.MNIST]) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"{dataset.mirrors[0]}{name}", f"{dataset.__name__}/raw/{name}") for name, _ in dataset.resources
    )


class MNISTConfig(TorchvisionConfig):
    name: Literal["mnist"] = "mnist"


class MNIST(TorchvisionData):
    """MNIST through torchvision: 60,000 and 10,000 grey digits of 28 x 28."""

    name = "mnist"
    Config = MNISTConfig
    dataset = datasets.MNIST
    files = _mnist_files(datasets.MNIST)
    shape = Plan(10, (1, 28, 28), 60_000, 10_000)

    def class_names(self, dataset: Any) -> tuple[str, ...]:
        return tuple("0123456789")  # torchvision's are "0 - zero", awkward to write in a recipe


class FashionMNISTConfig(TorchvisionConfig):
    name: Literal["fashion_mnist"] = "fashion_mnist"


class FashionMNIST(TorchvisionData):
    """Fashion-MNIST through torchvision: 60,000 and 10,000 grey images of 28 x 28."""

    name = "fashion_mnist"
    Config = FashionMNISTConfig
    dataset = datasets.FashionMNIST
    files = _mnist_files(datasets.FashionMNIST)
    shape = Plan(10, (1, 28, 28), 60_000, 10_000)


class SVHNConfig(TorchvisionConfig):
    name: Literal["svhn"] = "svhn"


class SVHN(TorchvisionData):
    """Street View House Numbers through torchvision: 73,257 and 26,032 colour images of 32 x 32."""

    name = "svhn"
    Config = SVHNConfig
    dataset = datasets.SVHN
    files = tuple(tuple(datasets.SVHN.split_list[split][:2]) for split in ("train", "test"))
    shape = Plan(10, (3, 32, 32), 73_257, 26_032)

    def split_arguments(self, *, train: bool) -> dict[str, Any]:
        return {"split": "train" if train else "test"}

    def class_names(self, dataset: Any) -> tuple[str, ...]:
        return tuple("0123456789")
