"""What makes two requests the same: a key over everything that the answer depends on, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from distill.contracts import Preprocessing
from distill.models.torchvision_models import TorchvisionConfig
from distill.training.config import Strict, TrainConfig

# Raised whenever values change for the same inputs, so that older ones are not served; each for itself, as networks
# cost hours and rows of features seconds.
PRODUCER_VERSION = 3  # of rows and statistics
_OTHERS = {"network": 3, "trajectories": 4, "critical_maps": 4, "ngram_counts": 1, "ngram_scores": 1}


def producer_version(kind: str) -> int:
    """The version of what makes things of that kind, such as `features` or `network`."""
    return _OTHERS.get(kind, PRODUCER_VERSION)


def cache_key(kind: str, parts: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `parts`, the kind and its producer's version.

    Args:
        kind: what is stored, such as `features`.
        parts: JSON-able; floats are written with repr, hence exactly.
    """
    whole = {"kind": kind, "producer": producer_version(kind), "parts": parts}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def training_parts(config: TrainConfig) -> dict[str, Any]:
    """The parts of a key that tell how a network was trained on classes: without what counts for soft labels alone."""
    return config.model_dump(mode="json", exclude={"dbr_weight"})


def definition_parts(model: Strict) -> dict[str, Any]:
    """The parts of a key that tell which network a configuration means, its weights apart.

    The file of its weights may lie anywhere or be gone; that there was one counts, as it changes what some networks do.
    """
    parts = model.model_dump(mode="json")
    if isinstance(model, TorchvisionConfig):
        del parts["sha256"]
        parts["weights"] = has_weights_file(model)
    return parts


def has_weights_file(model: TorchvisionConfig) -> bool:
    """Whether the network's first weights come from a file."""
    return model.weights is not None or model.sha256 is not None


def preprocessing_parts(preprocessing: Preprocessing) -> dict[str, Any]:
    """The parts of a key that tell how images reach a network."""
    pre = preprocessing
    return {
        "mean": list(pre.mean),
        "std": list(pre.std),
        "zca": None if pre.zca is None else _array_digest(pre.zca),
        "zca_mean": None if pre.zca_mean is None else _array_digest(pre.zca_mean),
    }


def _array_digest(values: np.ndarray) -> str:
    """sha256 (hex) over type, shape and values."""
    head = f"{values.dtype.str} {values.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()
