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

from torch import Tensor

from distill.cache import Network
from distill.contracts import Context, DistilledSet, Preprocessing, Selection, Source
from distill.distillers.recovering import Recovering, RecoveringConfig
from distill.labels.ensemble import equal_ensemble
from distill.recovery.initial import CropSearch, Initial, mosaics, noise


class Committee(Recovering):
    """Images recovered from, and labelled by, several teachers that vote."""

    name = "committee"

    class Config(RecoveringConfig):
        """Options: those of every distiller that recovers."""

        init: Literal["noise", "real", "easiest", "middle"] = "middle"

    config: Config

    def looks(self, candidates: int) -> int:
        return candidates * self.config.crops

    def crops(self, ctx: Context, source: Source, networks: Sequence[Network]) -> Tensor:
        asked = self.config
        teachers = equal_ensemble(networks, Preprocessing(source.mean, source.std)).on(ctx.device)
        how = CropSearch(
            asked.factor, asked.candidates, asked.crops, asked.crop_scale, middle=asked.init == "middle"
        )
        return mosaics(ctx, source, teachers, self.budget(source), how)

    def initial(
        self,
        ctx: Context,
        source: Source,
        previous: DistilledSet | Selection | None,
        networks: Sequence[Network],
    ) -> tuple[DistilledSet, Initial]:
        plain, beginning = super().initial(ctx, source, previous, networks)
        if previous is None and self.config.init == "noise":
            beginning = noise(source.image_shape, seed=ctx.derive("images"), device=ctx.device)
            return replace(plain, selection=None), beginning
        return plain, beginning
