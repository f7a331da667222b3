"""Features of a source, and of its target, in the space that a selector asked for."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dataselect.space_config import SpaceConfig
from distill.cache import GradientRows, Gradients, LastLayerGradients, Network, Rows
from distill.cache.encoders import encoder_network
from distill.cache.rows import MeanRows
from distill.cache.teachers import checkpoint_epochs, train_teacher
from distill.contracts import Context, Source, Split
from distill.errors import InputError
from distill.files import disk_errors
from distill.selection import labelled_target

_BLOCK = 2048  # rows read at once


class FeatureSpace:
    """Features of the source's train split and of the target's, read by sample numbers.

    Networks are trained when features are first read, after the budget was found to fit.

    Args:
        ctx, source: as in `Method.run`.
        config: which features.
    """

    def __init__(self, ctx: Context, source: Source, config: SpaceConfig) -> None:
        self.ctx = ctx
        self.source = source
        self.config = config
        self._files = 0

    def take(self, samples: np.ndarray) -> Tensor:
        """float32 (len(samples), D): features minus their mean over `samples`.

        Selectors that use differences only lose least to rounding with centred numbers.
        """
        features = self.raw(samples)
        return features.sub_(features.mean(dim=0))

    def raw(self, samples: np.ndarray, *, split: Split | None = None) -> Tensor:
        """float32 (len(samples), D): features of samples of a split, by default the source's train split, a copy.

        On the run's device; in a file mapped into the host's memory where they are more than `memory`.
        """
        return self._read(self.source.train if split is None else split, samples)

    @property
    def factored(self) -> bool:
        """Whether rows are gradients that have two factors: those of one network's last layer."""
        return self.config.features == "last_layer" and self.config.checkpoints == 1

    def factors(self, samples: np.ndarray, *, split: Split | None = None) -> tuple[Tensor, Tensor]:
        """Last-layer gradients of one network as their factors: float32 (len(samples), C) and (len(samples), D + 1).

        The gradient of a sample is the outer product of its two rows. Samples, and where they lie, are those of `raw`.
        """
        rows = self.rows(self.source.train if split is None else split)
        assert isinstance(rows, GradientRows), "the mean over several networks has no two factors"
        joint = sum(rows.factor_widths)
        left, right = (self._matrix(len(samples), width, joint=joint) for width in rows.factor_widths)
        for start in range(0, len(samples), _BLOCK):
            block = slice(start, start + _BLOCK)
            left[block], right[block] = rows.factors(samples[block])
        return left, right

    def target(self) -> Tensor:
        """float32 (M, D): features of the samples of the target's train split that have any, as `raw` gives them.

        Raises:
            InputError: none has.
        """
        split = self._target_split
        samples = self.finite(np.arange(len(split)), split=split)
        if not len(samples):
            raise InputError(
                "no image of the target has finite features",
                where="target",
                found=f"{len(split)} images, all with NaN or infinite features",
                fix="look at the images and at the network's training, or choose other features",
            )
        return self._read(split, samples)

    def finite(self, samples: np.ndarray, *, split: Split | None = None) -> np.ndarray:
        """Those of the samples, int64 (n,), whose features are finite: the cache has zeros in place of the others."""
        if self.config.features == "pixels":
            return samples
        absent = self.rows(self.source.train if split is None else split).absent()
        return samples if not len(absent) else samples[~np.isin(samples, absent.numpy())]

    @cached_property
    def networks(self) -> list[Network]:
        """The networks that give the features, the last of the training at the end; none for pixels."""
        if self.config.features == "pixels":
            return []
        if self.config.features == "encoder":
            assert self.config.encoder is not None, "refused by the configuration"
            return [encoder_network(self.config.encoder, image_shape=self.source.image_shape)]
        learnt = self.source if self.config.trained_on == "source" else target_of(self.source)
        epochs = checkpoint_epochs(self.config.network.train, self.config.checkpoints)
        last = train_teacher(
            self.ctx, learnt, self.config.network, name="feature network", checkpoints=epochs
        )
        return [*last.checkpoints(), last]

    def rows(self, split: Split) -> Rows:
        """float32 (N, D): features of every sample of a split, in the cache.

        Args:
            split: the source's, or the target's with labels of the source's classes where gradients are asked for.
        """
        cache, networks = self.ctx.cache, self.networks
        if self.config.features == "gradients":
            few = networks[0] if len(networks) == 1 else networks
            return cache.gradients(
                split, few, Gradients(self.config.projection), normalise=self.config.unit_gradients
            )
        if self.config.features == "last_layer":
            parts = [
                cache.request(split, each, [LastLayerGradients()])[LastLayerGradients()] for each in networks
            ]
            return parts[0] if len(parts) == 1 else MeanRows(parts, normalise=self.config.unit_gradients)
        if self.config.features == "encoder":
            return cache.features(split, networks[-1])
        return cache.features(split, networks[-1], layer=self.config.layer)

    @cached_property
    def _target_split(self) -> Split:
        if self.config.features in ("gradients", "last_layer"):
            return labelled_target(self.source)
        return target_of(self.source).train

    def _read(self, split: Split, samples: np.ndarray) -> Tensor:
        rows = None if self.config.features == "pixels" else self.rows(split)
        width = math.prod(self.source.image_shape) if rows is None else rows.shape[1]
        out = self._matrix(len(samples), width)
        for start in range(0, len(samples), _BLOCK):
            part = samples[start : start + _BLOCK]
            values = self._pixels(split, part) if rows is None else rows.take(part)
            out[start : start + _BLOCK] = values.to(out.device, torch.float32)
        return out

    def _pixels(self, split: Split, samples: np.ndarray) -> Tensor:
        """(len(samples), D): pixels in units of their channel's standard deviation in the source."""
        images = split.images[torch.from_numpy(samples)].float() / 255
        std = torch.tensor(self.source.std)[:, None, None]
        return (images / std).flatten(1)

    def _matrix(self, count: int, width: int, *, joint: int | None = None) -> Tensor:
        """float32 (count, width), on the device or, where that is too much, in a file.

        Several that belong together lie in one place: `joint` is the sum of their widths.
        """
        if 4 * count * (joint or width) <= self.config.memory:
            return torch.empty(count, width, device=self.ctx.device)
        path = self.ctx.scratch / f"features-{self._files}.bin"
        self._files += 1
        with disk_errors(path):
            path.unlink(missing_ok=True)
            values = torch.from_file(str(path), shared=True, size=count * width)
            path.unlink()  # it goes with the last who maps it
        return values.view(count, width)


def target_of(source: Source) -> Source:
    """The target of a source; a step that reads it is refused without."""
    assert source.target is not None, "refused before the first step"
    return source.target
