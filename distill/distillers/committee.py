"""Images recovered from teachers that vote, and labels from all of them.

What happens to images and labels is in distill/distillers/recovering.py; here is where images begin.

Sources: Cui et al., "Dataset Distillation via Committee Voting" (CV-DD), 2025; with one teacher, Yin et al., "Squeeze,
Recover and Relabel" (SRe2L), NeurIPS 2023; with `iterations: 0`, Sun et al. (RDED), CVPR 2024; with `classwise` and few
`passes`, Xiao and He (LPLD), NeurIPS 2024; with `voters: turns`, `segments` and `residual`, Cui et al. (FADRM), NeurIPS
2025. docs/committee.md has the options of each.

Where this differs from CV-DD's released code: priors are measured on the validation split by a stated procedure
(`PriorConfig`) and not written into the code from accuracies on test; pairs of voters come from the seed; labels belong
to the mixed views by construction; images are rounded to pixels, not truncated and compressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from distill.cache import Network
from distill.contracts import Context, DistilledSet, Passes, Selection, Source
from distill.distillers.recovering import Recovering, RecoveringConfig
from distill.labels.ensemble import equal_ensemble
from distill.recovery.initial import CropSearch, Initial, crop_passes, given, mosaics, noise
from distill.selection import images_before


class Committee(Recovering):
    """Images recovered from, and labelled by, several teachers that vote."""

    name = "committee"

    class Config(RecoveringConfig):
        """Options: those of every distiller that recovers."""

        init: Literal["noise", "real", "easiest", "middle"] = "middle"

    config: Config

    def search_passes(self, classes: int) -> list[Passes]:
        asked = self.config
        if not self.looks_for_crops or asked.ipc is None:
            return []
        looks = max(asked.candidates, asked.ipc * asked.factor**2) * asked.crops * classes
        return crop_passes(asked.teachers, looks)

    def initial(
        self,
        ctx: Context,
        source: Source,
        previous: DistilledSet | Selection | None,
        networks: Sequence[Network],
    ) -> tuple[DistilledSet, Initial]:
        asked = self.config
        plain = images_before(self, ctx, source, previous)
        preprocessing = plain.preprocessing
        if previous is None and asked.init == "noise":
            beginning = noise(source.image_shape, seed=ctx.derive("images"), device=ctx.device)
            return replace(plain, selection=None), beginning
        if previous is None and self.looks_for_crops:
            ensemble = equal_ensemble(networks, preprocessing)
            how = CropSearch(
                asked.factor, asked.candidates, asked.crops, asked.crop_scale, middle=asked.init == "middle"
            )
            images = mosaics(ctx, source, ensemble.on(ctx.device), self.budget(source), how)
            return replace(plain, selection=None), given(images, preprocessing, ctx.device)
        return plain, given(plain.images, preprocessing, ctx.device)
