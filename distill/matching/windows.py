"""From which epoch of an expert a student starts.

Small sets can only hold what experts learn early, large ones profit from what they learn late (Guo et al., "Towards
Lossless Dataset Distillation via Difficulty-Aligned Trajectory Matching", ICLR 2024), whose range begins with easy
patterns and grows to hard ones.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from distill.training.config import Strict

Epoch = Annotated[int, Field(ge=0)]


class StartEpochs(Strict):
    """Students start after `first` to `last` epochs of an expert, both included, each as likely.

    With `grow_from`, the last is that at first, and rises evenly to `last` within `grow_steps` outer steps.
    """

    first: Epoch = 0
    last: Epoch = 19
    grow_from: Epoch | None = None
    grow_steps: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.first > self.last:
            raise ValueError(f"first {self.first} is beyond last {self.last}")
        if (self.grow_from is None) != (self.grow_steps is None):
            raise ValueError("grow_from and grow_steps belong together: give both or neither")
        if self.grow_from is not None and not self.first <= self.grow_from <= self.last:
            raise ValueError(
                f"grow_from {self.grow_from} is outside of first {self.first} to last {self.last}"
            )
        return self

    def last_at(self, step: int) -> int:
        """The latest start in outer step `step`."""
        if self.grow_from is None or self.grow_steps is None:
            return self.last
        return min(self.last, self.grow_from + (self.last - self.grow_from) * step // self.grow_steps)
