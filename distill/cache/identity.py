"""What makes two requests the same: a key over everything that the answer depends on, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Raised whenever a producer's values change for the same inputs, so that older rows are not served.
PRODUCER_VERSION = 2


def cache_key(kind: str, parts: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of `parts`, the kind and the producer's version.

    Args:
        kind: what is stored, such as `features`.
        parts: JSON-able; floats are written with repr, hence exactly.
    """
    whole = {"kind": kind, "producer": PRODUCER_VERSION, "parts": parts}
    text = json.dumps(whole, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
