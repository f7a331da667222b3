"""How K networks look at samples: views and mixing, drawn from counters for several epochs at once.

The view of a sample follows from (seed, epoch, sample), so that a look can be taken again, by anyone, and is never
stored. What is mixed in is the partner's own view of the same epoch; under `selfmix`, another view of the sample.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distill.augment import Mix, Views, draw_mix, draw_views
from distill.randomness import derive_seed
from distill.training.config import Augment, Mixing

# Views are drawn for several epochs at once until this many: small sets would spend their time drawing few.
_VIEWS_AT_ONCE = 4096


class Policy(Protocol):
    """What says how samples are looked at: a training's configuration, or the plan of relabelled views."""

    @property
    def augment(self) -> Augment: ...
    @property
    def crop_scale(self) -> float: ...
    @property
    def mix(self) -> Mixing: ...
    @property
    def mix_alpha(self) -> float: ...
    @property
    def epochs(self) -> int: ...


class Looks:
    """The views of the samples of K networks.

    Args:
        policy: what is done to images.
        seeds: one a network.
        samples: N, how many each network has.
        size: height and width of the images, pixels.
        device: where parameters are wanted.
        scattered: whether epochs are asked for in any order, a batch at a time; then each view is drawn when it is
            asked for.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        seeds: list[int],
        samples: int,
        size: tuple[int, int],
        device: torch.device,
        scattered: bool = False,
    ) -> None:
        self.scattered = scattered
        self.policy, self.samples, self.size, self.device = policy, samples, size, device
        self.count = len(seeds)
        self.seeds = torch.tensor(seeds, device=device)
        self._other: Looks | None = None
        if policy.mix == "selfmix":
            others = [derive_seed(seed, "other view") for seed in seeds]
            self._other = _plain(
                policy, seeds=others, samples=samples, size=size, device=device, scattered=scattered
            )
        self._drawn: tuple[range, Views] = (range(0), Views())

    def views(self, epoch: int, index: Tensor) -> Views:
        """How the K networks look at the samples `index` (K, B): views of K*B images."""
        if self.scattered:
            seeds = self.seeds[:, None].expand_as(index).reshape(-1)
            return self._of(seeds, torch.full_like(seeds, epoch), index.reshape(-1))
        if epoch not in self._drawn[0]:
            self._drawn = self._draw(epoch)
        block = (epoch - self._drawn[0].start) * self.count + torch.arange(self.count, device=self.device)
        return self._drawn[1].rows((block[:, None] * self.samples + index).reshape(-1))

    def partner_views(self, epoch: int, index: Tensor) -> Views:
        """How they look at the samples that are mixed in."""
        return (self._other or self).views(epoch, index)

    def mix(self, epoch: int, index: Tensor) -> Mix:
        """With which samples, and how, the samples `index` (K, B) are mixed; K*B rows."""
        height, width = self.size
        return draw_mix(
            self.policy.mix,
            alpha=self.policy.mix_alpha,
            seed=self.seeds[:, None].expand_as(index).reshape(-1),
            epoch=epoch,
            index=index.reshape(-1),
            count=self.samples,
            height=height,
            width=width,
        )

    def _draw(self, epoch: int) -> tuple[range, Views]:
        """The views of all samples in a range of epochs that begins with `epoch`: rows (epoch, network, sample)."""
        at_once = max(1, _VIEWS_AT_ONCE // (self.count * self.samples))
        epochs = range(epoch, max(epoch + 1, min(epoch + at_once, self.policy.epochs)))
        shape = (len(epochs), self.count, self.samples)
        numbers = torch.tensor(list(epochs), device=self.device)[:, None, None].expand(shape)
        seeds = self.seeds[None, :, None].expand(shape)
        samples = torch.arange(self.samples, device=self.device).expand(shape)
        return epochs, self._of(seeds.reshape(-1), numbers.reshape(-1), samples.reshape(-1))

    def _of(self, seeds: Tensor, epochs: Tensor, index: Tensor) -> Views:
        """The views of these counters, int64 (n,) each."""
        height, width = self.size
        return draw_views(
            self.policy.augment,
            seed=seeds,
            epoch=epochs,
            index=index,
            height=height,
            width=width,
            crop_scale=self.policy.crop_scale,
        )


class _Unmixed:
    """A policy's views without its mixing."""

    def __init__(self, policy: Policy) -> None:
        self.augment, self.crop_scale, self.epochs = policy.augment, policy.crop_scale, policy.epochs
        self.mix: Mixing = "none"
        self.mix_alpha = policy.mix_alpha


def _plain(
    policy: Policy,
    *,
    seeds: list[int],
    samples: int,
    size: tuple[int, int],
    device: torch.device,
    scattered: bool,
) -> Looks:
    return Looks(
        _Unmixed(policy), seeds=seeds, samples=samples, size=size, device=device, scattered=scattered
    )
