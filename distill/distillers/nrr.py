"""Refinement of non-critical regions: images keep what their class rests on, and learn the rest.

Images begin as crops that are full of critical pixels and of whose class teachers are unsure; recovery then moves every
pixel by M = max(0, epsilon - C) of its update, with C its share in the class (distill/recovery/critical.py), until
teachers take the images for their classes and know their statistics:

    x <- x - M * (step of Adam on L),    L = L_ce + r L_bn    (distill/recovery/objective.py).

Source: Tran et al., "Enhancing Dataset Distillation via Non-Critical Region Refinement" (NRR-DD), CVPR 2025, of which
no code was released and whose settings are not known. Its second part, distances in the place of soft labels (DBR),
is the codec `dbr` and the losses `dbr_l1` and `dbr_l2` (docs/labels.md). With several teachers they vote as in a
committee, and C is the mean of theirs. What the paper leaves open was chosen by measurement on the validation split
of CIFAR-10; docs/nrr.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from distill.cache import Network
from distill.cache.critical_maps import map_layer
from distill.contracts import Context, DistilledSet, Source, StepKind
from distill.distillers.recovering import Recovering, RecoveringConfig
from distill.labels.pool import outlines
from distill.recovery.critical import CriticalMasks, CriticalSearch, Pick, critical_mosaics
from distill.recovery.initial import Initial
from distill.recovery.recover import Mask
from distill.training.config import Share


class NonCriticalRefinement(Recovering):
    """Images whose critical pixels stay real and whose others are recovered from teachers."""

    name = "nrr"

    class Config(RecoveringConfig):
        """Options: those of every distiller that recovers, and

        `epsilon`: pixels with a critical map of so much or more (of 1) never move; with `mask: none` all move alike.
        `init` and what follows says where images begin: at `critical` crops, or at random `real` images.
        """

        mask: Literal["critical", "none"] = "critical"
        epsilon: Annotated[float, Field(gt=0, le=1)] = 0.5
        init: Literal["critical", "real"] = "critical"
        critical: Share = 0.25
        pick: Pick = "least_sure"

        @model_validator(mode="after")
        def _protected_pixels_stay(self) -> Self:
            if self.mask == "critical" and (self.recover.sizes or self.recover.residual < 1):
                raise ValueError(
                    "recover.sizes and recover.residual change every pixel, also those that the mask protects: "
                    "leave them out, or set mask: none"
                )
            return self

    config: Config

    def check(self, source: Source, follows: StepKind | None) -> None:
        asked = self.config
        if asked.mask == "critical" or self.looks_for_crops:
            for name, network in outlines(asked.teachers, source).items():
                map_layer(network.eval(), source.image_shape, name=name)
        super().check(source, follows)

    def looks(self, candidates: int) -> int:
        return round(candidates * (1 + self.config.critical))

    def crops(self, ctx: Context, source: Source, networks: Sequence[Network]) -> Tensor:
        asked = self.config
        how = CriticalSearch(
            asked.factor,
            asked.candidates,
            asked.crops,
            asked.crop_scale,
            asked.critical,
            asked.pick,
        )
        return critical_mosaics(ctx, source, networks, self.budget(source), how)

    def mask(
        self, ctx: Context, networks: Sequence[Network], plain: DistilledSet, initial: Initial
    ) -> Mask | None:
        if self.config.mask == "none":
            return None
        masks = CriticalMasks(
            networks,
            epsilon=self.config.epsilon,
            preprocessing=plain.preprocessing,
            device=ctx.device,
        )
        masks.check(ctx, initial, plain.labels)
        return masks
