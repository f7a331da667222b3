"""What trajectory matching learns, step by step: images, the students' learning rate, labels.

Plain SGD with momentum on each, m <- mu m + gradient, value <- value - lr m, as in the released codes. The students'
learning rate beta is held as log beta, which cannot become negative (theirs can, and evaluation then fails); a step of
size s on log beta moves beta as a step of size s beta^2 on beta itself does.

A step is left out, so that neither values nor momenta see it, where its loss is not finite or far above what any
sensible student reaches, or where it would lead to values that are not finite or to a rate of 0 (finite gradients can).
Everything a step changes is in `State`, which is kept in one file: a killed run goes on with the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill.errors import NonFiniteError
from distill.files import write_bytes_atomically
from distill.matching.gradient import Matched


@dataclass(frozen=True)
class Rates:
    """Step sizes and momenta.

    Args:
        images, labels: step sizes on what networks take, and on the logits of labels.
        log_lr: step size on log beta.
        momentum: of images and log beta.
        labels_momentum: of labels.
        average: decay of the moving average of the images, None for none.
        diverged: loss above which a step is left out.
        patience: steps left out one after another, after which a run is not believed to recover.
    """

    images: float
    labels: float
    log_lr: float
    momentum: float
    labels_momentum: float
    average: float | None
    diverged: float
    patience: int


@dataclass
class State:
    """Where learning stands.

    Args:
        step: outer steps done.
        images: (N, Ch, H, W), as networks take them; `images_momentum` alike.
        log_lr: log beta, (); `log_lr_momentum` alike.
        labels: logits (N, C) where labels are learned, else empty; `labels_momentum` alike.
        average: moving average of the images, empty where none is kept.
        skipped, in_a_row: steps left out in all, and since the last that was not.
    """

    step: int
    images: Tensor
    images_momentum: Tensor
    log_lr: Tensor
    log_lr_momentum: Tensor
    labels: Tensor
    labels_momentum: Tensor
    average: Tensor
    skipped: int = 0
    in_a_row: int = 0

    @classmethod
    def begin(cls, images: Tensor, *, lr: float, labels: Tensor | None, average: bool) -> State:
        """Before the first step."""
        images = _canonical(images)
        log_lr = images.new_tensor(math.log(lr))
        none = images.new_empty(0)
        labels = none if labels is None else labels.clone()
        return cls(
            step=0,
            images=images,
            images_momentum=torch.zeros_like(images),
            log_lr=log_lr,
            log_lr_momentum=torch.zeros_like(log_lr),
            labels=labels,
            labels_momentum=torch.zeros_like(labels),
            average=_canonical(images) if average else none,
        )

    @property
    def lr(self) -> Tensor:
        """beta, ()."""
        return self.log_lr.exp()

    @property
    def result(self) -> Tensor:
        """The images to emit, (N, Ch, H, W)."""
        return self.average if len(self.average) else self.images

    def learn(self, matched: Matched, rates: Rates) -> bool:
        """Take one step; False where it was left out.

        Raises:
            NonFiniteError: many in a row had to be left out.
        """
        self.step += 1
        moves = self._moves(matched, rates)
        if not _is_sound(matched.loss, moves, rates.diverged):
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= rates.patience:
                raise _hopeless(matched, self, rates)
            return False
        self.in_a_row = 0
        for move in moves:
            move.commit()
        if rates.average is not None:
            self.average.lerp_(self.images, 1 - rates.average)
        return True

    def _moves(self, matched: Matched, rates: Rates) -> list[_Move]:
        """Of log beta, of the images, and of the labels where they are learned."""
        slope = matched.lr * self.lr  # dL / dlog beta
        moves = [
            _Move(self.log_lr, self.log_lr_momentum, slope, rates.log_lr, rates.momentum),
            _Move(self.images, self.images_momentum, matched.images, rates.images, rates.momentum),
        ]
        if matched.labels is not None:
            own = (self.labels, self.labels_momentum, matched.labels)
            moves.append(_Move(*own, rates.labels, rates.labels_momentum))
        return moves

    def save(self, path: Path, *, identity: str) -> None:
        """Keep it, in one move, beside the name of what it is a state of."""
        arrays = {
            field.name: value.cpu().numpy()
            if isinstance(value := getattr(self, field.name), Tensor)
            else np.array(value)
            for field in fields(self)
        }
        buffer = io.BytesIO()
        np.savez(buffer, identity=np.array(identity), **arrays)  # type: ignore[arg-type]
        write_bytes_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path, device: torch.device, *, identity: str) -> State | None:
        """What `save` kept; None where the file is damaged, or of another identity."""
        try:
            with np.load(path, allow_pickle=False) as kept:
                values = {name: kept[name] for name in kept.files}
            if str(values.pop("identity")) != identity:
                return None
            state: dict[str, Any] = {name: int(values.pop(name)) for name in ("step", "skipped", "in_a_row")}
            state |= {name: torch.from_numpy(value).to(device) for name, value in values.items()}
            loaded = cls(**state)
        except Exception:  # a broken archive raises what it likes
            return None
        loaded.images, loaded.images_momentum = _canonical(loaded.images), _canonical(loaded.images_momentum)
        if len(loaded.average):
            loaded.average = _canonical(loaded.average)
        return loaded


def _canonical(images: Tensor) -> Tensor:
    """A copy in one layout, whatever the layout it comes in: kernels, and so the last bits, follow the layout."""
    return torch.empty_like(images, memory_format=torch.channels_last).copy_(images)


class _Move:
    """One step of SGD, beside the value and its momentum until it is committed."""

    def __init__(self, value: Tensor, momentum: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        self._value, self._momentum = value, momentum
        self._new_momentum = momentum.mul(decay).add_(gradient)
        self.value = value.sub(self._new_momentum, alpha=lr)

    def commit(self) -> None:
        """Into the same memory, whose layout decides the last bits of what is computed from it."""
        self._value.copy_(self.value)
        self._momentum.copy_(self._new_momentum)


def _is_sound(loss: Tensor, moves: Sequence[_Move], diverged: float) -> bool:
    """Whether the loss is one of a sensible student, and what the moves, of log beta first, lead to can be used."""
    lr = moves[0].value.exp()
    sound = [
        (loss <= diverged).all(),
        lr.isfinite(),
        lr > 0,
        *(move.value.isfinite().all() for move in moves),
    ]
    return bool(torch.stack(sound).all())  # one wait for the device


def _hopeless(matched: Matched, state: State, rates: Rates) -> NonFiniteError:
    return NonFiniteError(
        f"matching diverged: {state.in_a_row} steps in a row had to be left out",
        where=f"trajectory, outer step {state.step}",
        found=f"loss {float(matched.loss.max()):g}, learning rate of the students {float(state.lr):g}",
        allowed=f"a finite loss of at most {rates.diverged:g}, and finite images and learning rate after the step",
        fix="lower lr_images or lr_log_lr (a tenth is a good next try), student_lr or inner_steps"
        if state.skipped < state.step
        else "students go too far from the first step on: lower student_lr or inner_steps, or give experts more steps "
        "an epoch (experts.batch_size)",
    )
