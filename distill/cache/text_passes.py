"""What passes over corpora leave in the cache's folder, so that another choice from the same corpus reads none of it.

FOLDER/text/KEY/manifest.json           what it is of
FOLDER/text/KEY/KIND-NUMBER-SHA256.npz  the result of a piece; the sha256 is over all that decides it
FOLDER/text/KEY/.cost                   what each piece cost (distill/cache/pass_costs.py)

Pieces are known by their files' names, sizes and times of change: one that has changed is read anew.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.cache.folder import claim, describe
from distill.cache.identity import cache_key, producer_version
from distill.cache.pass_costs import PassCost, keep, kept
from distill.cache.shards import MANIFEST

if TYPE_CHECKING:
    from distill.costs import Costs

FOLDER = "text"


class TextPasses:
    """The places of passes in one cache.

    Args:
        folder: of the cache; created if absent.
        costs: whose stage pays for passes, also for those of earlier runs that it reads.

    Raises:
        InputError: the folder cannot be used; nothing in it was changed.
    """

    def __init__(self, folder: Path, *, costs: Costs) -> None:
        self.folder = folder
        self.costs = costs
        self._lock = claim(folder)

    def place(self, kind: str, parts: Mapping[str, Any]) -> Path:
        """The folder of a pass, made where it is absent.

        Args:
            kind: `ngram_counts` or `ngram_scores`.
            parts: everything that decides its results, but for the files' content; JSON-able.
        """
        place = self.folder / FOLDER / cache_key(kind, parts)
        describe(place / MANIFEST, {"producer": producer_version(kind), "parts": {"kind": kind, **parts}})
        return place

    def charge(self, place: Path, pieces: Collection[int]) -> None:
        """Have the running stage pay for pieces that earlier runs computed."""
        costs = {cost.start: cost for cost in kept(place) if cost.start in pieces}
        for cost in costs.values():
            self.costs.charge(cost.key, seconds=cost.seconds, peak_bytes=cost.peak_bytes)
        if len(costs) < len(pieces):
            self.costs.mark_cached()

    def made(self, place: Path, piece: int, *, seconds: float) -> None:
        """Keep what a piece has cost that this stage computed.

        Args:
            seconds: of the pass since the piece that was done before.
        """
        cost = PassCost(place.name, piece, piece + 1, seconds, self.costs.so_far().peak_bytes or 0)
        keep(place, cost)
        self.costs.made(cost.key)


def pieces_held(place: Path) -> int:
    """Pieces of a pass that are there."""
    with os.scandir(place) as found:
        return len({entry.name.split("-")[1] for entry in found if entry.name.endswith(".npz")})
