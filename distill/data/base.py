"""What every data source shares: its options, what it finds, and the way from there to a `Source`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from distill.contracts import Progress, Source
from distill.data.build import Found, build_source
from distill.data.decode import Channels, PixelFormat
from distill.errors import InputError
from distill.training.config import Strict

Side = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(gt=0, lt=1)]

# The share of each class that becomes the test split where the data bring none.
DEFAULT_TEST = 0.2


class DataConfig(Strict):
    """The options that every data source has.

    Args:
        name: the data name.
        resize: side in px, or [height, width]; images are scaled to cover it and cropped at the centre.
        channels: bring images to grey or RGB; null keeps what the files have.
        classes: use these only, by name or number; they are renumbered in the order given.
        cap: at most this many training images a class, validation included: those that come first when the
            class is ordered by a hash of (seed, row number).
        valid: share of each class's training images cut off as the validation split, by the recipe's seed.
        bad_images: share of images that may be undecodable. One in a thousand by default: a large collection
            may hold a few broken files, more is a sign of damage.
    """

    name: str
    resize: Side | Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    channels: Channels | None = None
    classes: Annotated[list[str | int], Field(min_length=1)] | None = None
    cap: Annotated[int, Field(ge=1)] | None = None
    valid: Annotated[float, Field(ge=0, lt=1)] = 0.1
    bad_images: Annotated[float, Field(ge=0, le=1)] = 0.001

    @property
    def pixel_format(self) -> PixelFormat:
        side = self.resize
        size = None if side is None else (side, side) if isinstance(side, int) else (side[0], side[1])
        return PixelFormat(self.channels, size)


@dataclass(frozen=True)
class Plan:
    """What can be said of the data without reading them; None is what cannot.

    Args:
        classes: C.
        image_shape: (Ch, H, W).
        train: images at most, validation included.
        test: images at most.
    """

    classes: int | None = None
    image_shape: tuple[int, int, int] | None = None
    train: int | None = None
    test: int | None = None

    @property
    def image_bytes(self) -> int | None:
        """Host memory that the splits will fill, in bytes."""
        if self.image_shape is None or self.train is None or self.test is None:
            return None
        channels, height, width = self.image_shape
        return (self.train + self.test) * channels * height * width


class Data(ABC):
    """A data source. A subclass sets its `name` and `Config`, and finds what is there.

    `originals` is what its images are: files of their own, members of archives, or pixels without a path.
    """

    name: ClassVar[str]
    Config: ClassVar[type[DataConfig]]
    originals: ClassVar[Literal["files", "members", "pixels"]] = "pixels"

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def find(self, progress: Progress) -> Found:
        """Locate the data and read their labels; InputError where they are missing."""

    @abstractmethod
    def peek(self) -> Plan:
        """What a cheap look tells of the data as they lie there, before any option applies."""

    def folders(self) -> list[Path]:
        """The folders, there or not, in which new files may be taken for data: none where files have fixed names."""
        return []

    def open(self, *, seed: int, progress: Progress) -> Source:
        """Read everything that the options ask for.

        Raises:
            InputError: files missing, an unknown or empty class, images of different sizes.
            DamagedDataError: truncated files, labels out of range, too many undecodable images.
            MemoryExhaustedError: the images do not fit.
        """
        config: DataConfig = self.config
        return build_source(
            config.name,
            self.find(progress),
            pixel_format=config.pixel_format,
            wanted=config.classes,
            cap=config.cap,
            valid=config.valid,
            bad_images=config.bad_images,
            seed=seed,
            progress=progress,
        )

    def plan(self) -> Plan:
        """`peek` with the options applied."""
        return _apply(self.peek(), self.config)


def _apply(plan: Plan, config: DataConfig) -> Plan:
    classes = plan.classes if config.classes is None else len(config.classes)
    train = plan.train
    if config.cap is not None and classes is not None:
        train = config.cap * classes if train is None else min(train, config.cap * classes)
    return replace(
        plan, classes=classes, train=train, image_shape=_shape(plan.image_shape, config.pixel_format)
    )


def _shape(found: tuple[int, int, int] | None, asked: PixelFormat) -> tuple[int, int, int] | None:
    channels = {"grayscale": 1, "rgb": 3}[asked.channels] if asked.channels else found and found[0]
    size = asked.size or (found and found[1:])
    return (channels, *size) if channels and size else None


def existing(path: str, *, option: str, folder: bool = False) -> Path:
    """The path with `~` resolved; InputError where there is no such file (or folder)."""
    found = Path(path).expanduser()
    if found.is_dir() if folder else found.exists():
        return found
    raise InputError(
        f"no such {'folder' if folder else 'file or folder'}",
        where=f"data.{option}",
        found=str(found),
        fix=f"correct the path; it is read relative to {Path.cwd()}" if not found.is_absolute() else None,
    )
