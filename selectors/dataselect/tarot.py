"""TAROT: pick the samples whose optimal transport to the target is short.

    min_{S in candidates} OT(uniform(S), uniform(target)),  with the ground cost ||w - w'||_2 of whitened features

(Feng et al., "TAROT: Targeted Data Selection via Optimal Transport", ICML 2025, arXiv 2412.00420; whitened feature
distance: dataselect/whitening.py; size: dataselect/ratio_estimate.py). For a given size, layer i holds the distinct
i-th nearest candidates of all samples of the target. Layers 0, 1, ... are taken whole as long as they fit; of the one
that does not, those of smallest potential f of the transport of everything taken and that layer to the target: the
derivative of its cost by the mass of a sample is +f. The released code takes the largest, the samples that cost most.

Features are gradients of the loss, of several checkpoints the mean of each scaled to length 1; the release computes
that mean, and then uses the checkpoint that its folder lists last.

Weights, where asked for, are masses of which half is shared alike and half lies where the target is cheapest to reach,
each sample of it giving its own to the nearest pick:  a_i = 1 / (2 n) + |{t : i is nearest to t}| / (2 M).  The
transport is convex in the masses, so that it is never longer than without weights, and no pick is left without mass.
The paper turns potentials into repeat counts, by a rule without a derivation and, in the release, of the wrong sign.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dataselect.distances import Distances
from dataselect.features import TargetedConfig, TargetedSelector
from dataselect.ratio_estimate import Ratio, estimate_ratio
from dataselect.space_config import Kind
from dataselect.target_neighbours import layers, times_near
from dataselect.transport import Solver
from dataselect.whitening import EpsUnit, refuse_wide, whiten
from distill.cache import PENULTIMATE
from distill.cache.networks import definition
from distill.cache.taps import feature_tap, listening
from distill.contracts import Context, DistilledSet, Selection, Source, StepKind
from distill.errors import InputError
from distill.selection import Picks, select
from distill.training.config import NonNegative

_FIRST_DEPTH = 4  # neighbours looked at first, where the budget needs no more


class Tarot(TargetedSelector):
    """TAROT: short optimal transport to the target, in whitened gradients."""

    name = "tarot"

    class Config(TargetedConfig):
        """Budget, or `size: estimate`, and features.

        `size: estimate` finds how many samples resemble the target, by `folds` of it; a budget is the most then. Of
        sizes whose distance to the rest of the target is within a share of `tolerance` of the least, it takes the
        smallest. `eps` is added to the variances of features before they are whitened, in units of their mean variance,
        or absolute. Whitening features of D numbers takes 24 D^2 bytes, at most `memory` (D is projection.dim for
        gradients, classes x (width + 1) for last_layer). `weights: true` weighs picks by how much of the target they
        are nearest to. Transports of up to `exact_entries` distances are exact, and entropic above, within about 0.03%.
        Distances are kept where they take at most a third of `memory`, and else computed as often as needed.
        """

        features: Kind = "gradients"
        size: Literal["budget", "estimate"] = "budget"
        folds: Annotated[int, Field(ge=2)] = 10
        tolerance: Annotated[float, Field(gt=0, lt=1)] = 5e-3
        eps: NonNegative = 1e-4
        eps_unit: EpsUnit = "variance"
        weights: bool = False
        exact_entries: Annotated[int, Field(ge=0)] = 10_000_000

        @property
        def finds_size(self) -> bool:
            return self.size == "estimate"

        @model_validator(mode="after")
        def _folds_are_used(self) -> Self:
            fields = type(self).model_fields
            ignored = [name for name in ("folds", "tolerance") if getattr(self, name) != fields[name].default]
            if ignored and not self.finds_size:
                raise ValueError(f"{' and '.join(ignored)} would be ignored: size: estimate uses them")
            return self

    config: Config

    def check(self, source: Source, follows: StepKind | None) -> None:
        super().check(source, follows)
        assert source.target is not None, "refused before the first step"
        there = len(source.target.train)
        if self.config.finds_size and there < self.config.folds:
            raise InputError(
                f"the target has {there} training images, which cannot be cut into {self.config.folds} folds",
                where="folds",
                found=f"{self.config.folds}",
                allowed=f"at most {there}",
                fix="lower folds, or give the target more images",
            )
        width = _width(self.config, source)
        if width is not None:
            refuse_wide(width, self.config.memory)

    def run(self, ctx: Context, source: Source, previous: DistilledSet | Selection | None) -> Selection:
        config = self.config
        solver = Solver(config.exact_entries, ctx.progress.warn)
        meta: dict[str, Any] = {"score": "cosine with the nearest sample of the target, of whitened features"}

        space = self.space(ctx, source)

        def pick(samples: np.ndarray, count: int, _: int) -> Picks:
            candidates, target = space.raw(samples), space.target()
            whiten(candidates, target, eps=config.eps, unit=config.eps_unit, memory=config.memory)
            ratio = self._ratio(ctx, candidates, target, solver) if config.finds_size else None
            if ratio is not None:
                meta.update(_told(ratio, len(samples)))
            if ratio is not None and len(picked := _in_layers(ratio.layer, ratio.depth)) <= count:
                taken = picked
            else:
                taken = take_layers(candidates, target, count, solver=solver, memory=config.memory)
            picks, scores, weights, cost = _finished(candidates, target, taken, config, solver)
            meta["transport_distance"] = cost
            ctx.progress.note(
                f"tarot: {len(picks)} of {len(samples)} images, transport distance {cost:.4f}", **meta
            )
            return Picks(samples[picks], scores, weights)

        return select(source, previous, config, pick, meta=meta, usable=space.finite)

    def _ratio(self, ctx: Context, candidates: Tensor, target: Tensor, solver: Solver) -> Ratio:
        config = self.config
        with ctx.progress.task("estimate size", unit="fold") as task:
            return estimate_ratio(
                candidates,
                target,
                folds=config.folds,
                tolerance=config.tolerance,
                seed=ctx.derive(self.name),
                solver=solver,
                memory=config.memory,
                advance=task.advance,
            )


def _width(config: Tarot.Config, source: Source) -> int | None:
    """How many numbers the features of a sample are; None where only the encoder's file tells.

    The network runs without memory for its values: only their shapes follow.
    """
    if config.features == "gradients":
        return config.projection.dim
    if config.features == "pixels":
        return math.prod(source.image_shape)
    if config.features == "encoder":
        return None
    shape, classes = source.image_shape, len(source.classes)
    module = definition(config.network.model, image_shape=shape, classes=classes).to("meta").eval()
    tap = feature_tap(module, config.layer if config.features == "network" else PENULTIMATE)
    with torch.no_grad(), listening(module, [tap]) as caught:
        module(torch.empty(1, *shape, device="meta"))
    inputs = caught[tap][-1].shape[1]
    return inputs if config.features == "network" else classes * (inputs + 1)


def take_layers(candidates: Tensor, target: Tensor, count: int, *, solver: Solver, memory: int) -> Tensor:
    """Take `count` candidates, the nearest of every target first.

    Args:
        candidates: float32 (N, D), length 1.
        target: float32 (M, D), length 1.
        count: at most N.
        solver, memory: for the transport that fills the last layer.

    Returns:
        int64 (count,): layer by layer, each by row number; the last by potential where it is taken in part.
    """
    depth = min(len(candidates), max(_FIRST_DEPTH, -(-count // len(target))))
    while True:
        layer = layers(candidates, target, depth)
        ends = torch.bincount(layer, minlength=depth + 1)[:depth].cumsum(dim=0)  # samples of layers 0..i
        if int(ends[-1]) >= count:
            break
        depth = min(2 * depth, len(candidates))
    last = int(torch.searchsorted(ends, count))  # the layer that completes the budget
    whole = _in_layers(layer, last if int(ends[last]) > count else last + 1)
    if len(whole) == count:
        return whole
    overflowing = (layer == last).nonzero()[:, 0]
    pool = torch.cat([whole, overflowing])
    distances = Distances(candidates, target, memory=memory, rows=pool)
    potentials = solver.solve(distances).f[len(whole) :]
    cheapest = potentials.argsort(stable=True)[: count - len(whole)]
    return torch.cat([whole, overflowing[cheapest]])


def _in_layers(layer: Tensor, depth: int) -> Tensor:
    """The candidates of the first `depth` layers, layer by layer: int64."""
    return layer.argsort(stable=True)[: int((layer < depth).sum())]


def _finished(
    candidates: Tensor, target: Tensor, taken: Tensor, config: Tarot.Config, solver: Solver
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, float]:
    """Rows, scores, weights if asked for, and the transport distance of what is taken."""
    distances = Distances(candidates, target, memory=config.memory, rows=taken)
    scores = torch.cat([1 - block.amin(dim=1).square() / 2 for _, block in distances.blocks()])
    if not config.weights:
        return taken.cpu().numpy(), scores.cpu().numpy(), None, solver.solve(distances).cost
    nearest_of = times_near(candidates, target, 1, among=taken).double()
    masses = (1 / len(taken) + nearest_of / len(target)) / 2
    alike = torch.full((len(target),), 1 / len(target), dtype=torch.float64, device=target.device)
    cost = solver.solve_masses(distances, masses, alike).cost
    return taken.cpu().numpy(), scores.cpu().numpy(), masses.cpu().numpy(), cost


def _told(ratio: Ratio, there: int) -> dict[str, Any]:
    """What the set tells of how its size was found."""
    found = int((ratio.layer < ratio.depth).sum())
    curves = [
        [{"neighbours": k, "images": size, "distance": cost} for k, size, cost in curve.points]
        for curve in ratio.curves
    ]
    return {
        "ratio": found / there,
        "neighbours": [curve.neighbours for curve in ratio.curves],
        "curves": curves,
    }
