"""The pass over a split that brings everything missing to disk at once.

What is asked for is looked up shard by shard; ranges of which anything is missing go forward once, and each quantity
that a range lacks is written. A range is written while the next one is computed, and is on the disk before that is
finished: a kill loses at most one finished range, or of statistics for each class those since the last writing.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from distill.cache import pass_costs
from distill.cache.forward import Forward, Part
from distill.cache.networks import Network
from distill.cache.pass_costs import PassCost
from distill.cache.quantities import Features, GradientNorms, Statistics, Stored
from distill.cache.shards import Shard, ShardFolder, count_bad, shard_ranges
from distill.cache.tiers import Tiers
from distill.contracts import Progress, Split
from distill.errors import NonFiniteError
from distill.training.memory import memory_errors, peak_bytes

Wanted = Stored | Statistics

# What writing running sums may cost, about as much as a row of features. Sums for each of many classes are larger than
# what a range of samples adds to them; a killed run then computes again what was passed since they were last written.
SUM_BYTES_A_SAMPLE = 4096


@dataclass(frozen=True)
class Limits:
    """What a pass may take and bear.

    Args:
        work_bytes: memory for per-sample gradients beside the forward pass.
        non_finite: share of a split's samples whose values may be NaN or infinite.
    """

    work_bytes: int = 1 << 30
    non_finite: float = 0.001


@dataclass(frozen=True)
class Sums:
    """Running sums of statistics.

    Args:
        stop: how many samples, from the first, they hold.
        values: float64 (classes, width), empty where `stop` is 0.
        bad: samples left out because they were not finite.
        written: how many samples the sums on disk hold.
    """

    stop: int
    values: Tensor
    bad: int
    written: int


class Pass:
    """One network's pass over one split.

    Args:
        split, network: whose rows.
        folders: where each quantity lies, complete or not.
        device: where the network runs.
        tiers: what keeps fresh rows in memory.
        limits, progress: as in `Cache`.
    """

    def __init__(
        self,
        split: Split,
        network: Network,
        folders: Mapping[Wanted, ShardFolder],
        *,
        tiers: Tiers,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self.split = split
        self.network = network
        self.folders = folders
        self.tiers = tiers
        self.limits = limits
        self.progress = progress
        self.shards: dict[Wanted, dict[range, Shard]] = {
            quantity: folder.present()
            for quantity, folder in folders.items()
            if not isinstance(quantity, Statistics)
        }
        self.sums = {
            quantity: _latest_sums(folder)
            for quantity, folder in folders.items()
            if isinstance(quantity, Statistics)
        }
        self.spans = shard_ranges(len(split))
        self.images_forwarded = 0
        self.name = uuid.uuid4().hex
        self.costs: list[PassCost] = []  # of this pass

    def run(self, needed: Iterable[Wanted]) -> None:
        """Compute what is missing of `needed`; quantities beside it are written where a pass is made anyway.

        Raises:
            NonFiniteError: more samples than `limits.non_finite` allows have NaN or infinite values.
        """
        needed = tuple(needed)
        missing = [span for span in self.spans if any(self._lacks(quantity, span) for quantity in needed)]
        if missing:
            self._compute(missing, needed)
        for quantity in needed:
            self._judge(quantity)

    def _compute(self, missing: Sequence[range], needed: Collection[Wanted]) -> None:
        total = sum(len(span) for span in missing)
        title = ", ".join(dict.fromkeys(quantity.kind.replace("_", " ") for quantity in self.folders))
        passes: dict[tuple[Wanted, ...], Forward] = {}
        last = time.perf_counter()
        with (
            memory_errors("computing features", fix="lower cache.work_bytes, or use a smaller network"),
            self.progress.task(title, total=total, unit="image") as task,
            _Writer() as writer,
        ):
            for span in missing:
                lacking = tuple(quantity for quantity in self.folders if self._lacks(quantity, span))
                if lacking not in passes:
                    passes[lacking] = self._forward(lacking)
                parts = passes[lacking].over(self.split, span, before_last=writer.wait)
                self.images_forwarded += len(span)
                writer.wait()
                now = time.perf_counter()
                peak = peak_bytes(self.tiers.device)
                cost = PassCost(self.name, span.start, span.stop, now - last, peak)
                last = now
                writer.do(partial(self._store, span, parts, needed, cost))
                del parts  # the writer's alone: freed once they are written, before the next are joined
                task.advance(len(span))

    def _forward(self, quantities: tuple[Wanted, ...]) -> Forward:
        work = self.limits.work_bytes
        return Forward(self.network, quantities, device=self.tiers.device, work_bytes=work)

    def _lacks(self, quantity: Wanted, span: range) -> bool:
        if isinstance(quantity, Statistics):
            return self.sums[quantity].stop < span.stop
        return span not in self.shards[quantity]

    def _store(
        self, span: range, parts: Mapping[Wanted, Part], needed: Collection[Wanted], cost: PassCost
    ) -> None:
        """Write what a range of samples gave; nothing of it, where too much of what is needed is not finite.

        What is written beside it is judged when it is asked for.
        """
        bad = {quantity: int(part.bad.sum()) for quantity, part in parts.items()}
        for quantity in needed:
            if quantity in parts:
                self._refuse(quantity, self._bad(quantity) + bad[quantity], span, parts[quantity].bad)
        for quantity, part in parts.items():
            if isinstance(quantity, Statistics):
                self._store_sums(quantity, span, part, bad[quantity])
            else:
                self._store_rows(quantity, span, part, bad[quantity])
            pass_costs.keep(self.folders[quantity].folder, cost)
        self.costs.append(cost)

    def earlier_costs(self, needed: Iterable[Wanted]) -> tuple[list[PassCost], bool]:
        """What other passes cost from which `needed` quantities are read, and whether all of that is known."""
        found: dict[str, PassCost] = {}
        known = True
        for quantity in needed:
            told = {cost.start: cost for cost in pass_costs.kept(self.folders[quantity].folder)}
            known = known and all(span.start in told for span in self.spans)
            found |= {cost.key: cost for cost in told.values() if cost.of != self.name}
        return list(found.values()), known

    def _store_rows(self, quantity: Stored, span: range, part: Part, bad: int) -> None:
        values = torch.where(part.bad[:, None], torch.nan, part.values) if bad else part.values
        shard = self.folders[quantity].write(span, values.cpu().numpy(), bad=bad)
        self.shards[quantity][span] = shard
        if self.tiers.device.type == "cuda":
            self.tiers.put(shard.path, values)

    def _store_sums(self, quantity: Statistics, span: range, part: Part, bad: int) -> None:
        """Add a range to the sums, and write them once that outweighs computing the range again."""
        before, folder = self.sums[quantity], self.folders[quantity]
        assert before.stop == span.start, "sums are taken in the order of the samples"
        values = before.values.add_(part.values.cpu()) if before.stop else part.values.cpu()
        sums = Sums(span.stop, values, before.bad + bad, before.written)
        if (span.stop - before.written) * SUM_BYTES_A_SAMPLE >= values.nbytes or span.stop == len(self.split):
            folder.write(range(span.stop), values.numpy(), bad=sums.bad)
            folder.remove_sums_before(span.stop)
            sums = replace(sums, written=span.stop)
        self.sums[quantity] = sums

    def _bad(self, quantity: Wanted) -> int:
        """Samples known to have values that are not finite."""
        if isinstance(quantity, Statistics):
            return self.sums[quantity].bad
        return count_bad(self.shards[quantity].values())

    def _judge(self, quantity: Wanted) -> None:
        """Refuse what an earlier run found too much of, tell of what is borne."""
        bad = self._bad(quantity)
        self._refuse(quantity, bad, None, None)
        if bad:
            self.progress.warn(
                f"{bad} of {len(self.split)} images gave values that are not finite; they are "
                f"{_counted(quantity)} {_describe(quantity)}",
                bad=bad,
            )

    def _refuse(self, quantity: Wanted, bad: int, span: range | None, where: Tensor | None) -> None:
        # As it is written: 0.29 * 100 is 28.999... in binary.
        allowed = int(Fraction(repr(self.limits.non_finite)) * len(self.split))
        if bad <= allowed:
            return
        first = ""
        if span is not None and where is not None:
            first = f", the first of these at image {span.start + int(where.nonzero()[0])}"
        raise NonFiniteError(
            f"{bad} of {len(self.split)} images gave NaN or infinite {_describe(quantity)}{first}",
            allowed=f"{allowed} (cache.non_finite: {self.limits.non_finite:g})",
            fix="check the network's training (a lower lr), and the images' pixels",
        )


def _latest_sums(folder: ShardFolder) -> Sums:
    """The furthest sums on disk. Another process may replace them while we look."""
    while True:
        shards = folder.present().values()
        if not shards:
            return Sums(0, torch.empty(0), 0, 0)
        latest = max(shards, key=lambda shard: shard.span.stop)
        try:
            values = torch.from_numpy(np.load(latest.path, allow_pickle=False))
            return Sums(latest.span.stop, values, latest.bad, latest.span.stop)
        except FileNotFoundError:
            continue


def _counted(quantity: Wanted) -> str:
    """What becomes of a sample whose values are not finite."""
    if isinstance(quantity, Statistics):
        return "left out of"
    return "NaN in" if isinstance(quantity, GradientNorms) else "rows of zeros in"


def _describe(quantity: Wanted) -> str:
    layer = f" of layer {quantity.layer}" if isinstance(quantity, Features) else ""
    return quantity.kind.replace("_", " ") + layer


class _Writer:
    """Does one thing at a time in a thread, while the caller goes on with the next; errors reach the caller."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> _Writer:
        return self

    def do(self, work: Callable[[], None]) -> None:
        """Begin `work` once the work before is done."""
        self.wait()
        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)
