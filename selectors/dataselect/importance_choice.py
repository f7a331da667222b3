"""Importance resampling of images: draw from the source as if it were the target, by their features.

    log w(x) = ln p(x) / q(x),  p the density of the target's features and q of the source's
    kept: the k greatest of log w(x) + g(x), g Gumbel noise     or without noise the k greatest weights
    truncated: w(x) <= sqrt(N) mean(w)

(Xie, Santurkar, Ma and Liang, "Data Selection for Language Models via Importance Resampling", NeurIPS 2023, section 3.)
The k greatest keys are k draws without replacement with probabilities in proportion to the weights of those that are
left: dataselect/resampling.py. What differs from text is the density ratio: by a classifier in all features
(dataselect/logistic_ratio.py), or by counts in buckets of the feature space, which take the place of n-grams
(dataselect/bucket_ratio.py). Features are brought to mean 0 and variance 1 before. Log weights are rounded to 2^-20, so
that samples with the same features tie, in whatever blocks they lie, wherever one function of the features weighs them
both, and most whose features differ in their last bits; ties go to the lowest row. The classifiers of folds are many
functions: twins in two folds are scored by two, and one may be taken and the other left. (Folds by what the features
are would part twins as well whose last bits differ, as they do from batch to batch.)

Students weigh what is drawn alike: drawing has spent the weights, and the k drawn are distributed as the target is, as
far as the source has what it takes. Where k is not small beside the effective number of samples, (sum w)^2 / sum w^2,
draws without replacement run out of those that resemble the target, and that is told.

How near the selection comes is measured as the reduction of KL(target || others) from the source to the selection, over
levels of log w that each hold as many samples of the target, at most 16 and at least 5 samples each of target and
selection. Were log w exact, nothing would be lost by that: it is a sufficient statistic of which of the two a sample is
from. The target's own log w come from what did not count it, or learn from it. Text is measured over the buckets
themselves; a few images in hundreds of buckets leave most of them empty, whose logarithms would say nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from dataselect import bucket_ratio, logistic_ratio
from dataselect.bucket_ratio import BucketRatio, Combine, Tables
from dataselect.features import TargetedConfig, TargetedSelector
from dataselect.importance import EffectiveSize, divergence, shares
from dataselect.resampling import Greatest, gumbel_noise
from dataselect.standard_features import standardise
from distill.contracts import Context, DistilledSet, Progress, Selection, Source, StepKind
from distill.selection import Picks, select

_LEVELS, _LEAST = 16, 5  # levels of log w in which target and selection are compared, and samples of a level
_STEPS = 1 << 20  # of a log weight of 1
_CHANCE = float(np.log(2))  # loss of a classifier that knows nothing

# Which estimate each option belongs to.
_USED = {
    "logistic": ("regularisation", "folds"),
    "quantised": ("buckets", "iterations", "smoothing"),
    "hashed": ("tables", "bits", "combine", "smoothing"),
}

Logs = NDArray[np.float64]


class Importance(TargetedSelector):
    """Importance resampling: drawn as the target is distributed, by density ratios."""

    name = "importance"

    class Config(TargetedConfig):
        """A budget, the space of features, the estimate of the density ratio, and how samples are drawn.

        `ratio: logistic` fits a classifier of source and target: `regularisation` is the inverse of the variance that
        its prior gives to log odds, and each of `folds` parts of the data is scored by what learnt from the others
        (1: by what learnt from it as well). `quantised` counts both in `buckets` cells of k-means, made better at most
        `iterations` times; `hashed` in `tables` tables of 2^`bits` buckets by the signs of random projections, whose
        sum is scaled by what tells source and target apart best (`combine: fitted`), or is the `sum` or the `mean` of
        tables. `smoothing` is a number of pseudo-counts a bucket, spread as the source is.
        `noise: false` takes the greatest weights instead of drawing. `truncate: true` leaves no weight above sqrt(N)
        times their mean. The matrix of the classifier takes 24 D^2 bytes where `memory` has them.
        """

        ratio: Literal["logistic", "quantised", "hashed"] = "logistic"
        regularisation: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.3
        folds: Annotated[int, Field(ge=1, le=100)] = 5
        buckets: Annotated[int, Field(ge=2)] = 256
        iterations: Annotated[int, Field(ge=1)] = 25
        tables: Annotated[int, Field(ge=1, le=1024)] = 128
        bits: Annotated[int, Field(ge=1, le=16)] = 4
        combine: Combine = "fitted"
        smoothing: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
        truncate: bool = False
        noise: bool = True

        @model_validator(mode="after")
        def _options_of_the_ratio(self) -> Self:
            fields = type(self).model_fields
            others = {name for names in _USED.values() for name in names} - {*_USED[self.ratio]}
            ignored = sorted(name for name in others if getattr(self, name) != fields[name].default)
            if ignored:
                raise ValueError(
                    f"{' and '.join(ignored)} would be ignored: ratio: {self.ratio} uses {', '.join(_USED[self.ratio])}"
                )
            return self

    config: Config
    score = "log of the density of the target over that of the source"

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        assert source.target is not None, "refused before the first step"
        self._refuse_few(len(source.train), len(source.target.train))

    def _refuse_few(self, there: int, target: int) -> None:
        if self.config.ratio == "logistic":
            logistic_ratio.refuse_few(there, self.config.folds, "data")
            logistic_ratio.refuse_few(target, self.config.folds, "target")
        if self.config.ratio == "quantised":
            bucket_ratio.refuse_few(there + target, self.config.buckets)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        config = self.config
        space = self.space(ctx, source)
        found = source.train.rows
        meta: dict[str, Any] = {"score": self.score, "ratio": config.ratio}

        def pick(samples: np.ndarray, count: int, _: int) -> Picks:
            candidates, target = space.raw(samples), space.target()
            self._refuse_few(len(candidates), len(target))
            standardise(candidates, target)
            estimate = self._estimate(ctx, candidates, target)
            numbers = samples if found is None else found.numpy()[samples]
            drawn = draw(
                estimate.logs,
                numbers,
                count,
                seed=ctx.derive(self.name),
                noise=config.noise,
                truncate=config.truncate,
            )
            meta.update(estimate.facts, **drawn.facts, **nearer(estimate.logs, estimate.target, drawn.rows))
            _tell(ctx.progress, meta, count, len(samples))
            return Picks(samples[drawn.rows], drawn.logs[drawn.rows])

        return select(source, previous, config, pick, meta=meta, usable=space.finite)

    def _estimate(self, ctx: Context, candidates: Tensor, target: Tensor) -> Estimated:
        config, seed = self.config, ctx.derive(self.name, "ratio")
        if config.ratio == "logistic":
            with ctx.progress.task("classify source and target", unit="pass") as task:
                return _by_classifier(candidates, target, config, seed, task.advance)
        tables: Tables
        if config.ratio == "quantised":
            tables = bucket_ratio.cells(
                candidates,
                target,
                config.buckets,
                seed=seed,
                iterations=config.iterations,
                memory=config.memory,
            )
            return _by_counts(tables, candidates, target, config.smoothing, "sum")
        tables = bucket_ratio.signs(
            target.shape[1], tables=config.tables, bits=config.bits, seed=seed, device=target.device
        )
        return _by_counts(tables, candidates, target, config.smoothing, config.combine)


class Estimated(NamedTuple):
    """Log weights of N candidates.

    Attributes:
        logs: log w, float64 (N,).
        target: log w of the target by what did not know each sample, float64 (M,).
        facts: what the set tells of the estimate.
    """

    logs: Logs
    target: Logs
    facts: dict[str, Any]


def _by_classifier(
    candidates: Tensor, target: Tensor, config: Importance.Config, seed: int, advance: Callable[[], None]
) -> Estimated:
    fitted = logistic_ratio.logistic_ratio(
        candidates,
        target,
        regularisation=config.regularisation,
        folds=config.folds,
        seed=seed,
        memory=config.memory,
        advance=advance,
    )
    facts = {"classifier_loss": fitted.loss, "scale": fitted.scale}
    return Estimated(_rounded(fitted.candidates), _rounded(fitted.target), facts)


def _by_counts(
    tables: Tables, candidates: Tensor, target: Tensor, smoothing: float, combine: Combine
) -> Estimated:
    ratio = BucketRatio(tables, candidates, target, smoothing=smoothing, combine=combine)
    logs, own = ratio.log_weights(candidates), ratio.target_log_weights(target)
    return Estimated(_rounded(logs), _rounded(own), {"scale": ratio.scale} if tables.shape[0] > 1 else {})


def _rounded(logs: Tensor) -> Logs:
    """Multiples of 2^-20: the same features in different blocks differ by less."""
    return np.round(logs.cpu().numpy() * _STEPS) / _STEPS


class Drawn(NamedTuple):
    """What was drawn.

    Attributes:
        rows: int64 (k,), the greatest key first.
        logs: log w of all, truncated where asked for: float64 (N,).
        facts: what the set tells of it.
    """

    rows: NDArray[np.int64]
    logs: Logs
    facts: dict[str, Any]


def draw(
    logs: Logs, numbers: NDArray[np.int64], count: int, *, seed: int, noise: bool, truncate: bool
) -> Drawn:
    """Draw `count` rows without replacement, or take the greatest.

    Args:
        logs: log w, float64 (N,).
        numbers: of the rows in the data as they were found, int64 (N,): their noise follows from it.
        count: at most N.
        seed: of the noise.
        noise, truncate: as in the configuration.
    """
    facts: dict[str, Any] = {}
    if truncate:
        whole = EffectiveSize()
        whole.add(logs)
        most = whole.most(len(logs))
        facts["truncated"] = int((logs > most).sum())
        logs = np.minimum(logs, most)
    size = EffectiveSize()
    size.add(logs)
    best = Greatest(count)
    best.add(logs + gumbel_noise(seed, "", numbers) if noise else logs, np.arange(len(logs)))
    return Drawn(best.rows, logs, {"effective_size": float(size.size), **facts})


def nearer(logs: Logs, target: Logs, rows: NDArray[np.int64]) -> dict[str, Any]:
    """KL(target || source) in nats, how much less KL(target || selection) is, and over how many levels of log w.

    Args:
        logs: log w of the source, float64 (N,).
        target: of the target, float64 (M,).
        rows: of the source that were drawn, int64 (k,).
    """
    levels = max(2, min(_LEVELS, len(target) // _LEAST, len(rows) // _LEAST))
    edges = np.quantile(target, np.arange(1, levels) / levels)

    def counts(values: Logs) -> NDArray[np.int64]:
        return np.bincount(np.searchsorted(edges, values, side="right"), minlength=levels)

    own = shares(counts(target))
    before, after = (divergence(own, shares(counts(each), smoothing=0.5)) for each in (logs, logs[rows]))
    return {"kl_source": before, "kl_reduction": before - after, "kl_levels": levels}


def _tell(progress: Progress, facts: dict[str, Any], count: int, there: int) -> None:
    progress.note(
        f"importance: {count} of {there} images; their weights are as {facts['effective_size']:.0f} equal ones; "
        f"KL to the target, over {facts['kl_levels']} levels of log weight, falls by "
        f"{facts['kl_reduction']:.3f} from {facts['kl_source']:.3f}",
        **facts,
    )
    if facts.get("classifier_loss", 0.0) >= 0.98 * _CHANCE:
        progress.warn(
            f"the classifier of source and target tells images that it did not learn from apart hardly better than "
            f"chance (loss {facts['classifier_loss']:.3f}, chance {_CHANCE:.3f}): look whether the features suit the "
            "target, or raise regularisation"
        )
    if facts["effective_size"] < count:
        progress.warn(
            f"{count} images are asked for, and the weights are as {facts['effective_size']:.0f} equal ones: "
            "part of what is drawn resembles the target little. Lower the budget, or raise regularisation or smoothing"
        )
