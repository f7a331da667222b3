"""The gradient of the matching loss with respect to the set, in memory that T inner steps do not fill.

A student starts at an expert's checkpoint theta_0 and takes T steps of plain SGD on the set,

    theta_{t+1} = theta_t - beta g_t,    g_t = gradient at theta_t of the mean loss on batch t,

and is compared with the expert's later checkpoint theta*:

    L = ||theta_T - theta*||^2 / ||theta_0 - theta*||^2

(Cazenavette et al., "Dataset Distillation by Matching Training Trajectories", CVPR 2022). Its exact
gradient is a sweep back over the steps. With v_T = 2 (theta_T - theta*) / ||theta_0 - theta*||^2 and H_t the Hessian of
batch t's loss,

    dL/dx_t = -beta (dg_t/dx_t)^T v_{t+1},   the same for soft labels y_t,
    dL/dbeta = -sum_t g_t . v_{t+1},
    v_t = v_{t+1} - beta H_t v_{t+1}.

Each step back needs theta_t alone, which the way forward has kept (4 P bytes a step), and one step's graph, whose
backward pass gives the product with H_t together with the rest.

- `exact`: this. `segment` k keeps every k-th theta and unrolls k steps at a time, which trades memory for time.
- `first_order`: TESLA (Cui et al., "Scaling Up Dataset Distillation to ImageNet-1K with Constant Memory", ICML
  2023). Its sum over t takes theta_t to be independent of the images of earlier steps, that is,
  v_T for every v_{t+1}; the paper calls it exact. The released code also halves it by accident.
- `unroll`: one graph over all T steps, as in Cazenavette et al.: the exact gradient, and a memory that grows with T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.matching.networks import FlatNetworks
from distill.matching.steps import InnerSteps

Gradient = Literal["exact", "first_order", "unroll"]


@dataclass(frozen=True)
class Matched:
    """What one outer step learns from K students.

    Args:
        loss: L of each student, (K,).
        images: gradient of the mean loss with respect to the images, (N, Ch, H, W).
        labels: the same for the logits of learned labels, (N, C), or None.
        lr: the same for beta, ().
    """

    loss: Tensor
    images: Tensor
    labels: Tensor | None
    lr: Tensor


@dataclass(frozen=True)
class Learned:
    """The set as the students see it.

    Args:
        images: what networks take, (N, Ch, H, W).
        targets: int64 (N,) classes; or logits of soft labels, (N, C), or (K, N, C) where students have labels of their
            own.
        lr: beta, ().
        learns_labels: whether the gradient of the targets, then (N, C), is wanted.
    """

    images: Tensor
    targets: Tensor
    lr: Tensor
    learns_labels: bool = False

    def labels(self, index: Tensor) -> Tensor:
        """Targets of the samples `index` (K, B): (K, B) or (K, B, C)."""
        if self.targets.ndim < 3:
            return self.targets[index]
        return self.targets.gather(1, index[..., None].expand(*index.shape, self.targets.shape[-1]))


def match(
    networks: FlatNetworks,
    steps: InnerSteps,
    learned: Learned,
    *,
    start: Tensor,
    target: Tensor,
    gradient: Gradient = "exact",
    segment: int = 1,
) -> Matched:
    """The matching loss of K students and its gradient.

    Args:
        networks: of the students.
        steps: the batches of their T steps.
        learned: the set.
        start, target: theta_0 and theta* of each, (K, P).
        gradient: see the head of the file.
        segment: for `exact`, how many steps are unrolled at a time.
    """
    walk = _Walk(networks, steps, learned)
    if gradient == "first_order":
        return walk.first_order(start, target)
    return walk.exact(start, target, segment=len(steps) if gradient == "unroll" else segment)


@dataclass
class _Batch:
    """One step's leaves of the graph."""

    index: Tensor  # (K, B)
    images: Tensor  # (K*B, Ch, H, W)
    targets: Tensor


class _Walk:
    """T steps forward and back, and the sums that grow on the way."""

    def __init__(self, networks: FlatNetworks, steps: InnerSteps, learned: Learned) -> None:
        self.networks, self.steps, self.learned = networks, steps, learned
        self.lr = learned.lr.detach()
        self.images = torch.zeros_like(learned.images)
        self.labels = torch.zeros_like(learned.targets) if learned.learns_labels else None
        self.lr_sum = torch.zeros_like(self.lr)

    def exact(self, start: Tensor, target: Tensor, *, segment: int) -> Matched:
        ranges = [
            range(first, min(first + segment, len(self.steps)))
            for first in range(0, len(self.steps), segment)
        ]
        starts = [start]
        for steps in ranges[:-1]:
            starts.append(self._forward(starts[-1], steps))
        loss, behind = None, None
        for steps in reversed(ranges):
            at = starts.pop()
            wants_theta = bool(starts)  # nothing lies before the first segment
            if len(steps) == 1 and behind is not None:
                behind = self._back_one(at, steps[0], behind, wants_theta=wants_theta)
                continue
            theta, now, lr, batches = self._unrolled(at, steps)
            if behind is None:
                loss, behind = _loss(now.detach(), start, target)
            behind = self._back(now, behind, theta if wants_theta else None, lr, batches)
        assert loss is not None, "there is a step"
        return self._matched(loss)

    def first_order(self, start: Tensor, target: Tensor) -> Matched:
        kept = [start]
        for step in range(len(self.steps)):
            kept.append(self._forward(kept[-1], range(step, step + 1)))
        loss, behind = _loss(kept.pop(), start, target)
        for step in reversed(range(len(self.steps))):
            self._back_one(kept.pop(), step, behind, wants_theta=False)
        return self._matched(loss)

    def _forward(self, theta: Tensor, steps: range) -> Tensor:
        """Where `steps` lead from theta; nothing of the way is kept."""
        for step in steps:
            at = theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self._loss(at, self._batch(step, leaves=False), step), at)
            theta = torch.addcmul(theta, gradient, self.lr, value=-1)
        return theta

    def _unrolled(self, start: Tensor, steps: range) -> tuple[Tensor, Tensor, Tensor, list[_Batch]]:
        """The same with its graph, and the leaves of this: first and last theta, beta, batches."""
        theta, lr = start.detach().requires_grad_(), self.lr.clone().requires_grad_()
        now, batches = theta, []
        for step in steps:
            batches.append(self._batch(step, leaves=True))
            (gradient,) = torch.autograd.grad(self._loss(now, batches[-1], step), now, create_graph=True)
            now = now - lr * gradient
        return theta, now, lr, batches

    def _back(
        self, now: Tensor, behind: Tensor, theta: Tensor | None, lr: Tensor, batches: Sequence[_Batch]
    ) -> Tensor:
        """Take v back over a segment, and collect what its steps say of images, labels and beta."""
        leaves = self._leaves(batches)
        wanted = [lr, *leaves] if theta is None else [theta, lr, *leaves]
        found = list(torch.autograd.grad(now, wanted, behind))
        before = behind if theta is None else found.pop(0)
        self.lr_sum += found[0]
        self._collect(batches, found[1:])
        return before

    def _back_one(self, start: Tensor, step: int, behind: Tensor, *, wants_theta: bool) -> Tensor:
        """The same over one step, of whose gradient g nothing but products with its derivatives is wanted.

        Where the step leads is known from the way forward, and g . v falls off on the way back, so that convolutions
        are spared computing g itself.
        """
        theta, batches = start.detach().requires_grad_(), [self._batch(step, leaves=True)]
        with self.networks.products_only() as products:
            (gradient,) = torch.autograd.grad(self._loss(theta, batches[0], step), theta, create_graph=True)
            leaves = self._leaves(batches)
            found = list(torch.autograd.grad(gradient, [theta, *leaves] if wants_theta else leaves, behind))
        before = torch.addcmul(behind, found.pop(0), self.lr, value=-1) if wants_theta else behind
        self.lr_sum -= (gradient.detach() * behind).sum() + products.take()
        self._collect(batches, [-self.lr * part for part in found])
        return before

    def _leaves(self, batches: Sequence[_Batch]) -> list[Tensor]:
        """What gradients of these steps are wanted of: images, then learned labels."""
        targets = [] if self.labels is None else [batch.targets for batch in batches]
        return [*(batch.images for batch in batches), *targets]

    def _collect(self, batches: Sequence[_Batch], found: Sequence[Tensor]) -> None:
        """Add the gradients of `_leaves(batches)` to the sums."""
        for batch, part in zip(batches, found, strict=False):
            self.images.index_add_(0, batch.index.reshape(-1), part)
        if self.labels is not None:
            for batch, part in zip(batches, found[len(batches) :], strict=True):
                self.labels.index_add_(0, batch.index.reshape(-1), part.flatten(0, 1))

    def _batch(self, step: int, *, leaves: bool) -> _Batch:
        index = self.steps.index(step)
        images = self.learned.images.detach().index_select(0, index.reshape(-1))
        targets = self.learned.labels(index).detach()
        if leaves:
            images.requires_grad_()
            if self.labels is not None:
                targets.requires_grad_()
        return _Batch(index, images, targets)

    def _loss(self, theta: Tensor, batch: _Batch, step: int) -> Tensor:
        """Sum over the students of each one's mean loss: their gradients do not mix."""
        views = self.steps.look(batch.images, step)
        logits = self.networks(theta, views.unflatten(0, batch.index.shape))  # (K, B, C)
        return cross_entropy(logits, batch.targets).sum()

    def _matched(self, loss: Tensor) -> Matched:
        return Matched(loss, self.images, self.labels, self.lr_sum)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of each student's batch, (K,).

    Args:
        logits: (K, B, C).
        targets: int64 (K, B) classes, or logits (K, B, C) of soft labels.
    """
    if targets.is_floating_point():
        return -(F.softmax(targets, dim=2) * F.log_softmax(logits, dim=2)).sum(dim=2).mean(dim=1)
    return -F.log_softmax(logits, dim=2).gather(2, targets[..., None]).squeeze(2).mean(dim=1)


def _loss(end: Tensor, start: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """L of each student, (K,), and v_T: the gradient of the mean of L with respect to theta_T, (K, P)."""
    away = end - target
    scale = (start - target).square().sum(dim=1)
    return away.square().sum(dim=1) / scale, 2 * away / (scale[:, None] * len(end))
