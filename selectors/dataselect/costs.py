"""What samples cost, and how much a selection may cost: the options, and the file of costs."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from distill.contracts import Split
from distill.errors import DamagedDataError, InputError
from distill.machine_paths import MachinePath
from distill.training.config import Positive, Strict


class CostConfig(Strict):
    """Costs of samples and the limit of their sum.

    `file` is an .npy file of one positive number for each sample of the data as they were found, so that neither
    `data.valid`, `cap` nor an image left out changes which number is whose; `distill export --to indices` tells a
    sample's number. `sha256` is compared where given; alone, as in a set's recipe, it waits for
    the file's name. `limit` is in the units of the file.
    """

    limit: Positive
    file: Annotated[str, Field(min_length=1), MachinePath(sha256="sha256")] | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None

    @model_validator(mode="after")
    def _a_file_is_meant(self) -> Self:
        if self.file is None and self.sha256 is None:
            raise ValueError("name the file of costs")
        return self


def refuse_absent_costs(config: CostConfig) -> None:
    """Raise InputError where the file of costs is not there."""
    _path(config)


def read_costs(config: CostConfig, split: Split) -> np.ndarray:
    """Costs of the samples of the train split: float64 (N,), above 0.

    Raises:
        InputError: no file, too few numbers, a number that is no cost, or a limit below the least cost.
        DamagedDataError: another sha256 than asked for, or no .npy file.
    """
    path = _path(config)
    costs = _array(path, config.sha256)
    numbers = np.arange(len(split)) if split.rows is None else split.rows.numpy()
    needed = int(numbers.max()) + 1
    if costs.ndim != 1 or len(costs) < needed or costs.dtype.kind not in "iuf":
        raise InputError(
            "the file of costs does not hold one number for each sample of the data",
            where="costs.file",
            found=f"{path}: {costs.dtype} of shape {costs.shape}",
            allowed=f"one number for each sample of the data as they were found, at least {needed}",
            fix="write numpy.save(FILE, costs) for all samples, those of the validation split and left out ones too",
        )
    values = costs.astype(np.float64)[numbers]
    wrong = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(wrong):
        raise InputError(
            f"{len(wrong)} costs are no numbers above 0",
            where="costs.file",
            found=f"{values[wrong[0]]:g} for sample {numbers[wrong[0]]}",
            allowed="finite numbers > 0",
            fix="give every sample a cost",
        )
    if values.min() > config.limit:
        raise InputError(
            "no sample is as cheap as the limit",
            where="costs.limit",
            found=f"{config.limit:g}",
            allowed=f"at least {values.min():g}, the least cost",
            fix="raise the limit",
        )
    return values


def _path(config: CostConfig) -> Path:
    if config.file is None:
        raise InputError(
            "the file of costs is not named",
            where="costs.file",
            found=f"sha256 {config.sha256}",
            fix="name the file of this sha256",
        )
    path = Path(config.file)
    if not path.is_file():
        raise InputError(
            "there is no such file of costs", where="costs.file", found=config.file, fix="correct the path"
        )
    return path


def _array(path: Path, sha256: str | None) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            "the file of costs cannot be read", where="costs.file", found=f"{path}: {error.strerror}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DamagedDataError(
            "the file of costs is another than the recipe names",
            where="costs.sha256",
            found=f"{found} ({path})",
            allowed=sha256,
            fix="name the right file, or remove sha256",
        )
    try:
        return np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DamagedDataError(
            "the file of costs is no .npy file of numbers",
            where="costs.file",
            found=f"{path}: {error}",
            fix="write it with numpy.save",
        ) from error
