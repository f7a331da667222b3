"""The T inner steps of K students: which samples each sees, and how it looks at them.

All of it follows from counters (seed, pass, sample), so that a step is computed again by looking again, and neither
views nor graphs are kept for it. One pass over the set is cut into batches; the next pass has another order. The
released code of trajectory matching draws the same batches from global generators, and DSA's operation once a batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distill.augment import Views, apply_views, draw_views
from distill.randomness import counter_permutation, derive_seed
from distill.training.config import Augment


class InnerSteps:
    """The batches of T steps.

    Args:
        count: T.
        seeds: one a student; K of them.
        samples: N, images of the set.
        batch: images a step; the last step of a pass takes what is left.
        augment: policy of the views.
        size: height and width of the images, pixels.
        device: where the parameters of views are wanted.
    """

    def __init__(
        self,
        count: int,
        *,
        seeds: Sequence[int],
        samples: int,
        batch: int,
        augment: Augment,
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.count = count
        self.students = len(seeds)
        self.augment = augment
        per_pass = -(-samples // batch)
        orders = _orders(seeds, passes=-(-count // per_pass), samples=samples, device=device)
        self._index = [
            orders[step // per_pass][:, (step % per_pass) * batch : (step % per_pass + 1) * batch]
            for step in range(count)
        ]
        self._views = self._draw(seeds, per_pass, size)

    def __len__(self) -> int:
        return self.count

    def index(self, step: int) -> Tensor:
        """The samples that each student sees: int64 (K, B)."""
        return self._index[step]

    def look(self, images: Tensor, step: int) -> Tensor:
        """The step's views (K*B, Ch, H, W) of its samples, given in that order; differentiable."""
        return images if self.augment == "none" else apply_views(images, self._views[step])

    def _draw(self, seeds: Sequence[int], per_pass: int, size: tuple[int, int]) -> list[Views]:
        """Parameters of all views at once: drawing them step by step would cost more than applying them."""
        sizes = [index.numel() for index in self._index]
        index = torch.cat([index.reshape(-1) for index in self._index])
        streams = torch.tensor([derive_seed(seed, "views") for seed in seeds], device=index.device)
        stream = torch.cat([streams.repeat_interleave(part.shape[1]) for part in self._index])
        epochs = [
            torch.full((count,), step // per_pass, device=index.device) for step, count in enumerate(sizes)
        ]
        height, width = size
        views = draw_views(
            self.augment, seed=stream, epoch=torch.cat(epochs), index=index, height=height, width=width
        )
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [views.rows(slice(end - count, end)) for end, count in zip(ends, sizes, strict=True)]


def _orders(seeds: Sequence[int], *, passes: int, samples: int, device: torch.device) -> list[Tensor]:
    """The order of each pass: int64 (K, N)."""
    streams = [derive_seed(seed, "order") for seed in seeds]
    return [
        torch.stack([counter_permutation(stream, number, samples, device=device) for stream in streams])
        for number in range(passes)
    ]
