"""The cache: what networks say about the source, computed once for all steps of a run and for later runs.

`request` answers any mix of quantities (distill/cache/quantities.py) by one pass over the samples of which anything is
not on disk yet. Rows are identified by everything that decides them (distill/cache/identity.py), stored in checksummed
shards (shards.py), kept on the device and the host while there is room (tiers.py) and read by blocks (rows.py).
Losses, margins, scores and last-layer gradients follow from features and logits and are never stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from distill.cache.folder import claim, default_folder
from distill.cache.forward import resolved
from distill.cache.identity import cache_key
from distill.cache.networks import Network
from distill.cache.passes import Limits, Pass, Wanted
from distill.cache.projections import Projection
from distill.cache.quantities import (
    AreaUnderMargin,
    CriticalMaps,
    ErrorNorms,
    Features,
    Forgetting,
    GradientNorms,
    Gradients,
    LastLayerGradients,
    Logits,
    Loss,
    Margins,
    Quantity,
    Recorded,
    Scored,
    Statistics,
    Stored,
    parts_of,
)
from distill.cache.rows import (
    ComputedRows,
    GradientRows,
    HeldRows,
    MeanRows,
    Rows,
    StoredRows,
    error_norms,
    losses,
    margin_rows,
)
from distill.cache.shards import SHARD_ROWS, ShardFolder
from distill.cache.statistics import LayerStatistics, StatisticsLayout
from distill.cache.taps import PENULTIMATE
from distill.cache.tiers import DEVICE_SHARE, HOST_SHARE, Tiers, free_device_bytes, free_host_bytes, map_file
from distill.contracts import Progress, Split
from distill.errors import InputError

if TYPE_CHECKING:
    from distill.costs import Costs

__all__ = [
    "PENULTIMATE",
    "Answers",
    "AreaUnderMargin",
    "Cache",
    "CriticalMaps",
    "ErrorNorms",
    "Features",
    "Forgetting",
    "GradientNorms",
    "GradientRows",
    "Gradients",
    "LastLayerGradients",
    "LayerStatistics",
    "Limits",
    "Logits",
    "Loss",
    "Margins",
    "Network",
    "Projection",
    "Rows",
    "Statistics",
    "default_folder",
]

_FROM_LOGITS = {Loss: losses, Margins: margin_rows, ErrorNorms: error_norms}


class Answers(Mapping[Quantity, Any]):
    """What was asked for, by the quantity that asked: rows, or statistics."""

    def __init__(self, found: Mapping[Quantity, Rows | LayerStatistics]) -> None:
        self._found = dict(found)

    @overload
    def __getitem__(self, quantity: Statistics) -> LayerStatistics: ...
    @overload
    def __getitem__(self, quantity: LastLayerGradients) -> GradientRows: ...
    @overload
    def __getitem__(self, quantity: Stored | Scored | Recorded) -> Rows: ...
    def __getitem__(self, quantity: Quantity) -> Any:
        return self._found[quantity]

    def __iter__(self) -> Iterator[Quantity]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class Cache:
    """Rows, statistics and trained networks, kept in one folder.

    Args:
        folder: created if absent; refused if it holds anything else than a cache of this format.
        device: where networks run and rows are read to, in float32.
        progress: where passes and repairs are told.
        device_bytes: rows kept on a GPU; by default a quarter of what is free there.
        host_bytes: rows kept in host memory; by default a quarter of what is free.
        limits: of a pass.
        costs: whose stage is charged for passes of earlier runs; None charges nobody.

    Raises:
        InputError: the folder cannot be used; nothing in it was changed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: torch.device,
        progress: Progress,
        device_bytes: int | None = None,
        host_bytes: int | None = None,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        costs: Costs | None = None,
    ) -> None:
        self.folder = folder
        self.device = device
        self.progress = progress
        self.limits = limits
        self.costs = costs
        self.images_forwarded = 0
        self._lock = claim(folder)
        if device_bytes is None:
            device_bytes = int(DEVICE_SHARE * free_device_bytes(device))
        if host_bytes is None:
            host_bytes = int(HOST_SHARE * free_host_bytes())
        self.tiers = Tiers(device, device_bytes=device_bytes, host_bytes=host_bytes)

    @property
    def networks_folder(self) -> Path:
        return self.folder / "networks"

    def features(self, split: Split, network: Network, *, layer: str = PENULTIMATE) -> Rows:
        """Outputs of `layer` for every sample, flattened: float32 (N, D)."""
        quantity = Features(layer)
        return self.request(split, network, [quantity])[quantity]

    def logits(self, split: Split, network: Network) -> Rows:
        """float32 (N, C)."""
        return self.request(split, network, [Logits()])[Logits()]

    def gradients(
        self,
        split: Split,
        networks: Network | Sequence[Network],
        quantity: Gradients | None = None,
        *,
        weights: Sequence[float] | None = None,
        normalise: bool = True,
    ) -> Rows:
        """Projected per-sample gradients, float32 (N, k): of one network, or the mean over several.

        Args:
            split: whose samples.
            networks: one, whose gradients are given as they are, or several, such as checkpoints of a training.
            quantity: which gradients.
            weights: how much each of several networks counts, such as the learning rates at its checkpoints (LESS,
                Xia et al., ICML 2024); None is alike.
            normalise: whether rows of several networks are scaled to length 1 before their mean.

        Raises:
            InputError: weights that have no mean.
        """
        quantity = quantity or Gradients()
        if isinstance(networks, Network):
            assert weights is None, "one network has no mean"
            return self.request(split, networks, [quantity])[quantity]
        parts = [self.request(split, network, [quantity])[quantity] for network in networks]
        return MeanRows(parts, normalise=normalise, weights=weights)

    def last_layer_gradients(self, split: Split, network: Network) -> GradientRows:
        """Last-layer gradients of every sample's cross-entropy."""
        return self.request(split, network, [LastLayerGradients()])[LastLayerGradients()]

    def scores(
        self, split: Split, networks: Sequence[Network], quantity: Scored | GradientNorms | Recorded
    ) -> Rows:
        """The mean over networks of a score, such as EL2N: (N, 1)."""
        return MeanRows(
            [self.request(split, network, [quantity])[quantity] for network in networks], normalise=False
        )

    def statistics(
        self, split: Split, network: Network, quantity: Statistics | None = None
    ) -> LayerStatistics:
        """Mean and variance of the inputs of layers."""
        quantity = quantity or Statistics()
        return self.request(split, network, [quantity])[quantity]

    def request(self, split: Split, network: Network, quantities: Iterable[Quantity]) -> Answers:
        """Any mix of quantities, by one pass over the samples of which anything is not on disk yet.

        Args:
            split: whose samples, at least one.
            network: in evaluation mode, without augmentation.
            quantities: what is wanted.

        Raises:
            InputError: the network has no such layer, or nothing was recorded of its training.
            NonFiniteError: more samples than `limits.non_finite` allows gave NaN or infinite values.
        """
        assert len(split), "a split without samples has no rows"
        quantities = tuple(dict.fromkeys(quantities))
        recorded = {
            each: _recorded(each, split, network, self.device)
            for each in quantities
            if isinstance(each, Recorded)
        }
        meant = {each: resolved(each, network.outline) for each in quantities}
        needed = tuple(dict.fromkeys(part for each in quantities for part in _stored(meant[each])))
        # Logits cost nothing where a pass is made, and several scores follow from them.
        made = dict.fromkeys((*needed, Logits())) if needed else {}
        folders = {part: self._folder(part, split, network) for part in made}
        as_asked = {meant[each]: each for each in reversed(quantities)}
        for part, folder in folders.items():
            told = self._parts(as_asked.get(part, part), split, network)  # type: ignore[arg-type]
            folder.describe({"kind": part.kind, **told})
        work = Pass(split, network, folders, tiers=self.tiers, limits=self.limits, progress=self.progress)
        work.run(needed)
        self.images_forwarded += work.images_forwarded
        self._charge(work, needed)
        stored = {part: self._open(part, work, split, network) for part in needed}
        return Answers(
            {
                each: recorded[each] if each in recorded else _answer(meant[each], stored, split)
                for each in quantities
            }
        )

    def _charge(self, work: Pass, needed: Sequence[Wanted]) -> None:
        """Charge the running stage for what it reads of other passes; for its own it has paid."""
        if self.costs is None:
            return
        for cost in work.costs:
            self.costs.made(cost.key)
        earlier, known = work.earlier_costs(needed)
        for cost in earlier:
            self.costs.charge(cost.key, seconds=cost.seconds, peak_bytes=cost.peak_bytes)
        if not known:
            self.costs.mark_cached()

    def _parts(self, quantity: Wanted, split: Split, network: Network) -> dict[str, Any]:
        """Everything that decides the quantity's values."""
        parts: dict[str, Any] = {
            "data": split.fingerprint,
            "rows": len(split),
            "shard_rows": SHARD_ROWS,
            "network": network.identity,
            "dtype": "float32",
            # Another device rounds otherwise, and the same seed gives the same set.
            "device": self.device.type,
            **parts_of(quantity),
        }
        if isinstance(quantity, Gradients | GradientNorms):
            parts["work_bytes"] = self.limits.work_bytes  # decides the blocks, and so the rounding
        return parts

    def _folder(self, quantity: Wanted, split: Split, network: Network) -> ShardFolder:
        return ShardFolder(
            self.folder / "rows" / cache_key(quantity.kind, self._parts(quantity, split, network)),
            rows=len(split),
            progress=self.progress,
            prefix="sums" if isinstance(quantity, Statistics) else "rows",
        )

    def _open(self, quantity: Wanted, work: Pass, split: Split, network: Network) -> Rows | LayerStatistics:
        if isinstance(quantity, Statistics):
            layout = StatisticsLayout.of(network.outline, quantity, classes=network.classes)
            return layout.statistics(work.sums[quantity].values.to(self.device))
        shards = work.shards[quantity]
        files = tuple(shards[span].path for span in work.spans)
        holes = [number for number, span in enumerate(work.spans) if shards[span].bad]
        width = map_file(files[0]).shape[1]
        rows = StoredRows(files, (len(split), width), self.tiers, holes=holes)
        return rows.unfilled() if isinstance(quantity, GradientNorms) else rows


def _stored(quantity: Quantity) -> tuple[Wanted, ...]:
    """What must be on disk to answer."""
    if isinstance(quantity, Scored):
        return (Logits(),)
    if isinstance(quantity, LastLayerGradients):
        return (Features(), Logits())
    if isinstance(quantity, Recorded):
        return ()
    return (quantity,)


def _answer(
    quantity: Quantity, stored: Mapping[Wanted, Rows | LayerStatistics], split: Split
) -> Rows | LayerStatistics:
    if isinstance(quantity, LastLayerGradients):
        features, logits = stored[Features()], stored[Logits()]
        assert isinstance(features, StoredRows) and isinstance(logits, StoredRows)
        return GradientRows(features.unfilled(), logits.unfilled(), split.labels)
    if isinstance(quantity, Scored):
        logits = stored[Logits()]
        assert isinstance(logits, StoredRows)
        return ComputedRows(_FROM_LOGITS[type(quantity)], [logits.unfilled()], split.labels, width=1)
    return stored[quantity]  # type: ignore[index]


def _recorded(quantity: Recorded, split: Split, network: Network, device: torch.device) -> Rows:
    """What the network's training told of its samples.

    Raises:
        InputError: nothing was recorded, or of other samples.
    """
    dynamics = network.dynamics
    if dynamics is None or network.facts.get("data") != split.fingerprint:
        raise InputError(
            f"it was not recorded how the samples fared while the network was trained ({type(quantity).__name__})",
            found="a network trained on other samples" if dynamics else "no record",
            allowed="a network that was trained on these samples with class labels and mix: none",
        )
    if isinstance(quantity, AreaUnderMargin):
        return HeldRows(dynamics.margin[:, None].to(device))
    forgotten = torch.where(dynamics.learned, dynamics.forgetting.float(), torch.inf)
    return HeldRows(forgotten[:, None].to(device))
